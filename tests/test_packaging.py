"""What a user installs: the wheel, the wheel made from the sdist, the editable install, the command `fgattn`."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(hook: str, source: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    run(sys.executable, "-c", f"from scikit_build_core.build import {hook}; {hook}({str(folder)!r})", cwd=source)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, links as links, without environments: walking those takes the backend many seconds."""
    folder = tmp_path_factory.mktemp("checkout") / "source"
    left_out = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*.so", "out", "demo_output")
    return Path(shutil.copytree(ROOT, folder, symlinks=True, ignore=left_out))


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build("build_wheel", checkout, tmp_path_factory.mktemp("wheel"))


def package_files(root: Path) -> dict[str, int]:
    """Name and size of every file of the package, through the links, as a wheel names them."""
    found = {}
    for folder, _, files in os.walk(root / "fgattn_jax", followlinks=True):
        if "__pycache__" not in folder:
            found |= {
                str((Path(folder) / name).relative_to(root)): (Path(folder) / name).stat().st_size for name in files
            }
    return found


def wheel_files(path: Path) -> dict[str, int]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: info.file_size for info in archive.infolist() if ".dist-info/" not in info.filename}


def test_the_wheel_is_pure_and_holds_every_file_of_the_package(wheel, checkout):
    assert wheel.name == f"fgattn_jax-{VERSION}-py3-none-any.whl"
    files = wheel_files(wheel)
    assert files == package_files(checkout)
    assert "fgattn_jax/models/dit/__init__.py" in files
    assert [name for name in files if name.endswith(".safetensors")], "the weights of the small DiT are missing"
    with zipfile.ZipFile(wheel) as archive:
        assert f"fgattn_jax-{VERSION}.dist-info/licenses/LICENSE" in archive.namelist()


def test_the_sdist_makes_the_same_wheel(wheel, checkout, tmp_path):
    sdist = build("build_sdist", checkout, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert (source / "tests" / "conftest.py").is_file()
    again = build("build_wheel", source, tmp_path / "again")
    assert again.name == wheel.name
    assert wheel_files(again) == wheel_files(wheel)


CHECK = """
import fgattn_jax, fgattn_jax.models.dit, fgattn_jax.xla_ffi.support, sys
bare = [name for name in ("models", "xla_ffi", "pallas_kernels") if name in sys.modules]
print(fgattn_jax.__file__, fgattn_jax.__version__, bare)
"""


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_install_gives_the_package_and_the_command(editable, wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # The dependencies come from the environment that runs the tests; its own `.pth` files are not read there.
    here = run(sys.executable, "-c", "import jax; print(jax.__path__[0])", cwd=tmp_path).strip()
    (site / "dependencies.pth").write_text(str(Path(here).parent))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    what = ["--no-build-isolation", "-e", str(ROOT)] if editable else [wheel]
    run(*pip, "--ignore-installed", *what, cwd=tmp_path)

    path, version, bare = run(python, "-c", CHECK, cwd=tmp_path, JAX_PLATFORMS="cpu").split()
    assert path == str((ROOT if editable else site) / "fgattn_jax" / "__init__.py")
    assert (version, bare) == (VERSION, "[]")
    assert run(tmp_path / "env" / "bin" / "fgattn", "--version", cwd=tmp_path) == f"fgattn_jax {VERSION}\n"
    if not editable:
        assert not [name for name in ("models", "xla_ffi", "pallas_kernels") if (site / name).exists()]


def test_the_interpreter_search_names_what_helps():
    script = str(ROOT / "scripts" / "find_python.sh")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = run("sh", script, "3.99", version, cwd=ROOT, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert run(found.strip(), "-c", "import sys; print('%d.%d' % sys.version_info[:2])", cwd=ROOT).strip() == version

    done = subprocess.run(["sh", script, "3.99"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "needs CPython 3.99" in done.stderr
    assert "make demo PYTHON=" in done.stderr


def test_make_alone_teaches():
    text = run("make", cwd=ROOT)
    for target in ("demo", "test", "lint", "study", "bench", "clean"):
        assert f"make {target}" in text

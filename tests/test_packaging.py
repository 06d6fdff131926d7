"""What a user installs without the CUDA library: wheel, wheel made from the sdist, editable install, command `fgattn`.

test_cuda_build.py is about the wheel with the library.
"""

import os
import re
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


def backend(code: str, source: Path, **env: str) -> str:
    """Runs code beside the build backend, as pip does; what it prints."""
    code = f"import sys; sys.path.insert(0, 'scripts'); import build_backend\n{code}"
    return run(sys.executable, "-P", "-c", code, cwd=source, **({"FGATTN_BUILD_CUDA": "", "CXX": ""} | env))


def build(hook: str, source: Path, folder: Path, **env: str) -> Path:
    folder.mkdir(exist_ok=True)
    backend(f"build_backend.{hook}({str(folder)!r})", source, **({"FGATTN_BUILD_CUDA": "0"} | env))
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, links as links, without environments: walking those takes the backend many seconds."""
    folder = tmp_path_factory.mktemp("checkout") / "source"
    left_out = shutil.ignore_patterns(".git", ".venv*", "build", "__pycache__", "*.so", "out", "demo_output")
    return Path(shutil.copytree(ROOT, folder, symlinks=True, ignore=left_out))


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build("build_wheel", checkout, tmp_path_factory.mktemp("wheel"))


NOTE = "fgattn_jax/xla_ffi/cuda_build.txt"


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
    assert files.pop(NOTE) > 0
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
    for name in ("tests/conftest.py", "CMakeLists.txt", "scripts/keep_log.sh", "fgattn_jax/xla_ffi/csrc/attention.cu"):
        assert (source / name).is_file()
    again = build("build_wheel", source, tmp_path / "again")
    assert again.name == wheel.name
    assert wheel_files(again) == wheel_files(wheel)


CHECK = """
import fgattn_jax, fgattn_jax.models.dit, fgattn_jax.xla_ffi.support, importlib.resources, sys
bare = [name for name in ("models", "xla_ffi", "pallas_kernels") if name in sys.modules]
note = importlib.resources.files("fgattn_jax.xla_ffi") / "cuda_build.txt"
print(fgattn_jax.__file__, fgattn_jax.__version__, bare, note.read_text(), end="")
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
    run(*pip, "--ignore-installed", *what, cwd=tmp_path, FGATTN_BUILD_CUDA="0")

    path, version, bare, *note = run(python, "-c", CHECK, cwd=tmp_path, JAX_PLATFORMS="cpu").split(maxsplit=3)
    assert path == str((ROOT if editable else site) / "fgattn_jax" / "__init__.py")
    assert (version, bare) == (VERSION, "[]")
    assert note == ["not built: FGATTN_BUILD_CUDA=0 was set when the package was installed\n"]
    assert run(tmp_path / "env" / "bin" / "fgattn", "--version", cwd=tmp_path) == f"fgattn_jax {VERSION}\n"
    if not editable:
        assert not [name for name in ("models", "xla_ffi", "pallas_kernels") if (site / name).exists()]


BUILD = "build_backend.platform.machine = lambda: {machine!r}\nprint(build_backend.reason_against_cuda())"
WITHOUT_LIBRARY = {
    "unwanted": ({"FGATTN_BUILD_CUDA": "0"}, "x86_64", "FGATTN_BUILD_CUDA=0 was set"),
    "other processor": ({}, "aarch64", "for Linux on x86-64, and this is Linux on aarch64"),
    "compiler that does not exist": ({"CXX": "/nowhere/g++"}, "x86_64", "CXX='/nowhere/g..' was no program that runs"),
    "compiler that fails": ({"CXX": "false"}, "x86_64", "CXX='false' was no program that runs"),
    "no compiler": ({"PATH": "/nowhere"}, "x86_64", r"there was no g\+\+ .* `apt-get install g\+\+`"),
}


@pytest.mark.parametrize("case", WITHOUT_LIBRARY)
@pytest.mark.skipif(sys.platform != "linux", reason="there is one reason elsewhere: not Linux")
def test_where_the_cuda_library_is_not_compiled_the_reason_is_given(case):
    env, machine, reason = WITHOUT_LIBRARY[case]
    assert re.search(reason, backend(BUILD.format(machine=machine), ROOT, **env))


def test_the_reason_stands_in_the_wheel_and_in_the_output(checkout, tmp_path):
    made = build("build_editable", checkout, tmp_path / "made", FGATTN_BUILD_CUDA="", CXX="/nowhere/g++")
    assert made.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(made) as archive:
        note = archive.read(NOTE).decode()
    assert note.startswith("not built: ")
    assert note.count("\n") == 1


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"FGATTN_BUILD_CUDA": "no"}, "FGATTN_BUILD_CUDA='no': expected 0 .* or 1"),
        ({"FGATTN_BUILD_CUDA": "1", "CXX": "/nowhere/g++"}, "FGATTN_BUILD_CUDA=1, but CXX='/nowhere/g..'"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the second case has another reason elsewhere")
def test_what_cannot_be_done_is_an_error(env, message):
    with pytest.raises(AssertionError, match=message):
        backend("build_backend.get_requires_for_build_wheel()", ROOT, **env)


def test_nvcc_is_asked_for_only_where_it_is_used():
    asked = "print(build_backend.get_requires_for_build_wheel(), build_backend.get_requires_for_build_editable())"
    assert "nvidia" not in backend(asked, ROOT, FGATTN_BUILD_CUDA="0")
    said = backend(f"build_backend.reason_against_cuda = lambda: None\n{asked}", ROOT)
    for pinned in ("nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-cccl==13.0.85", "jaxlib==0.8.0"):
        assert said.count(pinned) == 2


def test_without_nvcc_in_the_build_environment_the_message_says_what_to_install(tmp_path):
    code = f"build_backend.reason_against_cuda = lambda: None\nbuild_backend.build_wheel({str(tmp_path)!r})"
    hide = "build_backend.importlib.util.find_spec = lambda name: None\n"
    with pytest.raises(AssertionError, match=r"install nvidia-cuda-nvcc==13.0.88 .* or set FGATTN_BUILD_CUDA=0"):
        backend(hide + code, ROOT)
    assert not list(tmp_path.iterdir())


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
    for target in ("demo", "test", "test-cuda-build", "test-pallas-compile", "lint", "study", "bench", "clean"):
        assert f"make {target}" in text

"""Build backend (PEP 517): scikit-build-core, plus the decision whether the CUDA library is compiled.

Overrides in pyproject.toml could turn the build off for an environment variable or a platform; they can neither look
for a C++ compiler nor leave a reason in words inside the package, and the decision must fall before pip is asked for
240 MB of build requirements. Everything else is scikit-build-core's.

`FGATTN_BUILD_CUDA=0` makes a pure package, `FGATTN_BUILD_CUDA=1` insists on the library. Without it the library is
compiled on Linux x86-64 with a C++ compiler. Once it is tried, a failure is an error, never a pure package.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scikit_build_core import build as _scikit

build_sdist = _scikit.build_sdist
get_requires_for_build_sdist = _scikit.get_requires_for_build_sdist

# Pinned one by one: nvidia-cuda-nvcc's own requirements are open, and pip would mix parts of different releases.
CUDA_REQUIREMENTS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.88",
    "nvidia-cuda-cccl==13.0.85",
]
# For its FFI headers, version 0.1. XLA refuses, and with it all of JAX fails to start, a handler compiled against newer
# headers than its own; older ones it takes.
FFI_REQUIREMENTS = ["jaxlib==0.8.0"]

SOURCES = Path("fgattn_jax/xla_ffi/csrc")
NOTE = "fgattn_jax/xla_ffi/cuda_build.txt"
LIBRARY = "fgattn_jax/xla_ffi/libfgattn_cuda.so"


def cxx_compiler() -> str | None:
    """Returns the path of the C++ compiler: the program `CXX` names, or else g++; None if it does not run."""
    found = shutil.which(os.environ.get("CXX") or "g++")
    if found is None:
        return None
    done = subprocess.run([found, "--version"], capture_output=True, check=False)
    return found if done.returncode == 0 else None


def reason_against_cuda() -> str | None:
    """Says in words why the CUDA library is not compiled here; None if it is.

    Raises:
        SystemExit: If `FGATTN_BUILD_CUDA` is neither 0 nor 1, or is 1 where the library cannot be compiled.
    """
    wish = os.environ.get("FGATTN_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"FGATTN_BUILD_CUDA={wish!r}: expected 0 (pure package) or 1 (with the CUDA library).")
    if wish == "0":
        return "FGATTN_BUILD_CUDA=0 was set when the package was installed"
    reason = None
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        reason = f"the library is for Linux on x86-64, and this is {platform.system()} on {platform.machine()}"
    elif platform.libc_ver()[0] != "glibc":
        reason = "NVIDIA's compiler needs glibc, and this system has another C library"
    elif cxx_compiler() is None:
        named = f"CXX={os.environ['CXX']!r} was no program that runs" if os.environ.get("CXX") else "there was no g++"
        reason = f"{named} when the package was installed; on Debian and Ubuntu, `apt-get install g++` brings one"
    if reason and wish == "1":
        raise SystemExit(f"FGATTN_BUILD_CUDA=1, but {reason}.")
    return reason


def mask_hash(folder: Path) -> str:
    """Returns the same over these files and those of folders below, with paths inside the folder."""
    files = sorted(f for f in folder.rglob("*") if f.suffix in {".cc", ".cu", ".cuh", ".h"})
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder).as_posix()}\n" for f in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def source_hash(folder: Path) -> str:
    """Returns the SHA-256 of the lines that `sha256sum *.cc *.cu *.cuh *.h` prints in a folder, sorted by name.

    tests/gpu_ledger.py counts the same way: a run of GPU tests is for the sources its library was made of.
    """
    files = sorted((f for f in folder.iterdir() if f.suffix in {".cc", ".cu", ".cuh", ".h"}), key=lambda f: f.name)
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _installed(package: str, part: str, requirements: list[str]) -> Path:
    """Finds `part` in the folder of an installed package of the build environment."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / part).exists():
            return Path(folder)
    raise SystemExit(
        f"The CUDA library needs {part} of the Python package `{package}` in the build environment. Without build "
        f"isolation, install {' '.join(requirements)} first, or set FGATTN_BUILD_CUDA=0 for a pure package."
    )


def _settings(given: dict | None, reason: str | None, folder: Path) -> dict:
    """Returns scikit-build-core's settings for this build; `folder` keeps what is written for it."""
    settings = dict(given or {})
    if reason is not None:
        note = folder / "cuda_build.txt"
        note.write_text(f"not built: {reason}\n")
        return settings | {"wheel.cmake": "false", f"wheel.force-include.{note}": NOTE}
    cuda = _installed("nvidia.cu13", "bin/nvcc", CUDA_REQUIREMENTS)
    headers = _installed("jaxlib", "include/xla/ffi/api/ffi.h", FFI_REQUIREMENTS) / "include"
    return settings | {
        "wheel.cmake": "true",
        "cmake.define.CMAKE_CXX_COMPILER": cxx_compiler(),
        "cmake.define.FGATTN_CUDA_ROOT": str(cuda),
        "cmake.define.FGATTN_FFI_INCLUDE": str(headers),
        "cmake.define.FGATTN_SOURCE_HASH": source_hash(SOURCES),
        "cmake.define.FGATTN_MASK_HASH": mask_hash(SOURCES),
    }


def _call(hook: str, folder: str, given: dict | None, reason: str | None, *more: str | None) -> str:
    with tempfile.TemporaryDirectory(prefix="fgattn-build-") as temporary:
        return getattr(_scikit, hook)(folder, _settings(given, reason, Path(temporary)), *more)


def _build(hook: str, folder: str, given: dict | None, metadata: str | None) -> str:
    reason = reason_against_cuda()
    made = _call(hook, folder, given, reason, metadata)
    if reason is None:
        print(f"fgattn_jax: {made} holds {LIBRARY}", file=sys.stderr)
    else:
        print(f"fgattn_jax: built without the CUDA library: {reason}", file=sys.stderr)
    return made


def _requires(hook: str, given: dict | None) -> list[str]:
    reason = reason_against_cuda()
    settings = dict(given or {}) | {"wheel.cmake": "true" if reason is None else "false"}
    wanted = getattr(_scikit, hook)(settings)
    return [*wanted, *CUDA_REQUIREMENTS, *FFI_REQUIREMENTS] if reason is None else wanted


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Returns scikit-build-core's requirements, and nvcc and the FFI headers if the library is compiled."""
    return _requires("get_requires_for_build_wheel", config_settings)


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """Returns the same requirements as for a wheel."""
    return _requires("get_requires_for_build_editable", config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: dict | None = None) -> str:
    """Writes what pip wants to know before it builds: the wheel's tag depends on the CUDA library."""
    return _call("prepare_metadata_for_build_wheel", metadata_directory, config_settings, reason_against_cuda())


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: dict | None = None) -> str:
    """Writes the same for an editable install."""
    return _call("prepare_metadata_for_build_editable", metadata_directory, config_settings, reason_against_cuda())


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    """Builds the wheel with or without the CUDA library, and returns its file name."""
    return _build("build_wheel", wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    """Builds the wheel of an editable install: links to the sources, a real CUDA library. Returns its file name."""
    return _build("build_editable", wheel_directory, config_settings, metadata_directory)

"""Builds and installs the FFI handlers over a kernel for host memory; tests/programs/host_kernel.cc says what for."""

import contextlib
import ctypes
import importlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "programs" / "host_kernel.cc"
SOURCES = ROOT / "xla_ffi" / "csrc"
TARGETS = {
    "fgattn_host_attention": "FgattnHostAttention",
    "fgattn_host_work_order": "FgattnHostWorkOrder",
    "fgattn_check_attention": "FgattnCheckAttention",
    "fgattn_check_work_order": "FgattnCheckWorkOrder",
    "fgattn_host_exact_mask": "FgattnHostExactMask",
    "fgattn_host_exact_mass": "FgattnHostExactMass",
    "fgattn_host_mean_mask": "FgattnHostMeanMask",
    "fgattn_host_one_pass": "FgattnHostOnePass",
    "fgattn_check_one_pass": "FgattnCheckOnePass",
    "fgattn_check_exact_mask": "FgattnCheckExactMask",
    "fgattn_check_exact_mass": "FgattnCheckExactMass",
    "fgattn_check_mean_mask": "FgattnCheckMeanMask",
}

# launch.h needs one type of the CUDA runtime, and machines without CUDA have no header for it.
_STREAM = "#pragma once\ntypedef struct CUstream_st* cudaStream_t;\n"


def build(folder: Path, *, hashes: tuple[str, str] = ("", "")) -> Path:
    """Compiles the library with the FFI headers of the installed jaxlib.

    Raises:
        RuntimeError: There is no g++, or it fails; with its whole output.
    """
    import jax

    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("these tests compile xla_ffi/csrc/handlers.cc: install g++ (Debian: apt-get install g++)")
    (folder / "cuda_runtime_api.h").write_text(_STREAM)
    library = folder / "libfgattn_host.so"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"]
    command += [f'-DFGATTN_SOURCE_HASH="{hashes[0]}"', f'-DFGATTN_MASK_HASH="{hashes[1]}"']
    command += ["-isystem", jax.ffi.include_dir(), "-isystem", str(folder), "-I", str(SOURCES)]
    done = subprocess.run([*command, str(SOURCE), "-o", str(library)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"g++ failed on {SOURCE}:\n{done.stdout}{done.stderr}")
    return library


def load(library: Path) -> ctypes.CDLL:
    """The library with its targets registered for CPU devices."""
    import jax

    loaded = ctypes.CDLL(str(library))
    for target, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, symbol)), platform="cpu")
    return loaded


@contextlib.contextmanager
def installed(path: Path) -> Iterator[ctypes.CDLL]:
    """While it lasts, `implementation="cuda"` runs on the CPU: other targets, no gate, no demand for a GPU."""
    import jax

    from fgattn_jax.implementations import transforms
    from fgattn_jax.xla_ffi import library, support

    def reasons(*, platform, compute_capability=None, **arguments):
        del platform, compute_capability
        return support.argument_reasons(**arguments)

    def forget():  # programs that were traced with the other targets
        attention._run.clear_cache()
        transforms._core.cache_clear()

    attention = importlib.import_module("fgattn_jax.attention")  # the package has a function of that name
    loaded = load(path)
    forget()
    with (
        mock.patch.object(library, "ATTENTION_TARGET", "fgattn_host_attention"),
        mock.patch.object(library, "WORK_ORDER_TARGET", "fgattn_host_work_order"),
        mock.patch.object(library, "EXACT_MASK_TARGET", "fgattn_host_exact_mask"),
        mock.patch.object(library, "EXACT_MASS_TARGET", "fgattn_host_exact_mass"),
        mock.patch.object(library, "MEAN_MASK_TARGET", "fgattn_host_mean_mask"),
        mock.patch.object(library, "ONE_PASS_TARGET", "fgattn_host_one_pass"),
        mock.patch.object(library, "register"),
        mock.patch.object(support, "unsupported_reasons", reasons),
        jax.default_device(jax.devices("cpu")[0]),
    ):
        try:
            yield loaded
        finally:
            forget()

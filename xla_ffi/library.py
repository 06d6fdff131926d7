"""The compiled library: where it lies, whether it fits the installed jaxlib, and its registration at first use.

Order matters. XLA compares a handler's FFI API with its own when a target is registered, and a handler that is newer
than XLA takes down every backend of the process. So the numbers are compared here first; nothing is registered unless
they fit.
"""

import ctypes
import functools
import importlib.resources
import re
import threading
from pathlib import Path

_PACKAGE = "fgattn_jax.xla_ffi"
LIBRARY_NAME = "libfgattn_cuda.so"
BUILD_NOTE_NAME = "cuda_build.txt"
ABI_VERSION = 5
"""What `fgattn_abi_version()` of the library must return: targets, operands, results and attributes as used here."""

ATTENTION_TARGET = "fgattn_attention"
WORK_ORDER_TARGET = "fgattn_work_order"
EXACT_MASK_TARGET = "fgattn_exact_mask"
EXACT_MASS_TARGET = "fgattn_exact_mass"
MEAN_MASK_TARGET = "fgattn_mean_mask"
ONE_PASS_TARGET = "fgattn_one_pass"
_SYMBOLS = {
    ATTENTION_TARGET: "FgattnAttention",
    WORK_ORDER_TARGET: "FgattnWorkOrder",
    EXACT_MASK_TARGET: "FgattnExactMask",
    EXACT_MASS_TARGET: "FgattnExactMass",
    MEAN_MASK_TARGET: "FgattnMeanMask",
    ONE_PASS_TARGET: "FgattnOnePass",
}
_HOW_TO_BUILD = "build it with `FGATTN_BUILD_CUDA=1 pip install .` on Linux x86-64"

_lock = threading.Lock()


def find_library() -> Path | None:
    """Where the library lies; None if this installation has none.

    It is looked for beside the installed package: in an editable installation that is not where the sources are.
    """
    found = Path(str(importlib.resources.files(_PACKAGE) / LIBRARY_NAME))
    return found if found.is_file() else None


def unusable_reasons() -> tuple[str, ...]:
    """Why the library cannot be used in this process; empty if it can.

    Loads the library if there is one (which needs neither a GPU nor a driver) and registers nothing.

    Returns:
        One sentence per reason. It never raises.
    """
    path = find_library()
    if path is None:
        return (_missing(_build_note()),)
    try:
        library = _load(str(path))
    except OSError as error:
        return (f"the library {LIBRARY_NAME} cannot be loaded: {error}",)
    return unfit_reasons(library, jaxlib_ffi_minor())


def unfit_reasons(library: ctypes.CDLL, jaxlib_minor: int | None) -> tuple[str, ...]:
    """Why a loaded library must not be registered with a jaxlib of the given FFI API minor number."""
    try:
        abi, minor = library.fgattn_abi_version(), library.fgattn_ffi_api_minor()
    except AttributeError as error:
        return (f"{LIBRARY_NAME} is not the library of this package: {error}; {_HOW_TO_BUILD}",)
    if abi != ABI_VERSION:
        said = f"expected abi_version={ABI_VERSION}, got abi_version={abi}"
        return (f"{LIBRARY_NAME} was built from other sources: {said}; {_HOW_TO_BUILD}",)
    if jaxlib_minor is None:
        return ("the installed jaxlib does not say which FFI API it speaks: its header `c_api.h` is missing",)
    if minor > jaxlib_minor:
        numbers = f"was built for XLA FFI API 0.{minor}, and the installed jaxlib speaks 0.{jaxlib_minor}"
        return (f"{LIBRARY_NAME} {numbers}; install a newer jaxlib, or build with the headers of an older one",)
    return ()


@functools.lru_cache(maxsize=1)
def jaxlib_ffi_minor() -> int | None:
    """Minor number of the FFI API that the installed jaxlib speaks, from its header; None if that cannot be read."""
    import jax.ffi

    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        found = re.search(r"^#define\s+XLA_FFI_API_MINOR\s+(\d+)", header.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def register() -> None:
    """Load the library and register its targets for CUDA devices; does nothing from the second call on.

    Works on machines without a GPU: programs that use the targets can then be lowered and exported there.

    Raises:
        RuntimeError: The library is missing or does not fit the installed jaxlib; the message says why.
    """
    reasons = unusable_reasons()
    if reasons:
        raise RuntimeError("the CUDA kernel cannot be used: " + "; ".join(reasons))
    with _lock:
        _register(str(find_library()))


@functools.lru_cache(maxsize=1)
def _register(path: str) -> None:
    import jax.ffi

    library = _load(path)
    for target, symbol in _SYMBOLS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="CUDA")


@functools.lru_cache(maxsize=4)
def _load(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


def _build_note() -> str | None:
    """First line of what the build wrote about itself: "built" or "not built: REASON"."""
    note = importlib.resources.files(_PACKAGE) / BUILD_NOTE_NAME
    try:
        lines = note.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return lines[0].strip() if lines else None


def _missing(note: str | None) -> str:
    said = f"; its build says: {note}" if note and note != "built" else ""
    return f"this installation has no {LIBRARY_NAME}{said}; {_HOW_TO_BUILD}"

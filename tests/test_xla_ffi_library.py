"""The compiled library: found, compared with the installed jaxlib, registered once; and every reason not to."""

import ctypes
from types import SimpleNamespace

import pytest

from fgattn_jax.xla_ffi import library, support

RIGHT = {"head_dim": 128, "query_block": 128, "dtype": "bfloat16", "platform": "gpu", "compute_capability": "9.0"}


def loaded(*, abi=library.ABI_VERSION, minor=1):
    return SimpleNamespace(fgattn_abi_version=lambda: abi, fgattn_ffi_api_minor=lambda: minor)


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is remembered from other tests, nor by them."""
    library._load.cache_clear()
    library._register.cache_clear()
    yield monkeypatch
    library._load.cache_clear()
    library._register.cache_clear()


@pytest.fixture
def usable(monkeypatch):
    monkeypatch.setattr(library, "unusable_reasons", tuple)
    monkeypatch.setattr(support, "RELEASED", True)


def test_the_minor_number_is_that_of_the_installed_header(host_library):
    """The host library is compiled with the installed header, so both must say the same."""
    assert ctypes.CDLL(str(host_library)).fgattn_ffi_api_minor() == library.jaxlib_ffi_minor()


@pytest.mark.parametrize(("built", "installed"), [(1, 1), (1, 5), (3, 3)])
def test_a_library_that_is_not_newer_than_jaxlib_fits(built, installed):
    assert library.unfit_reasons(loaded(minor=built), installed) == ()


@pytest.mark.parametrize(("built", "installed"), [(2, 1), (6, 5)])
def test_a_newer_library_is_refused_with_both_numbers(built, installed):
    (reason,) = library.unfit_reasons(loaded(minor=built), installed)
    assert f"XLA FFI API 0.{built}, and the installed jaxlib speaks 0.{installed}" in reason


def test_a_library_of_other_sources_or_without_a_header_is_refused():
    (reason,) = library.unfit_reasons(loaded(abi=7), 5)
    assert "expected abi_version=5, got abi_version=7" in reason
    (reason,) = library.unfit_reasons(loaded(), None)
    assert "does not say which FFI API it speaks" in reason
    (reason,) = library.unfit_reasons(ctypes.CDLL(None), 5)
    assert "is not the library of this package" in reason


def test_a_missing_library_says_how_to_build_it_and_what_the_build_said(fresh):
    fresh.setattr(library, "find_library", lambda: None)
    fresh.setattr(library, "_build_note", lambda: None)
    (reason,) = library.unusable_reasons()
    assert reason == (
        "this installation has no libfgattn_cuda.so; build it with `FGATTN_BUILD_CUDA=1 pip install .` on Linux x86-64"
    )
    fresh.setattr(library, "_build_note", lambda: "not built: no g++ was found")
    (reason,) = library.unusable_reasons()
    assert "libfgattn_cuda.so; its build says: not built: no g++ was found; build it with" in reason
    with pytest.raises(RuntimeError, match="the CUDA kernel cannot be used: this installation has no libfgattn"):
        library.register()


def test_a_file_that_is_no_library_is_a_reason_not_an_error(fresh, tmp_path):
    broken = tmp_path / library.LIBRARY_NAME
    broken.write_text("no library")
    fresh.setattr(library, "find_library", lambda: broken)
    (reason,) = library.unusable_reasons()
    assert "libfgattn_cuda.so cannot be loaded" in reason


def test_a_newer_library_is_never_registered(fresh, host_library):
    import jax

    fresh.setattr(library, "find_library", lambda: host_library)
    fresh.setattr(library, "jaxlib_ffi_minor", lambda: 0)
    fresh.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: pytest.fail("it was registered"))
    with pytest.raises(RuntimeError, match=r"built for XLA FFI API 0\.\d+, and the installed jaxlib speaks 0\.0"):
        library.register()


def test_registration_needs_no_gpu_and_happens_once(run_python, host_library):
    code = f"""
import jax
from pathlib import Path
from fgattn_jax.xla_ffi import library
library.find_library = lambda: Path({str(host_library)!r})
real, calls = jax.ffi.register_ffi_target, []
def counted(name, fn, platform):
    calls.append((name, platform))
    real(name, fn, platform=platform)
jax.ffi.register_ffi_target = counted
assert library.unusable_reasons() == () and not calls
library.register()
library.register()
print(sorted(calls))
print(jax.jit(lambda x: x + 1)(1))  # the backends are alive
"""
    calls, two = run_python(code).splitlines()
    names = ("attention", "exact_mask", "exact_mass", "mean_mask", "one_pass", "work_order")
    assert calls == str([(f"fgattn_{name}", "CUDA") for name in names])
    assert two == "2"


def test_support_loads_neither_jax_nor_a_device_where_there_is_no_library(run_python):
    code = f"""
import sys
from fgattn_jax.xla_ffi import library, support
library.find_library = lambda: None
print(*support.unsupported_reasons(**{RIGHT!r}), sep="\\n")
print("jax" in sys.modules)
"""
    *reasons, jax_loaded = run_python(code, platform="no_such_platform").splitlines()
    assert reasons[-1].startswith("this installation has no libfgattn_cuda.so")
    assert jax_loaded == "False"


def test_a_call_that_the_kernel_takes_has_no_reason(usable):
    assert support.unsupported_reasons(**RIGHT) == ()
    for change in ({"head_dim": 64}, {"query_block": 64}, {"dtype": "float16"}, {"platform": "cuda"}):
        assert support.unsupported_reasons(**(RIGHT | change)) == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu", "compute_capability": None}, "Hopper generation, and platform='cpu'"),
        ({"platform": "rocm", "compute_capability": None}, "Hopper generation, and platform='rocm'"),
        ({"compute_capability": "8.0"}, "compute_capability='9.0'), and compute_capability='8.0'"),
        ({"compute_capability": "10.0"}, "and compute_capability='10.0'"),
        ({"compute_capability": None}, "and compute_capability=None"),
        ({"dtype": "float32"}, "bfloat16 or float16, and dtype='float32'"),
        ({"head_dim": 80}, "head widths 64 and 128, and head_dim=80"),
        ({"query_block": 32}, "64 or 128 queries per slice, and query_block=32"),
    ],
)
def test_each_fact_alone_is_a_reason(usable, change, reason):
    (said,) = support.unsupported_reasons(**(RIGHT | change))
    assert reason in said


def test_the_gate_comes_first_and_is_a_reason_of_its_own(monkeypatch):
    monkeypatch.setattr(library, "unusable_reasons", tuple)
    monkeypatch.setattr(support, "RELEASED", False)
    assert support.unsupported_reasons(**RIGHT) == (
        "the CUDA kernel of this version has not passed its tests on a GPU yet",
    )
    every = support.unsupported_reasons(head_dim=80, query_block=32, dtype="float32", platform="cpu")
    assert len(every) == 5
    assert every[0] == "the CUDA kernel of this version has not passed its tests on a GPU yet"

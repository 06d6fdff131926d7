"""Importing does nothing: no device, no Flax, no file; and every name of the package is what it says."""

from pathlib import Path

import pytest

import fgattn_jax

ROOT = Path(__file__).resolve().parent.parent

# Fails in the process if anything touches a device: no platform has this name.
NO_PLATFORM = "no_such_platform"

WALK = """
import importlib, pkgutil, fgattn_jax
names = ["fgattn_jax"] + sorted(m.name for m in pkgutil.walk_packages(fgattn_jax.__path__, "fgattn_jax."))
"""


def test_import_loads_neither_flax_nor_pallas(run_python):
    loaded = run_python("import sys, fgattn_jax; print(*sys.modules, sep='\\n')", platform=NO_PLATFORM).split()
    assert "fgattn_jax" in loaded
    assert not [name for name in loaded if name.split(".")[0] in ("flax", "optax", "matplotlib", "PIL")]
    assert not [name for name in loaded if name.startswith("jax.experimental.pallas")]


def test_attention_masks_and_predictors_need_neither_flax_nor_pallas(run_python):
    code = """
import sys, fgattn_jax
fgattn_jax.attention, fgattn_jax.SliceMask, fgattn_jax.predictors, fgattn_jax.query_order
print(*sys.modules, sep="\\n")
"""
    loaded = run_python(code, platform=NO_PLATFORM).split()
    assert "fgattn_jax.dispatch" in loaded
    assert not [name for name in loaded if name.split(".")[0] in ("flax", "optax", "matplotlib", "PIL")]
    assert not [name for name in loaded if name.startswith("jax.experimental.pallas")]


def test_importing_every_module_touches_no_device_and_no_file(run_python):
    code = f"""
{WALK}
import os, sys
import flax.nnx, matplotlib, optax  # what they open is theirs
folders = tuple({{os.path.realpath(path) for package in ("", "/models", "/pallas_kernels", "/xla_ffi")
                 for path in [fgattn_jax.__path__[0] + package]}})
opened = []
def watch(event, args):
    if event == "open" and isinstance(args[0], str) and os.path.realpath(args[0]).startswith(folders):
        if not args[0].endswith((".py", ".pyc")) and ".pyc." not in args[0]:
            opened.append(args[0])
sys.addaudithook(watch)
for name in names:
    importlib.import_module(name)
bare = [name for name in ("models", "pallas_kernels", "xla_ffi") if name in sys.modules]
print(len(names), opened, bare)
"""
    number, rest = run_python(code, platform=NO_PLATFORM).split(maxsplit=1)
    assert int(number) > 30
    assert rest.strip() == "[] []"


@pytest.mark.parametrize("first", ["fgattn_jax.attention", "fgattn_jax.nn", "fgattn_jax.dispatch"])
def test_attention_stays_the_function_whatever_is_imported_first(run_python, first):
    code = f"""
import importlib
importlib.import_module({first!r})
import fgattn_jax
from fgattn_jax import attention
import fgattn_jax.attention as again
assert callable(attention) and fgattn_jax.attention is attention and again is attention
print(attention.__name__)
"""
    assert run_python(code).strip() == "attention"


def test_public_names_resolve_and_are_listed():
    for name in fgattn_jax.__all__:
        assert getattr(fgattn_jax, name) is not None
        assert name in dir(fgattn_jax)
    assert issubclass(fgattn_jax.UnsupportedError, NotImplementedError)
    assert callable(fgattn_jax.explain)
    assert fgattn_jax.masks.SliceMask is fgattn_jax.SliceMask


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        fgattn_jax.atention  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.skipif(not (ROOT / "models").exists(), reason="an unpacked sdist holds real files in the package")
@pytest.mark.parametrize("name", ["models", "pallas_kernels", "xla_ffi"])
def test_the_package_links_to_the_top_level_folders(name):
    link = ROOT / "fgattn_jax" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()

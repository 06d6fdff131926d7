"""fgattn_jax: fine-grained sparse attention for JAX.

A mask keeps or skips *slices*: M neighbouring queries x 1 key. `attention` takes such a mask, `predictors` make one,
`nn` joins the two in Flax modules, `models` uses them.

Names are loaded when first used: `import fgattn_jax` imports neither Flax nor Pallas nor a shared library, and touches
no device.
"""

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fgattn_jax import masks, models, nn, predictors, query_order
    from fgattn_jax.attention import AttentionOutput, attention, attention_with_lse, explain
    from fgattn_jax.errors import UnsupportedError
    from fgattn_jax.masks import SliceMask

    __version__: str

__all__ = [
    "AttentionOutput",
    "SliceMask",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_with_lse",
    "explain",
    "masks",
    "models",
    "nn",
    "predictors",
    "query_order",
]

_SUBMODULES = frozenset({"errors", "evaluation", "masks", "models", "nn", "predictors", "query_order", "types"})
_HOMES = {
    "AttentionOutput": "attention",
    "SliceMask": "masks",
    "UnsupportedError": "errors",
    "attention": "attention",
    "attention_with_lse": "attention",
    "explain": "attention",
}


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("fgattn-jax")
    except metadata.PackageNotFoundError:  # a bare checkout on the path: nothing is installed
        return "0+checkout"


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "__version__":
        value: object = _version()
    elif name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    elif name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})


class _Package(types.ModuleType):
    """Keeps `fgattn_jax.attention` the function: importing the submodule of that name would bind the module over it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "attention" and isinstance(value, types.ModuleType):
            value = value.attention
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

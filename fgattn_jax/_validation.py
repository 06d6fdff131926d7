"""Checks of `attention`'s arguments: rank, then shape, then dtype, then whether the mask fits."""

import math
import numbers

import jax.numpy as jnp
from jaxtyping import Array

from fgattn_jax.masks import SliceMask
from fgattn_jax.types import IMPLEMENTATIONS, QUERY_BLOCKS

DTYPES = ("float32", "bfloat16", "float16")


def check_arrays(query: Array, key: Array, value: Array) -> None:
    """Raise ValueError unless query, key and value fit each other."""
    named = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        if not hasattr(x, "ndim") or not hasattr(x, "dtype"):
            raise ValueError(f"`{name}` must be an array, got {type(x).__name__}")
        if x.ndim != 4:
            axes = "[B, T, N, H]" if name == "query" else "[B, S, K, H]"
            raise ValueError(
                f"`{name}` must have 4 axes {axes}, got shape={x.shape}; add a batch axis of size 1 if it is missing"
            )
    for name, x in named.items():
        if 0 in x.shape:
            raise ValueError(f"`{name}` must not be empty, got shape={x.shape}")
    if key.shape != value.shape:
        raise ValueError(f"`key` and `value` must have the same shape, got key={key.shape} and value={value.shape}")
    for axis, word in ((0, "batch"), (3, "head width")):
        if query.shape[axis] != key.shape[axis]:
            raise ValueError(
                f"`query` and `key` must have the same {word} (axis {axis}), "
                f"got query={query.shape} and key={key.shape}"
            )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query heads must be a multiple of key/value heads, got query heads {query.shape[2]} "
            f"and key/value heads {key.shape[2]}"
        )
    for name, x in named.items():
        if str(x.dtype) not in DTYPES:
            raise ValueError(
                f"`{name}` must be one of {', '.join(DTYPES)}, got dtype={x.dtype}; convert it with `.astype`"
            )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"`query`, `key` and `value` must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )


def check_mask(mask: SliceMask, query: Array, key: Array) -> None:
    """Raise ValueError unless the mask is made for these lengths and heads."""
    if not isinstance(mask, SliceMask):
        raise ValueError(
            f"`mask` must be a SliceMask or None, got {type(mask).__name__}; `fgattn_jax.masks.from_dense` makes one "
            "from a boolean array [B, N, T, S]"
        )
    batch, num_queries, num_heads, _ = query.shape
    if mask.query_block not in QUERY_BLOCKS:
        raise ValueError(f"`mask.query_block` must be one of {QUERY_BLOCKS}, got query_block={mask.query_block}")
    for name, have, want in (
        ("num_queries", mask.num_queries, num_queries),
        ("num_keys", mask.num_keys, key.shape[1]),
    ):
        if have != want:
            raise ValueError(
                f"the mask is made for {name}={have}, but the arrays have {name}={want}; make a mask for these lengths"
            )
    if mask.bits.ndim != 4:
        raise ValueError(
            f"`mask.bits` must have 4 axes [B|1, N|1, R, W], got shape={mask.bits.shape}; take one layer of a stacked "
            "mask before the call"
        )
    rows, words = mask.num_rows, 4 * -(-mask.num_keys // 128)
    if mask.bits.shape[2:] != (rows, words):
        raise ValueError(f"`mask.bits` must end in [R, W] = {(rows, words)}, got shape={mask.bits.shape}")
    named = {"mask.bits": mask.bits} | ({} if mask.query_order is None else {"mask.query_order": mask.query_order})
    for name, x in named.items():
        for axis, word, size in ((0, "batch", batch), (1, "heads", num_heads)):
            if x.shape[axis] not in (1, size):
                raise ValueError(f"`{name}` must have 1 or {size} entries along {word}, got shape={x.shape}")
    if mask.bits.dtype != jnp.uint32:
        raise ValueError(f"`mask.bits` must be uint32, got dtype={mask.bits.dtype}")
    order = mask.query_order
    if order is not None:
        if order.ndim != 3 or order.shape[2] != num_queries:
            raise ValueError(f"`mask.query_order` must be [B|1, N|1, T={num_queries}], got shape={order.shape}")
        if order.dtype != jnp.int32:
            raise ValueError(f"`mask.query_order` must be int32, got dtype={order.dtype}")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale as a float; `1 / sqrt(H)` for None."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not isinstance(scale, numbers.Real) or isinstance(scale, bool):
        raise ValueError(
            f"`scale` must be a Python number or None, got {type(scale).__name__}; "
            "multiply `query` by a traced scale instead"
        )
    if not math.isfinite(scale):
        raise ValueError(f"`scale` must be finite, got scale={scale}")
    return float(scale)


def check_implementation(implementation: str | None) -> None:
    """Raise ValueError unless the name is known."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` must be one of {', '.join(IMPLEMENTATIONS)} or None, "
            f"got implementation={implementation!r}"
        )

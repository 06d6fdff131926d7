"""Masks from arrays: rows, dense masks, full and empty ones."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from fgattn_jax.masks import _bits, _fit
from fgattn_jax.masks.slice_mask import SliceMask, take_queries


def normal_order(query_order: Int[Array, "..."] | None, rank: int, num_queries: int) -> Array | None:
    """The order as int32 of rank `rank`; an order of shape [T] is shared by batch and heads.

    Raises:
        ValueError: If it does not hold integers or has neither rank 1 nor `rank`, or not T positions.
    """
    if query_order is None:
        return None
    if not jnp.issubdtype(jnp.result_type(query_order), jnp.integer):
        raise ValueError(f"expected `query_order` to hold integers, got dtype={jnp.result_type(query_order)}")
    order = jnp.asarray(query_order).astype(jnp.int32)
    if order.ndim == 1:
        order = order.reshape((1,) * (rank - 1) + order.shape)
    if order.ndim != rank or order.shape[-1] != num_queries:
        raise ValueError(
            f"expected `query_order` of shape [T] or [B|1, N|1, T] (rank 1 or {rank}) with T={num_queries}, "
            f"got shape={np.shape(query_order)}"
        )
    return order


def _as_bools(array: Bool[Array, "..."], name: str, axes: str) -> Array:
    if not _fit.is_array(array) or array.dtype != np.bool_:
        got = f"dtype={array.dtype}" if _fit.is_array(array) else type(array).__name__
        raise ValueError(f"expected `{name}` to be an array of booleans (True keeps), got {got}; compare with `!= 0`")
    array = jnp.asarray(array)
    if array.ndim == 2:
        return array[None, None]
    if array.ndim < 4:
        raise ValueError(
            f"expected `{name}` of shape [{axes}] (shared by batch and heads) or [B|1, N|1, {axes}], "
            f"got shape={array.shape}; add axes of size 1"
        )
    return array


def from_rows(
    rows: Bool[Array, "... R S"],
    *,
    query_block: int,
    num_queries: int,
    query_order: Int[Array, "..."] | None = None,
) -> SliceMask:
    """A mask from booleans per row and key.

    Args:
        rows: Rank 2 is shared by batch and heads; else `[B|1, N|1, R, S]`, or more with stacked axes in front.
            Row `r` stands for the queries at positions `r * query_block` and on.
        query_block: Queries per slice (`M`): 16, 32, 64 or 128.
        num_queries: Queries (`T`); `R` must be `ceil(T / M)`.
        query_order: Integers of shape [T] or `[B|1, N|1, T]`; see `SliceMask`. Not checked to be a permutation: see
            `SliceMask.check`.

    Raises:
        ValueError: If `rows` are not booleans, or shapes do not fit.
    """
    rows = _as_bools(rows, "rows", "R, S")
    num_keys = rows.shape[-1]
    _fit.check_sizes(query_block, num_queries, num_keys)
    num_rows = -(-num_queries // query_block)
    if rows.shape[-2] != num_rows:
        raise ValueError(
            f"expected `rows` to have R={num_rows} rows for num_queries={num_queries} and query_block={query_block}, "
            f"got R={rows.shape[-2]} in shape={rows.shape}"
        )
    order = normal_order(query_order, rows.ndim - 1, num_queries)
    return SliceMask(_bits.pack_rows(rows), order, query_block=query_block, num_keys=num_keys, num_queries=num_queries)


def from_dense(
    dense: Bool[Array, "... T S"],
    *,
    query_block: int,
    query_order: Int[Array, "..."] | None = None,
    mixed: Literal["keep", "skip", "error"] = "keep",
) -> SliceMask:
    """A mask from booleans per query and key, in the natural query order.

    Args:
        dense: Rank 2 is shared by batch and heads; else `[B|1, N|1, T, S]`, or more with stacked axes in front.
        query_block: Queries per slice (`M`): 16, 32, 64 or 128.
        query_order: Integers of shape [T] or `[B|1, N|1, T]`; see `SliceMask`.
        mixed: What to do with a slice of which only some queries keep the key. "keep" keeps it for the whole slice
            (the mask is a superset of `dense`), "skip" skips it (a subset), "error" raises: the mask is then exactly
            `dense`.

    Raises:
        ValueError: If `dense` is not boolean, if shapes do not fit, for an unknown `mixed`, or with `mixed="error"`
            if a slice is mixed, or if `dense` is traced so that it cannot be known.
    """
    if mixed not in ("keep", "skip", "error"):
        raise ValueError(f'expected `mixed` to be "keep", "skip" or "error", got mixed={mixed!r}')
    dense = _as_bools(dense, "dense", "T, S")
    num_queries, num_keys = dense.shape[-2:]
    _fit.check_sizes(query_block, num_queries, num_keys)
    order = normal_order(query_order, dense.ndim - 1, num_queries)
    by_position = dense if order is None else take_queries(dense, order)
    kept_by_any = _group(by_position, query_block, fill=False).any(axis=-2)
    if mixed == "keep":
        rows = kept_by_any
    else:
        rows = _group(by_position, query_block, fill=True).all(axis=-2)
    if mixed == "error":
        if not _fit.is_concrete(rows, kept_by_any):
            raise ValueError(
                '`from_dense` with mixed="error" reads values: call it outside `jit`, or use "keep" or "skip"'
            )
        differs = np.argwhere(np.asarray(rows) != np.asarray(kept_by_any))
        if differs.size:
            *front, row, key = (int(i) for i in differs[0])
            raise ValueError(
                f"expected the {query_block} queries of every row to keep the same keys, got key={key} kept by only "
                f'some queries of row={row} (batch and head {front}); use mixed="keep" or "skip", or another '
                "`query_order`"
            )
    return from_rows(rows, query_block=query_block, num_queries=num_queries, query_order=order)


def _group(by_position: Bool[Array, "... T S"], query_block: int, *, fill: bool) -> Bool[Array, "... R M S"]:
    num_queries, num_keys = by_position.shape[-2:]
    num_rows = -(-num_queries // query_block)
    padding = [(0, 0)] * (by_position.ndim - 2) + [(0, num_rows * query_block - num_queries), (0, 0)]
    padded = jnp.pad(by_position, padding, constant_values=fill)
    return padded.reshape(*by_position.shape[:-2], num_rows, query_block, num_keys)


def full(
    *,
    query_block: int,
    num_queries: int,
    num_keys: int,
    batch: int = 1,
    num_heads: int = 1,
    query_order: Int[Array, "..."] | None = None,
) -> SliceMask:
    """A mask that keeps every slice; bits past `num_keys` are zero.

    Args:
        query_block: Queries per slice (`M`): 16, 32, 64 or 128.
        num_queries: Queries (`T`).
        num_keys: Keys (`S`).
        batch: Size of the batch axis; 1 is shared by all of the batch.
        num_heads: Size of the head axis; 1 is shared by all heads.
        query_order: Integers of shape [T] or `[B|1, N|1, T]`; see `SliceMask`.

    Raises:
        ValueError: For an unsupported `query_block`, a size below 1 or a `query_order` that does not fit.
    """
    _fit.check_sizes(query_block, num_queries, num_keys)
    words = jnp.asarray(_bits.full_words(num_keys))
    return _same_rows(words, query_block, num_queries, num_keys, batch, num_heads, query_order)


def empty(
    *,
    query_block: int,
    num_queries: int,
    num_keys: int,
    batch: int = 1,
    num_heads: int = 1,
    query_order: Int[Array, "..."] | None = None,
) -> SliceMask:
    """A mask that skips every slice. Arguments and errors are those of `full`."""
    _fit.check_sizes(query_block, num_queries, num_keys)
    words = jnp.zeros(_bits.num_words(num_keys), jnp.uint32)
    return _same_rows(words, query_block, num_queries, num_keys, batch, num_heads, query_order)


def _same_rows(
    words: Array,
    query_block: int,
    num_queries: int,
    num_keys: int,
    batch: int,
    num_heads: int,
    query_order: Array | None,
) -> SliceMask:
    for name, size in (("batch", batch), ("num_heads", num_heads)):
        if size < 1:
            raise ValueError(f"expected `{name}` to be at least 1, got {name}={size}")
    order = normal_order(query_order, 3, num_queries)
    bits = jnp.broadcast_to(words, (batch, num_heads, -(-num_queries // query_block), words.shape[-1]))
    return SliceMask(bits, order, query_block=query_block, num_keys=num_keys, num_queries=num_queries)

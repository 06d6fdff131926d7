"""Masks from rules: local windows, causal order, keys that every query keeps."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, UInt32

from fgattn_jax.masks import _bits, _fit
from fgattn_jax.masks.slice_mask import SliceMask, row_of_query

Align = Literal["start", "end"]


def local_window(
    *,
    before: int,
    after: int,
    query_block: int,
    num_queries: int,
    num_keys: int,
    align: Align = "start",
    query_order: Int[Array, "..."] | None = None,
) -> SliceMask:
    """A mask that lets every query see the keys from `before` places before it to `after` places after it.

    A row keeps a key that any of its queries may see, so the mask is a superset at the borders of the window.

    Args:
        before: Keys before a query's own place, at least 0.
        after: Keys after a query's own place, at least 0.
        query_block: Queries per slice (`M`): 16, 32, 64 or 128.
        num_queries: Queries (`T`).
        num_keys: Keys (`S`).
        align: Which key is at the place of query `t`: key `t` ("start", as in `jax.nn.dot_product_attention`), or key
            `t + S - T` ("end": the last query stands at the last key, as with a cache of earlier keys).
        query_order: Integers of shape [T] or `[B|1, N|1, T]`. Places are those of the natural query order.

    Raises:
        ValueError: If `before` or `after` is negative, for an unknown `align`, or if sizes do not fit.
    """
    for name, number in (("before", before), ("after", after)):
        if number < 0:
            raise ValueError(f"expected `{name}` to be at least 0, got {name}={number}")
    _fit.check_sizes(query_block, num_queries, num_keys)
    place = np.arange(num_queries) + _offset(align, num_queries, num_keys)
    return _from_ranges(place - before, place + after + 1, query_block, num_keys, query_order)


def causal(
    *,
    query_block: int,
    num_queries: int,
    num_keys: int,
    align: Align = "start",
    query_order: Int[Array, "..."] | None = None,
) -> SliceMask:
    """A mask that keeps the keys up to each row's last query: causal at the resolution of slices.

    A row keeps a key if any of its queries may see it, so queries see up to `query_block - 1` keys beyond their own
    place at the diagonal, more with a `query_order` that mixes early and late queries. It is *not* the exact causal
    mask: do not use it where seeing a later key is wrong.

    Args:
        query_block: Queries per slice (`M`): 16, 32, 64 or 128.
        num_queries: Queries (`T`).
        num_keys: Keys (`S`).
        align: Which key is at the place of query `t`: key `t` ("start"), or key `t + S - T` ("end"). With "end" and
            more queries than keys, the first queries see no key, and their rows may be empty.
        query_order: Integers of shape [T] or `[B|1, N|1, T]`. Places are those of the natural query order.

    Raises:
        ValueError: For an unknown `align`, or if sizes do not fit.
    """
    _fit.check_sizes(query_block, num_queries, num_keys)
    place = np.arange(num_queries) + _offset(align, num_queries, num_keys)
    return _from_ranges(np.zeros_like(place), place + 1, query_block, num_keys, query_order)


def keep_keys(
    keys: Bool[Array, "*B S"] | Int[Array, "*B C"],
    *,
    query_block: int,
    num_queries: int,
    num_keys: int,
    query_order: Int[Array, "..."] | None = None,
) -> SliceMask:
    """A mask whose rows all keep the same keys: text tokens, attention sinks. Unite it with another mask.

    Args:
        keys: Booleans of shape [S] or [B, S], or key numbers of shape [C] or [B, C] in any order.
        query_block: Queries per slice (`M`): 16, 32, 64 or 128.
        num_queries: Queries (`T`).
        num_keys: Keys (`S`).
        query_order: Integers of shape [T] or `[B|1, N|1, T]`; use that of the mask to unite with.

    Raises:
        ValueError: If `keys` are neither booleans nor integers, if shapes do not fit, or if a key number is not in
            0..S-1. Under `jit` numbers out of range are dropped.
    """
    _fit.check_sizes(query_block, num_queries, num_keys)
    if not _fit.is_array(keys) or keys.dtype != np.bool_:
        keys = _fit.normal_integers(keys, "keys")
    keys = jnp.asarray(keys)
    if keys.ndim not in (1, 2):
        raise ValueError(f"expected `keys` of rank 1 (shared by the batch) or 2 [B, ...], got shape={keys.shape}")
    if keys.dtype == jnp.bool_:
        if keys.shape[-1] != num_keys:
            raise ValueError(f"expected boolean `keys` to have S=num_keys={num_keys}, got shape={keys.shape}")
        kept = jnp.atleast_2d(keys)
    else:
        kept = _kept_by_number(jnp.atleast_2d(keys), num_keys)
    return _shared_by_rows(kept, query_block, num_queries, num_keys, query_order)


def keep_lengths(
    lengths: Int[Array, "*B"],
    *,
    query_block: int,
    num_queries: int,
    num_keys: int,
    query_order: Int[Array, "..."] | None = None,
) -> SliceMask:
    """A mask whose rows all keep the first keys of each sequence of a padded batch. Intersect it with another mask.

    Args:
        lengths: Keys that are not padding, of shape [B], or one number for all of the batch.
        query_block: Queries per slice (`M`): 16, 32, 64 or 128.
        num_queries: Queries (`T`).
        num_keys: Keys (`S`).
        query_order: Integers of shape [T] or `[B|1, N|1, T]`; use that of the mask to intersect with.

    Raises:
        ValueError: If `lengths` are not integers of rank 0 or 1, or if a length is not in 0..S. Under `jit` a length
            out of range is cut.
    """
    _fit.check_sizes(query_block, num_queries, num_keys)
    lengths = _fit.normal_integers(lengths, "lengths")
    if lengths.ndim > 1:
        raise ValueError(f"expected `lengths` of shape [B], or one number, got shape={lengths.shape}")
    if _fit.is_concrete(lengths):
        wrong = np.asarray(lengths)[(np.asarray(lengths) < 0) | (np.asarray(lengths) > num_keys)]
        if wrong.size:
            raise ValueError(f"expected `lengths` from 0 to num_keys={num_keys}, got length={wrong[0]}")
    kept = jnp.arange(num_keys) < jnp.atleast_1d(lengths)[:, None]
    return _shared_by_rows(kept, query_block, num_queries, num_keys, query_order)


def _offset(align: Align, num_queries: int, num_keys: int) -> int:
    if align not in ("start", "end"):
        raise ValueError(f'expected `align` to be "start" or "end", got align={align!r}')
    return num_keys - num_queries if align == "end" else 0


def _from_ranges(
    first: np.ndarray, stop: np.ndarray, query_block: int, num_keys: int, query_order: Int[Array, "..."] | None
) -> SliceMask:
    """The mask whose rows keep the union of their queries' ranges `first[t]..stop[t]-1`; no [T, S] array on the way."""
    num_queries = first.shape[0]
    order = _fit.normal_order(query_order, (1, 1), num_queries)
    rows = row_of_query(order, query_block, num_queries, rank=3)
    first = np.clip(first, 0, num_keys)
    stop = np.maximum(
        np.clip(stop, 0, num_keys), first
    )  # a range outside the keys is empty: it opens and closes at once
    bits = _cover(rows, first, stop, -(-num_queries // query_block), num_keys)
    return SliceMask(bits, order, query_block=query_block, num_keys=num_keys, num_queries=num_queries)


@functools.partial(jax.jit, static_argnums=(3, 4), inline=True)
def _cover(
    rows: Int32[Array, "B N T"], first: Int[Array, " T"], stop: Int[Array, " T"], num_rows: int, num_keys: int
) -> UInt32[Array, "B N R W"]:
    def cover_head(row: Int32[Array, " T"]) -> UInt32[Array, "R W"]:
        opened = jnp.zeros((num_rows, num_keys + 1), jnp.int32).at[row, first].add(1).at[row, stop].add(-1)
        return _bits.pack_rows(jnp.cumsum(opened, axis=-1)[:, :num_keys] > 0)

    return jax.vmap(jax.vmap(cover_head))(rows)


def _kept_by_number(keys: Int[Array, "B C"], num_keys: int) -> Bool[Array, "B S"]:
    inside = (keys >= 0) & (keys < num_keys)
    if _fit.is_concrete(keys):
        wrong = np.asarray(keys)[~np.asarray(inside)]
        if wrong.size:
            raise ValueError(f"expected `keys` from 0 to num_keys-1={num_keys - 1}, got key={wrong[0]}")
    # A place behind the last key takes what is out of range: negative numbers would count from the end.
    place = jnp.where(inside, keys, num_keys)
    kept = jnp.zeros((keys.shape[0], num_keys + 1), bool)
    return kept.at[jnp.arange(keys.shape[0])[:, None], place].set(True)[:, :num_keys]


def _shared_by_rows(
    kept: Bool[Array, "B S"],
    query_block: int,
    num_queries: int,
    num_keys: int,
    query_order: Int[Array, "..."] | None,
) -> SliceMask:
    words = _bits.pack_rows(kept)[:, None, None, :]
    bits = jnp.broadcast_to(words, (words.shape[0], 1, -(-num_queries // query_block), words.shape[-1]))
    order = _fit.normal_order(query_order, (words.shape[0], 1), num_queries)
    return SliceMask(bits, order, query_block=query_block, num_keys=num_keys, num_queries=num_queries)

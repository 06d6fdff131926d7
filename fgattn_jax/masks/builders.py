"""Masks from arrays: rows, dense masks, indices, blocks; full and empty ones."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from fgattn_jax.masks import _bits, _fit
from fgattn_jax.masks.slice_mask import SliceMask, take_queries


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
    rows = _fit.normal_bools(rows, "rows", "R, S")
    num_keys = rows.shape[-1]
    _fit.check_sizes(query_block, num_queries, num_keys)
    num_rows = -(-num_queries // query_block)
    if rows.shape[-2] != num_rows:
        raise ValueError(
            f"expected `rows` to have R={num_rows} rows for num_queries={num_queries} and query_block={query_block}, "
            f"got R={rows.shape[-2]} in shape={rows.shape}"
        )
    order = _fit.normal_order(query_order, rows.shape[:-2], num_queries)
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
    dense = _fit.normal_bools(dense, "dense", "T, S")
    num_queries, num_keys = dense.shape[-2:]
    _fit.check_sizes(query_block, num_queries, num_keys)
    order = _fit.normal_order(query_order, dense.shape[:-2], num_queries)
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


def from_indices(
    indices: Int[Array, "... R C"],
    counts: Int[Array, "... R"] | None = None,
    *,
    query_block: int,
    num_queries: int,
    num_keys: int,
    query_order: Int[Array, "..."] | None = None,
) -> SliceMask:
    """A mask from the numbers of the kept keys of every row, as other libraries hand them over.

    Args:
        indices: Key numbers in any order; the same key twice is kept once. Rank 2 is shared by batch and heads; else
            `[B|1, N|1, R, C]`, or more with stacked axes in front.
        counts: How many of the `C` numbers of each row are meant; the rest is not looked at. `None` means all.
        query_block: Queries per slice (`M`): 16, 32, 64 or 128.
        num_queries: Queries (`T`); `R` must be `ceil(T / M)`.
        num_keys: Keys (`S`).
        query_order: Integers of shape [T] or `[B|1, N|1, T]`; see `SliceMask`.

    Raises:
        ValueError: If shapes or dtypes do not fit, or if a meant number is not in 0..S-1 or a count not in 0..C.
            Under `jit` values cannot be checked: numbers out of range are dropped, counts out of range cut.
    """
    _fit.check_sizes(query_block, num_queries, num_keys)
    indices = _fit.normal_integers(indices, "indices")
    counts = None if counts is None else _fit.normal_integers(counts, "counts")
    if indices.ndim == 2:
        indices = indices[None, None]
        counts = None if counts is None else counts.reshape((1,) * (3 - counts.ndim) + counts.shape)
    num_rows = -(-num_queries // query_block)
    if indices.ndim < 4 or indices.shape[-2] != num_rows:
        raise ValueError(
            f"expected `indices` of shape [R, C] or [B|1, N|1, R, C] with R={num_rows} for num_queries={num_queries} "
            f"and query_block={query_block}, got shape={indices.shape}"
        )
    capacity = indices.shape[-1]
    if counts is not None and counts.shape != indices.shape[:-1]:
        raise ValueError(
            f"expected `counts` of shape={indices.shape[:-1]} for `indices` of shape={indices.shape}, "
            f"got shape={counts.shape}"
        )
    _check_index_values(indices, counts, num_keys)
    meant = jnp.ones(indices.shape, bool) if counts is None else jnp.arange(capacity) < counts[..., None]
    # A place behind the last key takes what is not meant: negative numbers would count from the end.
    place = jnp.where(meant & (indices >= 0) & (indices < num_keys), indices, num_keys).reshape(-1, capacity)
    line = jnp.arange(place.shape[0])[:, None]
    rows = jnp.zeros((place.shape[0], num_keys + 1), bool).at[line, place].set(True)[:, :num_keys]
    return from_rows(
        rows.reshape(*indices.shape[:-1], num_keys),
        query_block=query_block,
        num_queries=num_queries,
        query_order=query_order,
    )


def _check_index_values(indices: Array, counts: Array | None, num_keys: int) -> None:
    if not _fit.is_concrete(indices) or (counts is not None and not _fit.is_concrete(counts)):
        return
    numbers = np.asarray(indices)
    meant = np.ones(numbers.shape, bool)
    if counts is not None:
        lengths = np.asarray(counts)
        wrong = np.argwhere((lengths < 0) | (lengths > numbers.shape[-1]))
        if wrong.size:
            place = tuple(int(i) for i in wrong[0])
            raise ValueError(
                f"expected `counts` from 0 to C={numbers.shape[-1]}, got count={lengths[place]} at {list(place)} "
                "(batch, head, row)"
            )
        meant = np.arange(numbers.shape[-1]) < lengths[..., None]
    wrong = np.argwhere(meant & ((numbers < 0) | (numbers >= num_keys)))
    if wrong.size:
        place = tuple(int(i) for i in wrong[0])
        raise ValueError(
            f"expected `indices` from 0 to num_keys-1={num_keys - 1}, got key={numbers[place]} at {list(place)} "
            "(batch, head, row, place); pass `counts` if rows are filled up"
        )


def from_blocks(
    blocks: Bool[Array, "... U V"],
    *,
    block_sizes: tuple[int, int],
    query_block: int,
    num_queries: int,
    num_keys: int,
    query_order: Int[Array, "..."] | None = None,
) -> SliceMask:
    """A mask from a block mask, as block-sparse methods make them.

    Args:
        blocks: Booleans per block, `U = ceil(T / bq)`, `V = ceil(S / bk)`. Rank 2 is shared by batch and heads; else
            `[B|1, N|1, U, V]`, or more with stacked axes in front.
        block_sizes: Queries and keys per block, `(bq, bk)`. `bq` must be a multiple of `query_block`, so that the mask
            is exactly the block mask, or `query_block` a multiple of `bq`: a row then keeps what any of its blocks
            keeps, a superset. `bk` is any number.
        query_block: Queries per slice (`M`): 16, 32, 64 or 128.
        num_queries: Queries (`T`).
        num_keys: Keys (`S`).
        query_order: Integers of shape [T] or `[B|1, N|1, T]`; blocks of queries are then blocks of positions.

    Raises:
        ValueError: If `blocks` are not booleans, or sizes do not fit.
    """
    _fit.check_sizes(query_block, num_queries, num_keys)
    blocks = _fit.normal_bools(blocks, "blocks", "U, V")
    block_queries, block_keys = block_sizes
    if block_queries < 1 or (block_queries % query_block and query_block % block_queries):
        raise ValueError(
            f"expected the queries per block to be a multiple or a divisor of query_block={query_block}, "
            f"got block_sizes={block_sizes}"
        )
    if block_keys < 1:
        raise ValueError(f"expected at least 1 key per block, got block_sizes={block_sizes}")
    expected = (-(-num_queries // block_queries), -(-num_keys // block_keys))
    if blocks.shape[-2:] != expected:
        raise ValueError(
            f"expected `blocks` to be {expected} (queries, keys) for block_sizes={block_sizes}, "
            f"num_queries={num_queries} and num_keys={num_keys}, got shape={blocks.shape}"
        )
    if block_queries < query_block:
        blocks = _group(blocks, query_block // block_queries, fill=False).any(axis=-2)
    # Words before repeating: one row of keys per block of queries, not per row.
    words = _bits.pack_rows(jnp.repeat(blocks, block_keys, axis=-1)[..., :num_keys])
    num_rows = -(-num_queries // query_block)
    repeats = max(1, block_queries // query_block)
    bits = jnp.repeat(words, repeats, axis=-2)[..., :num_rows, :]
    order = _fit.normal_order(query_order, bits.shape[:-2], num_queries)
    return SliceMask(bits, order, query_block=query_block, num_keys=num_keys, num_queries=num_queries)


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
    order = _fit.normal_order(query_order, (batch, num_heads), num_queries)
    bits = jnp.broadcast_to(words, (batch, num_heads, -(-num_queries // query_block), words.shape[-1]))
    return SliceMask(bits, order, query_block=query_block, num_keys=num_keys, num_queries=num_queries)

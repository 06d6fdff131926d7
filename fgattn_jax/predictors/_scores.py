"""Scores of every (row, key) pair in chunks of rows, turned into mask bits before the next chunk starts."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt32

from fgattn_jax.masks._bits import pack_rows
from fgattn_jax.predictors import _hopper, _select
from fgattn_jax.predictors.budget import Budget

Statistic = Literal["peak", "mass", "mean"]
"""Largest, sum, or mean of the probabilities of a row's queries."""

CPU_CHUNK_BYTES = 4 << 20
"""Scores held at once on a CPU: a share of the last-level cache of common machines."""
DEVICE_CHUNK_BYTES = 256 << 20
"""Scores held at once elsewhere: enough work for one launch to fill the device."""


@functools.partial(jax.jit, static_argnames=("query_block", "statistic", "budget", "chunk_bytes"))
def predict_bits(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    lse: Float32[Array, "B N T"] | None,
    query_order: Int32[Array, "B N T"] | None,
    scale: Float32[Array, ""],
    row_queries: Int32[Array, " R"],
    *,
    query_block: int,
    statistic: Statistic,
    budget: Budget,
    chunk_bytes: int | None,
) -> UInt32[Array, "B N R W"]:
    """Bits of the keys that `budget` keeps of the scores of every row.

    `query_order` has leading axes of length 1 or `B`, `N`. `row_queries` are the weights of the rows in the mean that
    the per-head floor is a share of: the queries that each row stands for.

    Heads run one after the other, rows of a head in chunks whose `[rows * query_block, S]` scores fill at most
    `chunk_bytes` (one row is split further where it alone is more). None for `chunk_bytes` takes the platform's own.
    """
    bits = functools.partial(_bits_of_heads, query_block, statistic, budget)

    # Bits have no derivative: without this, reverse mode would keep the scores of every chunk.
    query, key, lse, scale = jax.lax.stop_gradient((query, key, lse, scale))
    operands = (query, key, lse, query_order, scale, row_queries)
    branches: dict[str, Callable] = {"cpu": functools.partial(bits, chunk_bytes or CPU_CHUNK_BYTES)}
    kernel = _hopper.exact_bits(query, key, lse, statistic, budget, query_block)
    if kernel is not None:
        branches["cuda"] = lambda query, key, lse, order, scale, _: kernel(query, key, lse, order, scale)
    other = functools.partial(bits, chunk_bytes or DEVICE_CHUNK_BYTES)
    return jax.lax.platform_dependent(*operands, **branches, default=other)


def _bits_of_heads(query_block, statistic, budget, chunk_bytes, query, key, lse, query_order, scale, row_queries):
    batch, num_queries, num_heads, _ = query.shape
    _, num_keys, num_kv_heads, _ = key.shape
    num_rows = -(-num_queries // query_block)
    rows_per_chunk = max(1, min(num_rows, chunk_bytes // (4 * query_block * num_keys)))
    num_chunks = -(-num_rows // rows_per_chunk)
    rows_per_chunk = -(-num_rows // num_chunks)  # chunks of nearly equal length: the last one is not all padding
    parts = _parts_of_row(query_block, num_keys, chunk_bytes)
    thresholds = budget.thresholds(num_heads)

    def bits_of_head(head):
        b, n = head // num_heads, head % num_heads
        head_query = query[b, :, n]  # [T, H]
        head_key = key[b, :, n // (num_heads // num_kv_heads)]  # [S, H]
        order = None if query_order is None else query_order[_axis(b, query_order, 0), _axis(n, query_order, 1)]

        def scores(chunk):
            positions = chunk * (rows_per_chunk * query_block) + jnp.arange(rows_per_chunk * query_block)
            valid = positions < num_queries
            positions = jnp.minimum(positions, num_queries - 1)
            numbers = positions if order is None else order[positions]
            rows = head_query[numbers].reshape(rows_per_chunk, query_block, -1)  # [rows, M, H]
            valid = valid.reshape(rows_per_chunk, query_block)
            row_lse = None if lse is None else lse[b, n, numbers].reshape(rows_per_chunk, query_block)
            return _row_scores(rows, head_key, row_lse, valid, scale, statistic, parts)

        chunks = jnp.arange(num_chunks)
        floor = None
        threshold = None if thresholds is None else jnp.asarray(thresholds, jnp.float32)[n]
        if budget.head_floor > 0:
            counts = jax.lax.map(lambda chunk: _select.rule_counts(scores(chunk), budget, threshold), chunks)
            floor = _head_floor(counts.reshape(-1)[:num_rows], row_queries, budget.head_floor)
        words = jax.lax.map(lambda chunk: pack_rows(_select.select(scores(chunk), budget, floor, threshold)), chunks)
        return words.reshape(num_chunks * rows_per_chunk, -1)[:num_rows]

    heads = jnp.arange(batch * num_heads)
    bits = jax.lax.map(bits_of_head, heads)  # [B * N, R, W]
    return bits.reshape(batch, num_heads, num_rows, -1)


def _axis(index, array, axis):
    """`index`, or 0 on an axis of length 1 that stands for all."""
    return index if array.shape[axis] > 1 else 0


def _parts_of_row(query_block, num_keys, chunk_bytes):
    """Parts (a divisor of `query_block`) that one row is scored in, so that a part fits `chunk_bytes`."""
    parts = 1
    while parts * 2 <= query_block and query_block % (parts * 2) == 0:
        if 4 * (query_block // parts) * num_keys <= chunk_bytes:
            break
        parts *= 2
    return parts


def _head_floor(counts, row_queries, share):
    """`floor(share * mean of counts over the queries of the head)`."""
    mean = jnp.sum(counts.astype(jnp.float32) * row_queries) / jnp.sum(row_queries)
    return jnp.floor(share * mean).astype(jnp.int32)


def _row_scores(
    rows: Float[Array, "R M H"],
    key: Float[Array, "S H"],
    lse: Float32[Array, "R M"] | None,
    valid,
    scale,
    statistic: Statistic,
    parts: int,
) -> Float32[Array, "R S"]:
    """Statistic over the `M` queries of their probabilities; queries that are not `valid` count as nothing."""
    num_rows, query_block, _ = rows.shape
    if lse is not None:
        # An empty row of a masked call has an LSE of -inf: its probabilities are zero, not exp(+inf).
        valid = valid & (lse > -jnp.inf)

    if parts == 1:
        total = _part_scores(rows, key, lse, valid, scale, statistic)
    else:

        def split(array):  # [rows, M, ...] -> [parts, rows, M / parts, ...]
            return jnp.moveaxis(array.reshape(num_rows, parts, query_block // parts, *array.shape[2:]), 1, 0)

        def add(total, part):
            part_rows, part_lse, part_valid = part
            scores = _part_scores(part_rows, key, part_lse, part_valid, scale, statistic)
            return (_maximum(total, scores) if statistic == "peak" else total + scores), None

        start = jnp.zeros((num_rows, key.shape[0]), jnp.float32)
        part_lse = None if lse is None else split(lse)
        total, _ = jax.lax.scan(add, start, (split(rows), part_lse, split(valid)))
    if statistic == "mean":
        total = total / jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
    return total


def _part_scores(rows, key, lse, valid, scale, statistic):
    """Largest or summed probabilities of some queries of every row: f32[R, S]."""
    logits = jnp.einsum(
        "rmh,sh->rms", rows, key, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    logits = logits * scale  # [rows, m, S]
    if lse is None:
        lse = jax.nn.logsumexp(logits, axis=-1)
    logits = jnp.where(valid[..., None], logits - lse[..., None], -jnp.inf)
    if statistic == "peak":
        # XLA's CPU maximum may drop a NaN; the LSE of a query has it if any of its logits does.
        broken = jnp.any(valid & jnp.isnan(lse), axis=1, keepdims=True)
        return jnp.where(broken, jnp.nan, jnp.exp(jnp.max(logits, axis=1)))
    return jnp.sum(jnp.exp(logits), axis=1)


def _maximum(a, b):
    """The larger one, NaN if either is."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)

"""Slice-sparse attention in plain XLA operations: bits -> kept keys -> gathered tiles -> online softmax.

    rows sorted by kept count, `rows_per_step` at a time          (schedule)
      | while keys are left
      |   ranks j .. j+C-1  -> key numbers   [P, C]                (select_keys)
      |   gather            -> K, V tiles    [P, C, H]
      |   scores            -> S = Q K^T     [P, M, C]
      |   running max, sum and output, as in flash attention
      v
    tiles [G, M, H] -> [B, T, N, H]                                (RowLayout.place)

Work follows the number of kept slices; memory holds one step's tiles, never a `[T, S]` array. A skipped key is never
read: ranks past a row's count read the row's own first kept key and are zeroed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from fgattn_jax.implementations._gather import RowLayout, gather_rows, running_counts, schedule, select_keys, vary_like
from fgattn_jax.implementations.xla_config import XlaConfig, default_config


class Gradients(NamedTuple):
    """Cotangents of query, key and value, in their shapes and dtypes."""

    query: Array
    key: Array
    value: Array


def _layout(query: Array, key: Array, query_block: int) -> RowLayout:
    batch, num_queries, num_heads, _ = query.shape
    return RowLayout(batch, num_queries, key.shape[1], num_heads, key.shape[2], query_block)


class _Tiles(NamedTuple):
    """One step's gathered keys, `[P, C, H]` each, their place in the flat list, and which entries are real."""

    key: Array
    value: Array
    place: Array
    kept: Array


class _Step:
    """Rows of one step and how to gather their kept keys."""

    def __init__(self, layout: RowLayout, rows: Array, counts: Array, bits: Array, flat: tuple[Array, Array]):
        self.layout = layout
        self.rows = jnp.minimum(rows, layout.num_rows - 1)
        self.counts = jnp.where(rows < layout.num_rows, jnp.take(counts, self.rows, mode="clip"), 0)
        self.words = layout.mask_words(bits, self.rows)
        self.cumulative = running_counts(self.words)
        self.first = select_keys(self.words, self.cumulative, jnp.zeros((1,), jnp.int32))
        self.key, self.value = flat

    def tiles(self, start: Array, width: int, dtype: jnp.dtype) -> _Tiles:
        """Gather the kept keys with ranks `start .. start + width - 1`."""
        ranks = start + jnp.arange(width, dtype=jnp.int32)
        keys = select_keys(self.words, self.cumulative, ranks)
        kept = ranks < self.counts[:, None]
        # An entry past the count reads the row's first kept key, a key that this row may read in any case, and is then
        # zeroed: 0 * inf would be NaN, and a row without keys has no first one.
        keys = jnp.minimum(jnp.where(kept, keys, self.first), self.layout.num_keys - 1)
        index = self.layout.key_index(self.rows, keys)
        real = kept[..., None]
        key = jnp.where(real, gather_rows(self.key, index, dtype), 0)
        value = jnp.where(real, gather_rows(self.value, index, dtype), 0)
        return _Tiles(key, value, index, kept)

    def loop(self, config: XlaConfig, body, carry):
        """Run `body(start, carry)` over all kept keys, `config.keys_per_step` at a time."""
        width = config.keys_per_step
        num_chunks = (jnp.max(self.counts) + (width - 1)) // width

        # Counts chunks, not keys: with a constant mask of one-key rows, XLA of jaxlib 0.11.2 drops a loop
        # `for start in range(0, 1, 64)` as empty (docs/notes/dropped_loop.md).
        def chunk(c):
            return c[0] + 1, body(c[0] * width, c[1])

        return jax.lax.while_loop(lambda c: c[0] < num_chunks, chunk, (jnp.zeros_like(num_chunks), carry))[1]


def _products(dtype: jnp.dtype):
    """`einsum` with float32 results; float32 operands are multiplied in full precision on every device."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)


def _forward(query, key, value, bits, query_order, *, scale: float, query_block: int, config: XlaConfig):
    layout = _layout(query, key, query_block)
    width = query.shape[-1]
    compute = jnp.dtype(jnp.float32) if config.upcast else query.dtype
    einsum = _products(compute)
    flat_query, flat_key, flat_value = (x.reshape(-1, width) for x in (query, key, value))
    counts = layout.counts(bits)
    steps, slots = schedule(counts, config.rows_per_step)

    def run_step(carry, rows):
        step = _Step(layout, rows, counts, bits, (flat_key, flat_value))
        index, _ = layout.query_index(step.rows, query_order)
        tile_query = gather_rows(flat_query, index, compute)

        def chunk(start, carry):
            running_max, total, output = carry
            tiles = step.tiles(start, config.keys_per_step, compute)
            scores = einsum("pmh,pch->pmc", tile_query, tiles.key) * scale
            scores = jnp.where(tiles.kept[:, None], scores, -jnp.inf)
            new_max = jnp.maximum(running_max, jnp.max(scores, axis=-1))
            shift = jnp.where(new_max == -jnp.inf, 0.0, new_max)  # -inf - -inf would be NaN
            weights = jnp.exp(scores - shift[..., None])
            rescale = jnp.exp(running_max - shift)
            total = total * rescale + jnp.sum(weights, axis=-1)
            product = einsum("pmc,pch->pmh", weights.astype(compute), tiles.value)
            return new_max, total, output * rescale[..., None] + product

        zero = vary_like(jnp.zeros(index.shape, jnp.float32), flat_query, flat_key, flat_value, step.counts)
        empty = (zero - jnp.inf, zero, vary_like(jnp.zeros((*index.shape, width), jnp.float32), zero))
        running_max, total, output = step.loop(config, chunk, empty)
        safe = jnp.where(total > 0, total, 1.0)
        lse = jnp.where(total > 0, running_max + jnp.log(safe), -jnp.inf)
        # `total` is NaN where a kept key is: that must show.
        lse = jnp.where(jnp.isnan(total), total, lse)
        return carry, ((output / safe[..., None]).astype(query.dtype), lse)

    _, (tiles, lse) = jax.lax.scan(run_step, None, steps)
    place = layout.place(slots, query_order)  # [B, N, T]
    output = jnp.take(tiles.reshape(-1, width), place.transpose(0, 2, 1), axis=0, mode="clip")
    return output, jnp.take(lse.reshape(-1), place, mode="clip")


def _backward(
    query, key, value, bits, query_order, output, lse, d_output, d_lse, *, scale, query_block, config: XlaConfig
) -> Gradients:
    layout = _layout(query, key, query_block)
    width = query.shape[-1]
    compute = jnp.dtype(jnp.float32) if config.upcast else query.dtype
    einsum = _products(compute)
    flat_query, flat_key, flat_value, flat_d_output = (x.reshape(-1, width) for x in (query, key, value, d_output))
    # d scores = p * (dO.v - delta), delta = dO.o - d lse
    delta = jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), axis=-1) - d_lse.transpose(0, 2, 1)
    flat_delta, flat_lse = delta.reshape(-1), lse.transpose(0, 2, 1).reshape(-1)
    counts = layout.counts(bits)
    steps, slots = schedule(counts, config.rows_per_step)

    def run_step(carry, rows):
        step = _Step(layout, rows, counts, bits, (flat_key, flat_value))
        index, exists = layout.query_index(step.rows, query_order)
        real = exists & (step.counts > 0)[:, None]
        tile_query = gather_rows(flat_query, index, compute)
        tile_d_output = gather_rows(flat_d_output, index, compute)
        tile_lse = jnp.take(flat_lse, index, mode="clip")
        tile_delta = jnp.take(flat_delta, index, mode="clip")

        def chunk(start, carry):
            d_query, d_key, d_value = carry
            tiles = step.tiles(start, config.keys_per_step, compute)
            scores = einsum("pmh,pch->pmc", tile_query, tiles.key) * scale
            shown = tiles.kept[:, None] & real[..., None]
            weights = jnp.where(shown, jnp.exp(scores - tile_lse[..., None]), 0.0)
            d_weights = einsum("pmh,pch->pmc", tile_d_output, tiles.value)
            d_scores = jnp.where(shown, weights * (d_weights - tile_delta[..., None]), 0.0).astype(compute)
            d_query = d_query + einsum("pmc,pch->pmh", d_scores, tiles.key)
            # Entries past the count add exact zeros to a key of their own row.
            new_key = einsum("pmc,pmh->pch", d_scores, tile_query)
            new_value = einsum("pmc,pmh->pch", weights.astype(compute), tile_d_output)
            where = tiles.place.reshape(-1)
            d_key = d_key.at[where].add(new_key.reshape(-1, width), mode="drop")
            d_value = d_value.at[where].add(new_value.reshape(-1, width), mode="drop")
            return d_query, d_key, d_value

        d_query = vary_like(jnp.zeros((*index.shape, width), jnp.float32), *carry)
        d_query, *carry = step.loop(config, chunk, (d_query, *carry))
        return tuple(carry), (d_query * scale).astype(query.dtype)

    inputs = (flat_query, flat_key, flat_value, flat_d_output, flat_lse, flat_delta, counts)
    zeros = vary_like(jnp.zeros(flat_key.shape, jnp.float32), *inputs)
    (d_key, d_value), tiles = jax.lax.scan(run_step, (zeros, zeros), steps)
    place = layout.place(slots, query_order)
    d_query = jnp.take(tiles.reshape(-1, width), place.transpose(0, 2, 1), axis=0, mode="clip")
    d_key = (d_key * scale).astype(key.dtype).reshape(key.shape)
    return Gradients(d_query, d_key, d_value.astype(value.dtype).reshape(value.shape))


def _per_platform(function, query_block: int):
    """Pick the config where the program runs, not where it is traced."""

    def run(*arrays, **static):
        cpu = functools.partial(function, config=default_config("cpu", query_block), **static)
        other = functools.partial(function, config=default_config("accelerator", query_block), **static)
        return jax.lax.platform_dependent(*arrays, cpu=cpu, default=other)

    return run


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    bits: UInt32[Array, "b n R W"],
    query_order: Int32[Array, "b n T"] | None,
    *,
    scale: float,
    query_block: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Masked attention and its float32 log-sum-exp (natural log).

    Args are checked by the caller. Empty rows give output 0 and LSE -inf.
    """
    run = _per_platform(_forward, query_block)
    return run(query, key, value, bits, query_order, scale=scale, query_block=query_block)


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    bits: UInt32[Array, "b n R W"],
    query_order: Int32[Array, "b n T"] | None,
    output: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    d_output: Float[Array, "B T N H"],
    d_lse: Float[Array, "B N T"],
    *,
    scale: float,
    query_block: int,
) -> Gradients:
    """Gradients from the saved output and LSE: probabilities are recomputed from gathered tiles.

    `d_lse` is the cotangent of the LSE. Key and value gradients are summed in float32; on GPUs the order of these
    sums (atomic adds) is not fixed.
    """
    run = _per_platform(_backward, query_block)
    arrays = (query, key, value, bits, query_order, output, lse, d_output, d_lse)
    return run(*arrays, scale=scale, query_block=query_block)

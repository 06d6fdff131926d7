"""Forward attention over a slice mask on Hopper, written in Pallas (FG-Attn, arXiv 2509.16518, section 4).

    mask bits, ranks of groups          K, V                       Q (through query_order)
          |                              |                          |
      [gather] 2 warpgroups --tiles of K and V, in stages--> [multiply] 2 warpgroups --> O, LSE

The grid is persistent: a block takes rows of the mask from one counter until none is left, and all its warpgroups walk
through the same rows. Gathering warpgroups draw the next row's number while they do this one, and leave it beside the
row's last stage. A row of n kept keys has t = max(1, ceil(n / tile_keys)) tiles and t + 1 stages: stage j holds the
keys of tile j and the values of tile j - 1, for that is what step j reads:

    multiply   S(j) = Q K(j)^T  and  O += P(j-1) V(j-1)  are started together; while the tensor cores finish the second
               and serve the other warpgroup, S(j) becomes P(j). Each warpgroup does 64 queries.
    gather     finds the key numbers of the next tiles in the bits while the copies of this stage fly; nobody waits for
               copies but those who read them: copies themselves arrive at the barrier `landed`.

With 128 queries per slice both halves of a row share the tiles, and each gathering warpgroup copies half of every tile.
With 64 queries a block works on two rows, each with one warpgroup of either kind and its own stages (a `line`).

The first tile of a row is the one that is not full: its missing keys stand at its front, as zeros, and their scores are
set to -inf. All later steps need no mask.

Weights are 2^(s - m). The reference m is the maximum of the row's first tile; later tiles are not searched for theirs.
What a thread's weights of a tile sum up to shows whether a score stood too far above the reference; then the tile is
computed once more with a higher one.

barrier   arrivals                                 who waits, for what
landed    every copying thread, by its copies      multiply: a stage has landed
freed     every multiplying warp                   gather: S has been computed from the keys, O from the values
(named)   barrier 1 + warpgroup, its 128 threads   multiply: Q has landed; Q has been read; is there too high a score?
(named)   barrier 8, threads of both warpgroups    gather, 128 queries: the next row's number is in shared memory

Shared memory of a block, for H = 128 and M = 128: Q 32 KiB, three stages of 64 KiB; the rest is barriers and numbers of
rows.
`config.KernelConfig.shared_bytes` counts it.

The caller guarantees the shapes of `attention.forward`. Whatever stands in mask, work order and query order, nothing is
read or written out of bounds.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fgattn_jax.pallas_kernels.config import THREADS, KernelConfig
from fgattn_jax.pallas_kernels.device import gather, work_counter
from fgattn_jax.pallas_kernels.device.barriers import Barriers

_LOG2E = math.log2(math.e)
_ACCUMULATOR = plgpu.Layout.WGMMA
_PART = 64  # queries of one multiplying warpgroup

# The reference of a row that has seen no score above -inf: so far below any that comes that its weight is seen to be
# too high, whatever the scale.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static facts of a call: sizes as in `attention.forward`, and how the kernel runs it."""

    batch: int
    num_queries: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_block: int
    scale: float
    dtype: Any
    has_order: bool
    num_blocks: int
    config: KernelConfig
    interpret: bool

    @property
    def num_rows(self) -> int:
        """Rows of the mask of one head."""
        return -(-self.num_queries // self.query_block)

    @property
    def num_items(self) -> int:
        """Rows of the mask in all."""
        return self.batch * self.num_heads * self.num_rows

    @property
    def lines(self) -> int:
        """Rows that a block works on at the same time."""
        return 2 * _PART // self.query_block

    @property
    def parts(self) -> int:
        """Warpgroups of each kind that work on one row."""
        return self.query_block // _PART

    @property
    def num_lines(self) -> int:
        """Lines of all blocks: so many rows are under way at the same time."""
        return self.num_blocks * self.lines

    @property
    def rows_by_head(self) -> int:
        """Rows of each head that are done head by head; the others come last, the heads' shortest ones together."""
        return max(0, self.num_rows - -(-self.num_lines // (self.batch * self.num_heads)))

    @property
    def barriers(self) -> Barriers:
        """One of each kind for every stage of every line."""
        return Barriers(self.lines * self.config.stages, self.parts, self.parts, self.interpret)

    @property
    def most_weight(self) -> float:
        """The most a weight may be: float16 ends at 65504, bfloat16 leaves room for sums and outputs in float32."""
        return 2.0**15 if self.dtype == jnp.float16 else 2.0**32


def make_kernel(problem: Problem):
    """The kernel as a function of `(query, key, value, bits, starts, work_order[, query_order])`: output and LSE."""
    p = problem
    tiles = (p.lines * p.config.stages, p.config.tile_keys, p.head_dim)
    results = [
        jax.ShapeDtypeStruct((p.batch, p.num_queries, p.num_heads, p.head_dim), p.dtype),
        jax.ShapeDtypeStruct((p.batch, p.num_heads, p.num_queries), jnp.float32),
    ]
    shared = functools.partial(plgpu.SMEM, dtype=p.dtype, transforms=gather.TILE)
    # The interpreter cannot multiply with weights in registers.
    weights = [shared((2, _PART, p.config.tile_keys))] if p.interpret else []
    return plgpu.kernel(
        functools.partial(_body, p),
        out_type=results,
        grid=(p.num_blocks,),
        grid_names=("block",),
        num_threads=THREADS // 128,
        thread_name="warpgroup",
        scratch_types=[
            shared((2, _PART, p.head_dim)),
            shared(tiles),
            shared(tiles),
            *weights,
            # Numbers of rows on their way: two for the mail of each line, one note for each stage.
            plgpu.SMEM((p.lines * (2 + p.config.stages),), jnp.int32),
            *p.barriers.scratch(),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # All barriers that are needed stand in the code.
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        ),
    )


def _body(p: Problem, *refs) -> None:
    num_inputs = 7 if p.has_order else 6
    inputs, (output, lse, queries, keys, values, *rest) = refs[:num_inputs], refs[num_inputs:]
    weights = rest.pop(0) if p.interpret else None
    items, *barriers = rest
    # One for the whole grid; Pallas makes semaphores 0 before every call.
    counter = None if p.interpret else pl.get_global(plgpu.SemaphoreType.REGULAR)
    p.barriers.init(barriers)
    warpgroup = lax.axis_index("warpgroup")
    line, part = lax.rem(warpgroup, jnp.int32(p.lines)), lax.rem(warpgroup, jnp.int32(p.parts))
    block = _Block(p, inputs, output, lse, counter, queries, keys, values, weights, items, tuple(barriers), line, part)
    pl.when(warpgroup < 2)(lambda: _multiply(block, warpgroup))
    pl.when(warpgroup >= 2)(lambda: _gather(block))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Stage:
    """A place among the line's stages and the phase of its barriers."""

    slot: jax.Array
    phase: jax.Array


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of the mask, from the work order."""

    batch: jax.Array
    head: jax.Array
    row: jax.Array
    count: jax.Array
    tiles: jax.Array


@dataclasses.dataclass(frozen=True)
class _Block:
    """What the roles of a block share: references, and the order of its work."""

    p: Problem
    inputs: tuple
    output: Any
    lse: Any
    counter: Any
    queries: Any
    keys: Any
    values: Any
    weights: Any
    items: Any
    barrier_refs: tuple
    line: jax.Array
    part: jax.Array

    @property
    def first_stage(self) -> _Stage:
        return _Stage(self.line * self.p.config.stages, jnp.int32(0))

    def after(self, stage: _Stage) -> _Stage:
        first = self.line * self.p.config.stages
        last = stage.slot == first + self.p.config.stages - 1
        return _Stage(jnp.where(last, first, stage.slot + 1), jnp.where(last, 1 - stage.phase, stage.phase))

    @property
    def first_item(self) -> jax.Array:
        """The first row of this line; the others come from the counter."""
        return lax.axis_index("block") * self.p.lines + self.line

    def note(self, stage: _Stage) -> jax.Array:
        """Where among `items` the next row's number stands, once the last stage of a row has landed."""
        return 2 * self.p.lines + stage.slot

    def row(self, item: jax.Array) -> _Row:
        """The row of an item; past the last one, some row.

        Heads in sequence, so that K and V of a head stay in L2, and most keys first inside a head. The shortest rows of
        every head come last, all heads together, to fill what the long ones leave idle.
        """
        p = self.p
        item = jnp.minimum(item, p.num_items - 1)
        heads, by_head = p.batch * p.num_heads, p.batch * p.num_heads * p.rows_by_head
        late = item >= by_head
        per_head = jnp.int32(max(p.rows_by_head, 1))
        rest = item - by_head
        head = jnp.where(late, lax.rem(rest, jnp.int32(heads)), lax.div(item, per_head))
        rank = jnp.where(late, p.rows_by_head + lax.div(rest, jnp.int32(heads)), lax.rem(item, per_head))
        batch, head = lax.div(head, jnp.int32(p.num_heads)), lax.rem(head, jnp.int32(p.num_heads))
        work = self.inputs[5]
        at = _of_mask(work, batch, head)
        row = jnp.clip(work[*at, rank, 0], 0, p.num_rows - 1)
        bits, starts = self.inputs[3:5]
        count = starts[*_of_mask(bits, batch, head), row, starts.shape[-1] - 1]
        tile_keys = p.config.tile_keys
        return _Row(batch, head, row, count, jnp.maximum(lax.div(count + (tile_keys - 1), jnp.int32(tile_keys)), 1))


def _of_mask(ref, batch: jax.Array, head: jax.Array) -> tuple:
    """Batch and head of an array of the mask, whose axes may be 1."""
    return (0 if ref.shape[0] == 1 else batch), (0 if ref.shape[1] == 1 else head)


def _gather(block: _Block) -> None:
    """Fills this warpgroup's half of every stage."""
    p, barriers, refs = block.p, block.p.barriers, block.barrier_refs
    plgpu.set_max_registers(p.config.copy_registers, action="decrease")
    _, key, value, bits, starts = block.inputs[:5]
    tile_keys = p.config.tile_keys
    first_of_share = block.part * gather.SHARE
    copy = functools.partial(gather.gather_rows, interpret=p.interpret)

    def share(tiles, stage):
        tile = tiles.at[stage.slot]
        return tile if p.parts == 1 else tile.at[pl.ds(first_of_share, gather.SHARE)]

    def one_row(carry):
        stage, item, place = carry
        row = block.row(item)
        ticket = work_counter.take_ticket(block.counter, block.part, interpret=p.interpret)
        kv_head = lax.div(row.head, jnp.int32(p.num_heads // p.num_kv_heads))
        keys, values = key.at[row.batch, :, kv_head], value.at[row.batch, :, kv_head]
        mask = (*_of_mask(bits, row.batch, row.head), row.row)

        def find(tile, before):
            first = row.count + (tile - row.tiles) * tile_keys + first_of_share
            return gather.find_keys(
                bits.at[*mask], starts.at[*mask], first, row.count, before, tile_rows=tile_keys, interpret=p.interpret
            )

        def first_step(stage, numbers):
            barriers.await_freed(refs, stage.slot, stage.phase)
            copy(keys, numbers, jnp.int32(0), share(block.keys, stage), may_miss=True)
            barriers.arrive_landed(refs, stage.slot)

        def step(tile, carry):
            # `before` holds the numbers of tile - 1, `numbers` those of this tile: each array those of two tiles.
            before, numbers, stage = carry
            which = lax.rem(jnp.int32(tile), jnp.int32(2))
            barriers.await_freed(refs, stage.slot, stage.phase)
            copy(keys, numbers, which, share(block.keys, stage), may_miss=False)
            copy(values, before, 1 - which, share(block.values, stage), may_miss=True)
            barriers.arrive_landed(refs, stage.slot)
            coming = lax.cond(which == 1, lambda: find(jnp.int32(tile) + 1, numbers), lambda: numbers)
            return numbers, coming, block.after(stage)

        def last_step(stage, numbers):
            barriers.await_freed(refs, stage.slot, stage.phase)
            # In the interpreter lines take every so-many-th row.
            first = item + p.num_lines if p.interpret else jnp.int32(p.num_lines)
            mail = block.items, 2 * block.line + place
            note = block.items.at[pl.ds(block.note(stage), 1)]
            coming = work_counter.share_item(ticket, first, block.part, p.parts, *mail, note, interpret=p.interpret)
            which = lax.rem(row.tiles - 1, jnp.int32(2))
            copy(values, numbers, which, share(block.values, stage), may_miss=True)
            barriers.arrive_landed(refs, stage.slot)
            return coming

        numbers = find(jnp.int32(0), None)
        first_step(stage, numbers)
        numbers, _, stage = lax.fori_loop(1, row.tiles, step, (numbers, numbers, block.after(stage)))
        item = last_step(stage, numbers)
        return block.after(stage), item, 1 - place

    start = (block.first_stage, block.first_item, jnp.int32(0))
    stage, _, _ = lax.while_loop(lambda carry: carry[1] < p.num_items, one_row, start)

    def see_freed(_, stage):
        barriers.await_freed(refs, stage.slot, stage.phase)
        return block.after(stage)

    # The readers have freed every slot once more than it was filled; a barrier must not end with a phase unseen.
    lax.fori_loop(0, p.config.stages, see_freed, stage)


def _multiply(block: _Block, warpgroup: jax.Array) -> None:
    """Computes 64 queries of every row of its line."""
    p, barriers, refs = block.p, block.p.barriers, block.barrier_refs
    plgpu.set_max_registers(p.config.compute_registers, action="increase")
    query, query_order = block.inputs[0], (block.inputs[6] if p.has_order else None)
    queries = block.queries.at[warpgroup]
    tile_keys, factor = p.config.tile_keys, p.scale * _LOG2E

    def load_queries(row: _Row):
        order = None if query_order is None else query_order.at[*_of_mask(query_order, row.batch, row.head)]
        first = row.row * p.query_block + block.part * _PART
        numbers = gather.find_queries(order, first, num_queries=p.num_queries, interpret=p.interpret)
        source = query.at[row.batch, :, row.head]
        gather.gather_rows(source, numbers, jnp.int32(0), queries, may_miss=True, interpret=p.interpret)
        return numbers

    def scores(stage):
        def product(accumulator):
            plgpu.wgmma(accumulator, queries, block.keys.at[stage.slot].transpose((1, 0)))
            return accumulator[...]

        return pl.run_scoped(product, plgpu.ACC((_PART, tile_keys), jnp.float32))

    def weigh(scores, reference):
        return jnp.exp2(scores * factor - lax.broadcast_in_dim(reference, scores.shape, [0]))

    def add_values(stage, output, weights) -> Any:
        if p.interpret:
            block.weights[warpgroup, :, :] = weights
            plgpu.commit_smem()

            def product(accumulator):
                plgpu.wgmma(accumulator, block.weights.at[warpgroup], block.values.at[stage.slot])
                return accumulator[...]

            return output + pl.run_scoped(product, plgpu.ACC((_PART, p.head_dim), jnp.float32))
        add = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, weights, block.values.at[stage.slot]))
        return add(plgpu.ACC.init(output))

    def both_products(stage, coming, output, weights, reference, sums) -> Any:
        """O += P V, and the weights that S = Q K^T gives, with their sums; waits for the stage that is coming."""
        if p.interpret:
            output = add_values(stage, output, weights)
            raw = weigh(scores(stage), reference)
            barriers.await_landed(refs, coming.slot, coming.phase)
            return output, raw.astype(p.dtype), _add_columns(raw)

        def products(state):
            output_ref, weights_ref, sums_ref = state

            def overlapped(scores_ref):
                plgpu.wgmma(scores_ref, queries, block.keys.at[stage.slot].transpose((1, 0)))
                plgpu.wgmma(output_ref, weights_ref[...], block.values.at[stage.slot])
                raw = weigh(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1), reference)
                # Without the barrier the compiler does all of this after the wait for the second product.
                raw, added = lax.optimization_barrier((raw, _add_columns(raw)))
                sums_ref[...] = added
                return raw

            raw = pl.run_scoped(overlapped, plgpu.ACC((_PART, tile_keys), jnp.float32))
            barriers.await_landed(refs, coming.slot, coming.phase)
            plgpu.wgmma_wait(0)
            # Not earlier: the second product still reads the former weights from these registers.
            weights_ref[...] = raw.astype(p.dtype)

        return pl.run_state(products)((plgpu.ACC.init(output), weights, sums))

    def one_row(carry):
        stage, item, numbers = carry
        row = block.row(item)
        gather.await_rows(interpret=p.interpret)
        barriers.await_landed(refs, stage.slot, stage.phase)
        first = scores(stage)
        barriers.arrive_freed(refs, stage.slot)
        stage = block.after(stage)
        column = plgpu.broadcasted_iota(jnp.int32, first.shape, 1, layout=_ACCUMULATOR)
        missing = row.tiles * tile_keys - row.count
        first = jnp.where(column >= missing, first * factor, -jnp.inf)
        reference = jnp.maximum(first.max(axis=1), _LOWEST)
        raw = jnp.exp2(first - lax.broadcast_in_dim(reference, first.shape, [0]))
        output = plgpu.layout_cast(jnp.zeros((_PART, p.head_dim), jnp.float32), _ACCUMULATOR)
        barriers.await_landed(refs, stage.slot, stage.phase)

        def step(_, carry):
            output, weights, reference, sums, stage = carry
            coming = block.after(stage)
            output, weights, added = both_products(stage, coming, output, weights, reference, sums)

            def once_more():
                again = scores(stage)
                higher = jnp.maximum(reference, again.max(axis=1) * factor)
                rescale = jnp.exp2(reference - higher)
                raw = weigh(again, higher)
                kept = [x * lax.broadcast_in_dim(rescale, x.shape, [0]) for x in (output, sums)]
                return kept[0], raw.astype(p.dtype), higher, kept[1] + _add_columns(raw)

            too_high = gather.any_above(added, p.most_weight, interpret=p.interpret)
            state = lax.cond(too_high, once_more, lambda: (output, weights, reference, sums + added))
            barriers.arrive_freed(refs, stage.slot)
            return (*state, coming)

        state = (output, raw.astype(p.dtype), reference, _add_columns(raw), stage)
        output, weights, reference, sums, stage = lax.fori_loop(1, row.tiles, step, state)
        # All warps have read the queries: the next row's may come, while this one ends.
        gather.sync_warpgroup(interpret=p.interpret)
        item = block.items[block.note(stage)]
        next_numbers = load_queries(block.row(item))
        unscaled = add_values(stage, output, weights)
        barriers.arrive_freed(refs, stage.slot)
        total = sums.sum(axis=1)
        some = total > 0.0
        divisor = jnp.where(some, total, 1.0)
        result = unscaled * lax.broadcast_in_dim(jnp.where(some, 1.0 / divisor, 0.0), unscaled.shape, [0])
        lse = jnp.where(some, reference * math.log(2.0) + jnp.log(divisor), -jnp.inf)
        targets = block.output.at[row.batch, :, row.head], block.lse.at[row.batch, row.head]
        gather.scatter_rows(result.astype(p.dtype), lse, numbers, *targets, interpret=p.interpret)
        return block.after(stage), item, next_numbers

    # The slots are free to begin with.
    @pl.loop(0, p.config.stages)
    def _(i):
        barriers.arrive_freed(refs, block.first_stage.slot + jnp.int32(i))

    start = (block.first_stage, block.first_item, load_queries(block.row(block.first_item)))
    lax.while_loop(lambda carry: carry[1] < p.num_items, one_row, start)
    gather.await_rows(interpret=p.interpret)


def _add_columns(values: jax.Array) -> jax.Array:
    """`[64, n]` to `[64, 8]`, columns 8 apart together: no thread needs another's, and few wait for one another."""
    columns = [lax.slice(values, (0, i), (values.shape[0], i + 8)) for i in range(0, values.shape[1], 8)]
    while len(columns) > 1:
        columns = [a + b for a, b in zip(columns[::2], columns[1::2], strict=True)]
    return columns[0]

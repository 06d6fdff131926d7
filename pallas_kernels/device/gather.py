"""The gather-load: which keys a row keeps, and their rows of K and V copied into a tile of shared memory.

Hopper's copy engine (TMA) cannot gather rows, and Pallas has no operation that can, so these few functions are inline
code (`mlir.inline`): 16-byte asynchronous copies, eight neighbouring lanes to 128 bytes of a row. Each function
is run by one warpgroup and has a second form in plain Pallas for the interpreter (`interpret=True`).

One warpgroup fills 64 rows of a tile, 16 of them by each of its warps. Numbers of rows (of a key, or a query) are held
by the lanes of the warp that copies those rows, so that no thread waits for another warp; as a warp has 32 lanes, it
holds the numbers of two tiles:

    thread = 32 * warp + 16 * tile + i   holds the number of row  16 * warp + i  of this warpgroup's 64 rows of a tile

These 128 numbers are a `Numbers` array; `numbers[tile]` stands for one of its two tiles below. -1 is "no row": such a
row of a tile is filled with zeros, and nothing is read or written for it.

A tile in shared memory has the layout that `wgmma` reads (`TILE`): 8 rows x 128 bytes are one kilobyte, in which the
16-byte chunk `c` of row `r` lies at chunk `c ^ r`; `H / 64` of those kilobytes stand side by side.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, nvvm, scf

from fgattn_jax.pallas_kernels.device import mlir
from fgattn_jax.pallas_kernels.device.mlir import i32

SHARE = 64
"""Rows of a tile that one warpgroup copies."""
GROUP_KEYS = 128
"""Keys of one group: 4 words of the mask, 16 bytes, for which the rank of the first kept key is given."""
TILE: Any = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]

_SHARE_OF_WARP = SHARE // mlir.WARPS
_CHUNK_BYTES = 16
_PANEL_BYTES = 128
_KILOBYTE = 8 * _PANEL_BYTES

_BOOLEAN_TYPE = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT)
_ACCUMULATOR = plgpu.Layout.WGMMA
_ACCUMULATOR_ROW = plgpu.Layout.WGMMA.reduce(1)
_ANY = plgpu.RefType()
_TILE = plgpu.RefType(TILE)
_SCALAR = plgpu.Layout.WG_SPLAT


def find_keys(bits_row, starts_row, first, count, before, *, tile_rows: int, interpret: bool):
    """Key numbers of 64 rows of two tiles: the kept keys of ranks `first + i` and `first + tile_rows + i`.

    Every thread looks for its own key: the group by bisection over the groups' first ranks, then the word and the bit
    by counting bits. There is no list of keys anywhere, and the cost does not depend on where the keys are.

    Args:
        bits_row: uint32[W], the mask's words of a row.
        starts_row: int32[W / 4 + 1], kept keys before each group; see `attention.group_starts`.
        first: Rank of row 0; 0 is the row's first kept key. Ranks below 0, and from `count` on, give -1.
        count: Kept keys of the row.
        before: What this gave for the two tiles before these, from whose last keys on the search begins; None to begin
            at key 0.
        tile_rows: Rows of a whole tile, the distance of the two tiles' ranks.
        interpret: Use the form for the interpreter.

    Returns:
        A `Numbers` array.
    """
    if interpret:
        place = lax.broadcasted_iota(jnp.uint32, (bits_row.shape[0], 32), 1)
        flags = ((bits_row[...][:, None] >> place) & jnp.uint32(1)).astype(jnp.int32).reshape(-1)
        row = lax.broadcasted_iota(jnp.int32, (2 * SHARE,), 0)
        wanted = first + jnp.where(row < SHARE, row, row - SHARE + tile_rows)
        found = jnp.sum((jnp.cumsum(flags)[None, :] <= wanted[:, None]).astype(jnp.int32), axis=1)
        return jnp.where((wanted >= 0) & (wanted < count), found, -1)

    num_groups = starts_row.shape[0] - 1

    arguments = [bits_row, starts_row, first, count] + ([] if before is None else [before])
    kinds = [_ANY, _ANY, _SCALAR, _SCALAR, mlir.NUMBERS][: len(arguments)]

    @mlir.inline(*kinds, returns=mlir.NUMBERS_TYPE)
    def search(_, bits_ref, starts_ref, first, count, before=None):
        bits, starts, count = mlir.global_pointer(bits_ref), mlir.global_pointer(starts_ref), count.registers.item()
        row, tile = _held_row()
        wanted = arith.addi(arith.addi(first.registers.item(), row), arith.muli(tile, i32(tile_rows)))
        # Unsigned: a rank below 0 is above every count.
        known = arith.cmpi(arith.CmpIPredicate.ult, wanted, count)
        wanted = mlir.clamp(wanted, arith.subi(count, i32(1)))
        if before is None:
            group = _last_at_most(wanted, starts, num_groups)
        else:
            # The second tile's first key of this warp is not behind any key that is wanted now.
            known_key = mlir.from_lane(mlir.held(before), i32(_SHARE_OF_WARP))
            group = _last_at_most_nearby(wanted, starts, num_groups, arith.divsi(known_key, i32(GROUP_KEYS)))
        rank = arith.subi(wanted, mlir.load(mlir.i32_type(), starts, group))
        place = _select_bit(_load_words(bits, group), rank)
        key = arith.addi(place, arith.muli(group, i32(GROUP_KEYS)))
        return mlir.hold(arith.select(known, key, i32(-1)))

    return search(*arguments)


def find_queries(order_row, first, *, num_queries: int, interpret: bool):
    """Query numbers of 64 positions: `order_row[first + i]`, or the positions themselves; -1 past the last query.

    Args:
        order_row: int32[T], which query stands at which position, or None for raster order. Values are clamped: an
            order that is no permutation gives wrong numbers, never a read or write out of bounds.
        first: Position of row 0.
        num_queries: `T`.
        interpret: Use the form for the interpreter.

    Returns:
        A `Numbers` array whose first tile counts.
    """
    if interpret:
        position = first + lax.broadcasted_iota(jnp.int32, (SHARE,), 0)
        clamped = jnp.minimum(position, num_queries - 1)
        number = clamped if order_row is None else order_row[...][clamped]
        return jnp.where(position < num_queries, number, -1)

    def look_up(order_ref, first):
        row, _ = _held_row()
        last = i32(num_queries - 1)
        number = position = arith.addi(first.registers.item(), row)
        if order_ref is not None:
            entry = mlir.load(mlir.i32_type(), mlir.global_pointer(order_ref), arith.minsi(position, last))
            number = mlir.clamp(entry, last)
        return mlir.hold(arith.select(mlir.below(position, i32(num_queries)), number, i32(-1)))

    if order_row is None:
        inline = mlir.inline(_SCALAR, returns=mlir.NUMBERS_TYPE)
        return inline(lambda _, first: look_up(None, first))(first)
    inline = mlir.inline(_ANY, _SCALAR, returns=mlir.NUMBERS_TYPE)
    return inline(lambda _, order_ref, first: look_up(order_ref, first))(order_row, first)


def gather_rows(source, numbers, tile, target, *, may_miss: bool, interpret: bool) -> None:
    """Starts the copies of `source[numbers[tile]]` into 64 rows of a tile.

    `await_rows` waits for them, or a barrier's `arrive_landed` tells others when they have landed.

    Args:
        source: `[S, H]` in global memory, rows at any distance.
        numbers: From `find_keys` or `find_queries`.
        tile: 0 or 1, which of the two tiles of `numbers`.
        target: `[64, H]` in shared memory, in the layout `TILE`.
        may_miss: Whether a number may be -1. Without it the copies need no check.
        interpret: Use the form for the interpreter.
    """
    if interpret:

        @pl.loop(0, SHARE)
        def _(i):
            number = _entry(numbers, i + tile * SHARE)
            row = source[jnp.maximum(number, 0), :]
            target[i, :] = jnp.where(number >= 0, row, jnp.zeros_like(row))

        return

    head_dim = target.shape[1]
    panels = head_dim // 64

    @mlir.inline(_ANY, mlir.NUMBERS, _SCALAR, _TILE)
    def copy(_, source_ref, numbers, tile, target_ref):
        number, first_lane = mlir.held(numbers), arith.muli(tile.registers.item(), i32(_SHARE_OF_WARP))
        distance = mlir.row_bytes(source_ref)
        # Eight lanes to a row: lane 8 r + c copies chunk c of each panel of row r of this pass.
        row, chunk = arith.divui(mlir.lane(), i32(8)), arith.remui(mlir.lane(), i32(8))
        source = mlir.byte(mlir.global_pointer(source_ref), arith.muli(chunk, i32(_CHUNK_BYTES)))
        start = arith.addi(
            arith.muli(mlir.warp(), i32(_SHARE_OF_WARP // 8 * panels * _KILOBYTE)),
            arith.muli(row, i32(_PANEL_BYTES)),
        )
        swizzled = arith.muli(arith.xori(chunk, row), i32(_CHUNK_BYTES))
        for rows_before in range(0, _SHARE_OF_WARP, 4):
            # A pass moves 4 rows: its place in the swizzle is the first pass's, with one bit turned in every other one.
            constant = rows_before // 8 * panels * _KILOBYTE + rows_before % 8 * _PANEL_BYTES
            offset = arith.addi(start, arith.xori(swizzled, i32(rows_before % 8 * _CHUNK_BYTES)))
            here = mlir.byte(mlir.shared_pointer(target_ref), offset)
            from_row = mlir.from_lane(number, arith.addi(arith.addi(row, i32(rows_before)), first_lane))
            size = None
            if may_miss:
                size = arith.select(mlir.below(from_row, i32(0)), i32(0), i32(_CHUNK_BYTES))
                from_row = arith.maxsi(from_row, i32(0))
            there = mlir.byte(source, mlir.wide_product(from_row, distance))
            for panel in range(panels):
                _copy_chunk(
                    mlir.byte(here, constant + panel * _KILOBYTE),
                    mlir.byte(there, panel * _PANEL_BYTES),
                    size,
                    head_dim,
                )

    copy(source, numbers, tile, target)


def await_rows(*, interpret: bool) -> None:
    """Waits until all copies of the warpgroup have landed, and shows them to `wgmma`."""
    if interpret:
        plgpu.commit_smem()
        return

    @mlir.inline()
    def wait(_):
        mgpu.utils.inline_ptx("cp.async.wait_all;", has_side_effects=True)
        mlir.fence_async_proxy()
        mgpu.warpgroup_barrier()

    wait()


def sync_warpgroup(*, interpret: bool) -> None:
    """Waits for all threads of the warpgroup."""
    if not interpret:
        mlir.inline()(lambda _: mgpu.warpgroup_barrier())()


def scatter_rows(output, lse, numbers, output_target, lse_target, *, interpret: bool) -> None:
    """Stores 64 rows of results from registers: `output_target[numbers[0]] = output`, and LSE likewise.

    Args:
        output: 16-bit `[64, H]` in the layout of `wgmma` accumulators.
        lse: float32 `[64]` in the layout of their rows.
        numbers: From `find_queries`; rows with number -1 are dropped.
        output_target: `[T, H]` in global memory, rows at any distance.
        lse_target: float32 `[T]` in global memory.
        interpret: Use the form for the interpreter.
    """
    if interpret:

        @pl.loop(0, SHARE)
        def _(i):
            here = lax.broadcasted_iota(jnp.int32, (SHARE,), 0) == i
            number = _entry(numbers, i)

            @pl.when(number >= 0)
            def _():
                row = jnp.sum(jnp.where(here[:, None], output.astype(jnp.float32), 0.0), axis=0)
                output_target[number, :] = row.astype(output.dtype)
                lse_target[number] = jnp.max(jnp.where(here, lse, -jnp.inf))

        return

    @mlir.inline(_ACCUMULATOR, _ACCUMULATOR_ROW, mlir.NUMBERS, _ANY, _ANY)
    def store(_, output, lse, numbers, output_ref, lse_ref):
        number = mlir.held(numbers)
        target, distance = mlir.global_pointer(output_ref), mlir.row_bytes(output_ref)
        # Lane 4 r + c of a warp holds columns 2 c and 2 c + 1 of every 8 columns, of the warp's rows r and r + 8.
        row, column = arith.divui(mlir.lane(), i32(4)), arith.remui(mlir.lane(), i32(4))
        pairs, values = output.registers.reshape(-1, 2), lse.registers.reshape(-1)
        for half in range(2):
            place = mlir.from_lane(number, arith.addi(row, i32(8 * half)))
            with mgpu.utils.when(mlir.at_least(place, i32(0))):
                start = mlir.byte(mlir.byte(target, arith.muli(column, i32(4))), mlir.wide_product(place, distance))
                for i in range(pairs.shape[0]):
                    llvm.store(pairs[i, half], mlir.byte(start, 16 * i), alignment=4)
                with mgpu.utils.when(mlir.equal(column, i32(0))):
                    pointer = mgpu.utils.getelementptr(mlir.global_pointer(lse_ref), [place], ir.F32Type.get())
                    llvm.store(mlir.element(values[half], 0), pointer)

    store(output, lse, numbers, output_target, lse_target)


def any_above(values, limit: float, *, interpret: bool):
    """Whether any value is above `limit`: one boolean scalar, the same for all threads of the warpgroup.

    Args:
        values: float32 in the layout of `wgmma` accumulators.
        limit: The limit; NaN is not above it.
        interpret: Use the form for the interpreter.
    """
    if interpret:
        return jnp.any(values > limit)

    @mlir.inline(_ACCUMULATOR, returns=_BOOLEAN_TYPE)
    def vote(_, values):
        most = None
        for register in values.registers.reshape(-1):
            for i in range(ir.VectorType(register.type).shape[0]):
                value = mlir.element(register, i)
                most = value if most is None else arith.maxnumf(most, value)
        threshold = arith.constant(ir.F32Type.get(), limit)
        above = arith.extui(mlir.i32_type(), arith.cmpf(arith.CmpFPredicate.OGT, most, threshold))
        # redux tells the compiler that the answer is the same in all lanes: what depends on it (the loop's counters and
        # addresses) then stays in uniform registers.
        found = mgpu.utils.inline_ptx(
            "{ .reg .pred mine, all; .reg .b32 word; setp.ne.s32 mine, $1, 0;"
            f" barrier.cta.red.or.pred all, $2, {mlir.WARPGROUP}, mine;"
            " selp.b32 word, 1, 0, all; redux.sync.or.b32 $0, word, -1; }",
            above,
            mgpu.utils.warpgroup_barrier_idx(sync=False),
            result_types=mlir.i32_type(),
            has_side_effects=True,
        )
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return vote(values) != 0


def _entry(numbers, i):
    """Entry `i` of an array; the interpreter has no dynamic index into values."""
    return jnp.sum(jnp.where(lax.broadcasted_iota(jnp.int32, numbers.shape, 0) == i, numbers, 0))


def _held_row() -> tuple[ir.Value, ir.Value]:
    """Row whose number this thread holds, and of which of the two tiles."""
    lane = mlir.lane()
    row = arith.addi(arith.muli(mlir.warp(), i32(_SHARE_OF_WARP)), arith.remui(lane, i32(_SHARE_OF_WARP)))
    return row, arith.divui(lane, i32(_SHARE_OF_WARP))


def _last_at_most(wanted: ir.Value, starts: ir.Value, num_groups: int) -> ir.Value:
    """The last group whose first rank is at most `wanted`, by bisection."""
    group = i32(0)
    step = 1 << (num_groups - 1).bit_length() >> 1
    while step:
        probe = arith.minsi(arith.addi(group, i32(step)), i32(num_groups - 1))
        first = mlir.load(mlir.i32_type(), starts, probe)
        group = arith.select(arith.cmpi(arith.CmpIPredicate.sle, first, wanted), probe, group)
        step //= 2
    return group


def _last_at_most_nearby(wanted: ir.Value, starts: ir.Value, num_groups: int, low: ir.Value) -> ir.Value:
    """As `_last_at_most`, by looking at 32 groups from `low` on: the same group in all lanes, not above any answer.

    The lanes load one first rank each and search in one another's. If that is not far enough for one of them, as in
    rows with few keys, all of them search among all groups.
    """
    lane, last = mlir.lane(), i32(num_groups - 1)
    low = mlir.clamp(low, last)
    first = mlir.load(mlir.i32_type(), starts, arith.minsi(arith.addi(low, lane), last))
    steps = i32(0)
    for step in (16, 8, 4, 2, 1):
        probe = arith.addi(steps, i32(step))
        inside = arith.cmpi(arith.CmpIPredicate.sle, mlir.from_lane(first, probe), wanted)
        steps = arith.select(inside, probe, steps)
    group = arith.minsi(arith.addi(low, steps), last)
    short = arith.andi(mlir.equal(steps, i32(mlir.LANES - 1)), mlir.below(group, last))
    any_short = nvvm.vote_sync(i32(0xFFFFFFFF), short, "any")
    choice = scf.IfOp(any_short, [mlir.i32_type()], has_else=True)
    with ir.InsertionPoint(choice.regions[0].blocks[0]):
        scf.yield_([_last_at_most(wanted, starts, num_groups)])
    with ir.InsertionPoint(choice.regions[1].blocks[0]):
        scf.yield_([group])
    return choice.results[0]


def _load_words(bits: ir.Value, group: ir.Value) -> list[ir.Value]:
    four = ir.VectorType.get((GROUP_KEYS // 32,), mlir.i32_type())
    words = llvm.load(four, mgpu.utils.getelementptr(bits, [group], four), alignment=16)
    return [mlir.element(words, i) for i in range(GROUP_KEYS // 32)]


def _select_bit(words: list[ir.Value], rank: ir.Value) -> ir.Value:
    """Place of the set bit of the given rank among the words' bits."""
    word, place = words[0], i32(0)
    past = None  # whether the bit lies behind the words looked at
    for i, this in enumerate(words[:-1]):
        rest = arith.subi(rank, math.ctpop(this))
        behind = mlir.at_least(rest, i32(0))
        past = behind if past is None else arith.andi(past, behind)
        rank = arith.select(past, rest, rank)
        word = arith.select(past, words[i + 1], word)
        place = arith.select(past, i32(32 * (i + 1)), place)
    for half in (16, 8, 4, 2, 1):
        low = math.ctpop(arith.andi(word, i32((1 << half) - 1)))
        upper = mlir.at_least(rank, low)
        word = arith.select(upper, arith.shrui(word, i32(half)), word)
        rank = arith.select(upper, arith.subi(rank, low), rank)
        place = arith.select(upper, arith.addi(place, i32(half)), place)
    return place


def _copy_chunk(target: ir.Value, source: ir.Value, size: ir.Value | None, head_dim: int) -> None:
    """16 bytes, past L1, asking L2 for the row around them; with `size` 0, zeros."""
    around = min(2 * head_dim, 256)
    sizes, operands = ("16", ()) if size is None else ("16, $2", (size,))
    mgpu.utils.inline_ptx(
        f"cp.async.cg.shared.global.L2::{around}B [$0], [$1], {sizes};",
        target,
        source,
        *operands,
        has_side_effects=True,
    )

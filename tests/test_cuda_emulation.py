"""The CUDA kernels on a CPU (docs/notes/cuda_emulation.md): their own sources, thread by thread, in drawn orders."""

import dataclasses
import re

import numpy as np
import pytest
from cuda_cases import ALL_VARIANTS, edge_counts, rows_with_counts
from cuda_emulation import emulator as emulation
from cuda_emulation.calls import Call, assert_right, from_case, make_call, random_arrays, random_call, random_rows, run
from gpu_ledger import SOURCES

by_block = pytest.mark.parametrize("query_block", [64, 128])
by_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
by_poison = pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])


def with_query_order(call: Call, seed: int = 0) -> Call:
    order = np.random.default_rng(seed).permutation(call.query.shape[1]).astype(np.int32)
    return dataclasses.replace(call, order=order[None, None])


def mixed(result, clean, own):
    """`result` with the queries `own` as in `clean`."""
    output, lse = result.output.copy(), result.lse.copy()
    output[:, own], lse[..., own] = clean.output[:, own], clean.lse[..., own]
    return result._replace(output=output, lse=lse)


def assert_same(one, other):
    np.testing.assert_array_equal(one.output.view(np.uint16), other.output.view(np.uint16))
    np.testing.assert_array_equal(one.lse, other.lse)


def in_default_lane(case):
    """Every dtype, width and row size with each other: the rest is for the slow lane."""
    return case.head_dim == 64 or (case.dtype == "float16") == (case.query_block == 64)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if in_default_lane(c) else pytest.mark.slow) for c in ALL_VARIANTS],
    ids=lambda c: c.name.replace(" ", "_"),
)
def test_every_case_in_every_form_of_the_kernel(emulator, case):
    call = from_case(case)
    order = emulator.work_order(call.bits, num_keys=call.num_keys)
    assert_right(call, run(emulator, call, work_order=order))


@by_block
@pytest.mark.parametrize("num_keys", [1201, 1, 333])
def test_work_order_of_the_kernels(emulator, num_keys, query_block):
    counts = edge_counts(num_keys)
    call = make_call(rows_with_counts([*counts, *counts[::-1]], num_keys, np.random.default_rng(2)), query_block)
    np.testing.assert_array_equal(emulator.work_order(call.bits, num_keys=num_keys, seed=1), call.work_order)


@by_block
@by_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
def test_counts_around_every_tile_border(emulator, head_dim, dtype, query_block):
    num_keys = 1201  # neither a multiple of 32 nor of a tile
    counts = edge_counts(num_keys)
    counts = counts[:: 1 if head_dim == 64 and dtype == "bfloat16" else 5]
    rows = rows_with_counts(counts, num_keys, np.random.default_rng(1))
    call = make_call(rows, query_block, missing=5, head_dim=head_dim, dtype=dtype)
    assert_right(call, run(emulator, call, num_sms=2))


@by_block
@by_dtype
def test_seeds_change_the_order_of_events_and_no_bit_of_the_result(emulator, dtype, query_block):
    call = with_query_order(
        make_call(random_rows(6, 500, 0.4, overlap=0.6), query_block, missing=9, dtype=dtype), seed=4
    )
    first = run(emulator, call)
    assert_right(call, first)
    for seed in range(1, 9):
        assert_same(run(emulator, call, seed=seed, num_sms=1 + seed % 4), first)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_pairs_of_rows_at_every_overlap(emulator, overlap):
    rows = random_rows(6, 600, 0.2, overlap=overlap)
    call = make_call(rows, 64)
    result = run(emulator, call, num_sms=2)
    assert_right(call, result)
    pays = float(re.findall(r"kPairPays = ([0-9.]+)f", (SOURCES / "config.cuh").read_text())[0])
    pairs = rows.reshape(3, 2, -1)
    apart = pairs.any(1).sum(-1) > pays * pairs.sum((1, 2))
    assert result.rows_left == 2 * apart.sum()
    assert apart.all() if overlap <= 0.6 else not apart.any() if overlap >= 0.9 else True


@pytest.mark.parametrize("missing", [0, 40])
def test_pairs_that_run_as_one_and_rows_that_run_alone_in_one_call(emulator, missing):
    """Also an odd row at the end, pairs with an empty row, pairs of empty rows, rows without a common key."""
    rng = np.random.default_rng(3)
    rows = np.concatenate([random_rows(2, 700, 0.3, overlap=o, seed=i) for i, o in enumerate([0.9, 0, 1, 0.2, 0.7])])
    rows = np.concatenate([rows, np.zeros((7, 700), bool)])
    rows[11] = rng.random(700) < 0.3  # row 10 is empty
    rows[12] = rng.random(700) < 0.01  # row 13 is empty, and so are 14 and 15
    rows[16] = rng.random(700) < 0.5
    call = make_call(rows, 64, missing=missing)
    for seed in range(4):
        result = run(emulator, call, seed=seed, num_sms=1 + seed)
        assert_right(call, result)
        assert 0 < result.rows_left < 16


def test_pairs_of_many_tiles(emulator):
    """More than there are places for their kept bits, which the decoder fills far ahead of a consumer that is late."""
    call = make_call(random_rows(6, 2400, 0.7, overlap=0.8), 64)
    for seed in range(6):
        assert_right(call, run(emulator, call, seed=seed, num_sms=1 + seed % 2))


def test_a_row_of_a_pair_that_keeps_nothing_of_the_first_tile(emulator):
    """It begins from scores of -inf, without a NaN that would send it to the kernel for single rows."""
    rows = random_rows(4, 2000, 0.7, overlap=0.95)
    rows[1, :300] = rows[2, :300] = False
    call = make_call(rows, 64)
    result = run(emulator, call)
    assert_right(call, result)
    assert result.rows_left == 0


@by_poison
@pytest.mark.parametrize("where", ["value", "key"])
@pytest.mark.parametrize("bad_row", [0, 1])
def test_numbers_that_are_not_finite_in_a_line_of_one_row_of_a_pair(emulator, bad_row, where, poison):
    """They reach the row that keeps the line, and not its neighbour, whose result is right."""
    rows = random_rows(4, 300, 0.5, overlap=0.9)
    for line in (7, 150, 299):  # first, middle and last tile
        rows[bad_row, line], rows[1 - bad_row, line] = True, False
    rows[2:, [7, 150, 299]] = False
    call = make_call(rows, 64)
    clean = run(emulator, call)
    assert clean.rows_left == 0
    assert_right(call, clean)
    array = getattr(call, where).copy()
    array[0, [7, 150, 299], 0, 5] = poison
    hit = dataclasses.replace(call, **{where: array})
    result = run(emulator, hit, num_sms=2)
    own = slice(64 * bad_row, 64 * bad_row + 64)
    others = np.ones(256, bool)
    others[own] = False
    assert np.isfinite(result.output[0, others].astype(np.float32)).all()
    assert_right(call, mixed(result, clean, own))
    if where == "value":
        assert result.rows_left > 0
        assert not np.isfinite(result.output[0, own, 0, 5].astype(np.float32)).any()
        np.testing.assert_allclose(result.lse[0, 0, own], clean.lse[0, 0, own], rtol=1e-6)
    elif np.isnan(poison):
        assert np.isnan(result.output[0, own].astype(np.float32)).all()
        assert np.isnan(result.lse[0, 0, own]).all()


@by_block
def test_a_kept_infinite_value_stays_infinite(emulator, query_block):
    """The first key stands in for the places before it, with weights of 0."""
    rows = random_rows(4, 300, 0.5, overlap=0.9)
    rows[:, 0] = True
    call = make_call(rows, query_block)
    value = call.value.copy()
    value[0, 0, 0, 5] = np.inf
    result = run(emulator, dataclasses.replace(call, value=value), num_sms=2)
    assert np.isposinf(result.output[0, :, 0, 5].astype(np.float32)).all()
    assert np.isfinite(result.output[0, :, 0, 6:].astype(np.float32)).all()


@by_poison
@by_block
def test_lines_of_keys_that_no_row_keeps_are_never_read(emulator, query_block, poison):
    """The emulation ends where such a line is read; and poison there changes nothing."""
    rows = random_rows(5, 700, 0.3, overlap=0.5)
    rows[:, np.random.default_rng(5).random(700) < 0.4] = False
    rows[3] = False
    call = make_call(rows, query_block)
    skipped = ~rows.any(0)
    key, value = call.key.copy(), call.value.copy()
    key[:, skipped], value[:, skipped] = poison, poison
    result = run(emulator, dataclasses.replace(call, key=key, value=value), num_sms=2)
    assert_same(result, run(emulator, call))
    assert_right(call, result)


def test_a_line_that_may_not_be_read_ends_the_run(emulator):
    """What the test before relies on."""
    call = make_call(random_rows(1, 100, 0.5), 128)
    readable = call.kept_lines
    readable[0, np.flatnonzero(readable[0, :, 0])[20]] = False
    with pytest.raises(emulation.EmulationError, match="reads what no row keeps"):
        run(emulator, call, readable=readable)


@by_block
@pytest.mark.parametrize("num_keys", [1, 31, 33, 95, 97, 127, 129, 200])
def test_bits_past_the_last_key_are_never_followed(emulator, num_keys, query_block):
    call = make_call(random_rows(4, num_keys, 0.6, overlap=0.7), query_block)
    bits = call.bits
    past = np.zeros(bits.shape[-1] * 32, bool)
    past[num_keys:] = True
    stray = bits | np.packbits(past, bitorder="little").view(np.uint32)
    assert (stray != bits).any()
    expected = run(emulator, call)
    assert_right(call, expected)
    order = emulator.work_order(stray, num_keys=num_keys)
    np.testing.assert_array_equal(order, call.work_order)
    assert_same(run(emulator, call, bits=stray, work_order=order), expected)


def truncated(rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`rows` `[R, S]` with only the first `counts[r]` keys of each."""
    return rows & (np.cumsum(rows, -1) <= counts[:, None])


@by_block
def test_work_order_in_any_order(emulator, query_block):
    """Its order decides when a row is done, not what comes out."""
    call = make_call(random_rows(7, 400, 0.4, overlap=0.5), query_block)
    shuffled = call.work_order[:, :, np.random.default_rng(0).permutation(7)]
    assert_same(run(emulator, call, work_order=shuffled, num_sms=3), run(emulator, call))


def test_work_order_with_too_few_keys(emulator):
    """The first keys of each row are taken."""
    call = make_call(random_rows(5, 600, 0.5), 128)
    order = call.work_order
    order[..., 1] = [130, 128, 127, 1, 0]
    counts = np.zeros(5, int)
    counts[order[0, 0, :, 0]] = order[0, 0, :, 1]
    result = run(emulator, call, work_order=order)
    assert_right(dataclasses.replace(call, rows=truncated(call.rows[0, 0], counts)[None, None]), result)


@by_block
@pytest.mark.parametrize("kept", [0, 1, 200])
def test_work_order_with_too_many_keys(emulator, kept, query_block):
    """Other valid keys, or none that the result shows, fill the rest: always inside of the arrays."""
    rows = np.zeros((2, 300), bool)
    rows[:, 299 - kept : 299] = True
    call = make_call(rows, query_block)
    for counts in ([300, 1], [1, 300], [129, 129], [300, 300]):
        work = np.array([[[[0, counts[0]], [1, counts[1]]]]], np.int32)
        run(emulator, call, strict=False, work_order=work)


def test_pairs_count_their_keys_themselves(emulator):
    call = make_call(random_rows(6, 400, 0.4, overlap=0.6), 64)
    order = call.work_order
    order[..., 1] = [0, -5, 2**31 - 1, 7, 400, -(2**31)]
    assert_same(run(emulator, call, work_order=order), run(emulator, call))


@by_block
@pytest.mark.parametrize("seed", range(8))
def test_work_orders_and_query_orders_of_anything_stay_in_bounds(emulator, query_block, seed):
    """Results are those of nothing in particular, but every access is inside of the arrays, and the call ends."""
    rng = np.random.default_rng(seed)
    call = make_call(random_rows(5, 300, [0.0, 0.05, 0.5, 1.0][seed % 4]), query_block, missing=13, seed=seed)
    num_queries = call.query.shape[1]
    wild = np.array([-(2**31), -1, 0, 1, 299, 300, 301, 5, 6, 2**31 - 1])
    work = np.where(rng.random((1, 1, 5, 2)) < 0.5, rng.choice(wild, (1, 1, 5, 2)), call.work_order).astype(np.int32)
    order = rng.integers(-3, num_queries + 3, num_queries)
    order = np.where(rng.random(num_queries) < 0.1, rng.choice(wild, num_queries), order).astype(np.int32)
    run(emulator, call, strict=False, work_order=work, query_order=order[None, None], seed=seed, num_sms=2)


def test_queries_that_an_order_names_once_are_right_and_others_left_alone(emulator):
    call = make_call(random_rows(3, 200, 0.3), 64)
    rng = np.random.default_rng(0)
    order = rng.integers(-20, 192 + 20, 192).astype(np.int32)
    result = run(emulator, call, query_order=order[None, None])
    named = np.bincount(order[(order >= 0) & (order < 192)], minlength=192)
    assert {0, 1} <= set(named)
    assert np.isnan(result.output[0, named == 0].astype(np.float32)).all()
    assert np.isnan(result.lse[0, 0, named == 0]).all()
    once = np.flatnonzero(named == 1)
    position = np.array([np.flatnonzero(order == token)[0] for token in once])
    own_rows = call.rows[:, :, position // 64]
    picked = dataclasses.replace(call, query=call.query[:, once], rows=own_rows, query_block=1)
    assert_right(picked, result._replace(output=result.output[:, once], lse=result.lse[..., once]))


@by_block
@by_dtype
@pytest.mark.parametrize("slope", [8.0, -8.0, 300.0, -300.0])
def test_scores_that_rise_or_fall_along_the_keys(emulator, slope, dtype, query_block):
    """The running maximum moves in every tile or never, and most weights vanish."""
    call = make_call(random_rows(4, 777, 0.6, overlap=0.8), query_block, dtype=dtype)
    call.query[:] = 1
    call.key[:] = (np.linspace(-1, 1, 777) * slope)[None, :, None, None].astype(call.key.dtype)
    assert_right(call, run(emulator, call), loose=2e-3)


@by_block
@pytest.mark.parametrize("size", [1e-4, 60.0, 1e6])
def test_scores_of_any_size(emulator, size, query_block):
    """With the largest, one key takes all: scores are compared exactly, since the arrays hold small integers."""
    call = make_call(random_rows(4, 500, 0.4, overlap=0.8), query_block)
    rng = np.random.default_rng(6)
    call.query[:] = rng.integers(-4, 5, call.query.shape).astype(call.query.dtype)
    call.key[:] = rng.integers(-4, 5, call.key.shape).astype(call.key.dtype)
    assert_right(dataclasses.replace(call, scale=size), run(emulator, call, scale=size), loose=1e-3)


@by_block
@pytest.mark.parametrize("score", [0.0, 1e4, -1e4])
def test_equal_scores_give_the_mean(emulator, score, query_block):
    call = make_call(random_rows(4, 500, 0.4, overlap=0.8), query_block)
    call.query[:], call.key[:] = 1, score / 8
    result = run(emulator, call)
    assert_right(call, result)
    mean = call.value[0, call.rows[0, 0, 1], 0].astype(np.float64).mean(0)
    np.testing.assert_allclose(result.output[0, query_block, 0].astype(np.float64), mean, atol=1e-3)


@by_block
def test_a_scale_of_zero(emulator, query_block):
    call = dataclasses.replace(make_call(random_rows(3, 300, 0.5, overlap=0.8), query_block), scale=0.0)
    assert_right(call, run(emulator, call))


def test_a_row_of_a_pair_that_begins_late(emulator):
    """Its first tiles hold the other row's keys alone; at a scale of zero no score says so."""
    rows = random_rows(2, 1200, 0.5, overlap=0.95)
    rows[1, :250] = False
    for scale in (0.0, 1e-6, 0.125):
        call = dataclasses.replace(make_call(rows, 64), scale=scale)
        assert_right(call, run(emulator, call))


@by_block
def test_arrays_with_other_strides(emulator, query_block):
    """`[B, N, T, H]` in memory, and heads cut out of wider arrays; keys and values each in their own way."""
    rng = np.random.default_rng(0)
    sizes = {"num_queries": 200, "num_keys": 150, "batch": 2, "num_heads": 4, "num_kv_heads": 2}
    query, key, value = random_arrays(rng, **sizes)
    rows = rng.random((2, 1, -(-200 // query_block), 150)) < 0.4
    call = Call(query, key, value, rows, query_block)
    other = dataclasses.replace(
        call,
        query=np.ascontiguousarray(query.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
        key=np.concatenate([key, np.full_like(key, np.nan)], 2)[:, :, :2],
        value=np.ascontiguousarray(value.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    )
    result = run(emulator, call)
    assert_right(call, result)
    assert_same(run(emulator, other, strict=False), result)
    swapped = dataclasses.replace(other, key=other.value, value=other.key)
    result = run(emulator, dataclasses.replace(call, key=value, value=key))
    assert_same(run(emulator, swapped, strict=False), result)


def assert_random_call(emulator, seed, most_keys):
    rng = np.random.default_rng(seed)
    call = random_call(rng, most_keys=most_keys)
    order = emulator.work_order(call.bits, num_keys=call.num_keys, seed=seed)
    np.testing.assert_array_equal(order, call.work_order)
    result = run(emulator, call, work_order=order, seed=seed, num_sms=int(rng.integers(1, 5)))
    assert_right(call, result, loose=1e-4 * max(1.0, 10 * call.scale))


@pytest.mark.parametrize("block", range(3))
def test_random_calls(emulator, block):
    for seed in range(20):
        assert_random_call(emulator, 100 * block + seed, [100, 400, 1000][block])


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_many_random_calls(emulator, block):
    for seed in range(12):
        assert_random_call(emulator, 10_000 + 1000 * block + seed, [100, 400, 1000, 2500][block % 4])

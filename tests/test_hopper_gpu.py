"""What only a GPU can show of the kernels for Hopper, beside the contract suite and the fuzz list."""

import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_bounds import CEILING, LSE_CEILING, output_bound
from cuda_cases import ALL_VARIANTS, edge_counts, for_cuda, rows_with_counts

from fgattn_jax.attention import attention, attention_with_lse
from fgattn_jax.evaluation.cases import SMALL_CASES, AttentionCase, make_inputs
from fgattn_jax.evaluation.oracle import attention_oracle
from fgattn_jax.implementations import dense
from fgattn_jax.masks import SliceMask, from_rows, full
from fgattn_jax.masks._bits import full_words
from fgattn_jax.pallas_kernels import attention as pallas_attention
from fgattn_jax.xla_ffi import attention as cuda_attention

pytestmark = pytest.mark.gpu
NAMED = {case.name: case for case in SMALL_CASES}
PROGRAMS = Path(__file__).parent / "programs"
by_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
by_width = pytest.mark.parametrize("head_dim", [64, 128])
by_block = pytest.mark.parametrize("query_block", [64, 128])

by_kernel = pytest.mark.parametrize("kernel", ["cuda", "pallas"])
ADAPTERS = {"cuda": cuda_attention, "pallas": pallas_attention}
RUNS = {
    name: jax.jit(functools.partial(attention_with_lse, implementation=name), static_argnames="scale")
    for name in ADAPTERS
}


def plain(dtype="bfloat16", head_dim=128, query_block=128, **changes) -> AttentionCase:
    facts = {"num_queries": 300, "num_keys": 500, "head_dim": head_dim, "query_block": query_block, "dtype": dtype}
    return AttentionCase(f"gpu {sorted((facts | changes).items())}", "", **(facts | changes))


def assert_matches(case, inputs, result, rows=None, scale=None):
    expected, expected_lse = attention_oracle(
        inputs.query, inputs.key, inputs.value, inputs.rows if rows is None else rows,
        query_block=case.query_block, scale=case.scale if scale is None else scale, order=inputs.order,
    )  # fmt: skip
    output, lse = result
    chex.assert_trees_all_close(np.asarray(output, np.float64), expected, atol=CEILING[case.dtype], rtol=0)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    finite = np.isfinite(expected_lse)
    np.testing.assert_allclose(np.asarray(lse)[finite], expected_lse[finite], atol=LSE_CEILING[case.dtype], rtol=0)
    return expected


@pytest.mark.parametrize("with_work", [False, True], ids=["no_work_order", "work_order"])
@pytest.mark.parametrize("case", ALL_VARIANTS, ids=lambda c: c.name.replace(" ", "_"))
@by_kernel
def test_every_case_in_every_form_of_the_kernel(kernel, case, with_work):
    run = RUNS[kernel]
    inputs = make_inputs(case)
    mask = inputs.mask.with_work_order() if with_work else inputs.mask
    result = run(inputs.query, inputs.key, inputs.value, mask)
    expected = assert_matches(case, inputs, result)
    error = np.abs(np.asarray(result.output, np.float64) - expected).max()
    assert error <= output_bound(case, inputs, expected)


@pytest.mark.parametrize("case", [for_cuda(case) for case in SMALL_CASES], ids=lambda c: c.name.replace(" ", "_"))
def test_both_kernels_agree(case):
    """Nearer to each other than either may be to the oracle: they round at the same places."""
    inputs = make_inputs(case)
    arrays = (inputs.query, inputs.key, inputs.value, inputs.mask)
    (output, lse), (other, other_lse) = (RUNS[kernel](*arrays) for kernel in ("cuda", "pallas"))
    expected, _ = attention_oracle(
        inputs.query, inputs.key, inputs.value, inputs.rows,
        query_block=case.query_block, scale=case.scale, order=inputs.order,
    )  # fmt: skip
    difference = np.abs(np.asarray(output, np.float64) - np.asarray(other, np.float64)).max()
    assert difference <= output_bound(case, inputs, expected)
    np.testing.assert_allclose(lse, other_lse, atol=1e-5, rtol=1e-5)


@by_kernel
def test_steps_of_one_shape_are_traced_once(kernel):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(query, key, value, mask):
        return attention(query, key, value, mask, implementation=kernel)

    for seed in range(3):
        inputs = make_inputs(plain(), seed)
        step(inputs.query, inputs.key, inputs.value, inputs.mask.with_work_order())


@by_dtype
@by_width
@by_block
@by_kernel
def test_counts_around_every_tile_border(kernel, dtype, head_dim, query_block):
    run = RUNS[kernel]
    num_keys = 1201  # neither a multiple of 32 nor of a tile
    counts = edge_counts(num_keys)
    case = plain(
        dtype, head_dim, query_block, num_queries=query_block * len(counts) - 5, num_keys=num_keys, num_heads=1,
        num_kv_heads=1,
    )  # fmt: skip
    inputs = make_inputs(case)
    rows = rows_with_counts(counts, num_keys, np.random.default_rng(1))[None, None]
    mask = from_rows(jnp.asarray(rows), query_block=query_block, num_queries=case.num_queries)
    assert_matches(case, inputs, run(inputs.query, inputs.key, inputs.value, mask), rows=rows)


@by_width
@by_block
@pytest.mark.parametrize("num_keys", [1, 31, 33, 95, 97, 127, 128, 129, 200])
@by_kernel
def test_bits_past_the_last_key_are_never_followed(kernel, num_keys, head_dim, query_block):
    """Such masks are not valid; still nothing outside the arrays is read, and the result is that of the valid bits."""
    inputs = make_inputs(plain(head_dim=head_dim, query_block=query_block, num_keys=num_keys))
    bits = inputs.mask.bits
    stray = jnp.broadcast_to(~jnp.asarray(full_words(num_keys)), bits.shape)
    call = jax.jit(functools.partial(ADAPTERS[kernel].forward, scale=0.1, query_block=query_block))
    arrays = (inputs.query, inputs.key, inputs.value)
    chex.assert_trees_all_equal(call(*arrays, bits | stray, None, None), call(*arrays, bits, None, None))


@by_block
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@by_kernel
def test_poisoned_neighbours_outside_the_arrays_are_never_read(kernel, poison, query_block):
    """The arrays are slices of larger ones, filled with poison on both sides, inside one program."""
    run = RUNS[kernel]
    case = plain(query_block=query_block, num_queries=query_block + 3, num_keys=131)
    inputs = make_inputs(case)

    def surround(x):
        return jnp.pad(x, ((0, 0), (8, 8), (0, 0), (0, 0)), constant_values=poison)

    @jax.jit
    def cut(query, key, value):
        query, key, value = (x[:, 8:-8] for x in (query, key, value))
        return attention_with_lse(query, key, value, inputs.mask, implementation=kernel)

    arrays = (inputs.query, inputs.key, inputs.value)
    chex.assert_trees_all_equal(cut(*map(surround, arrays)), run(*arrays, inputs.mask))


@by_width
@by_block
@by_kernel
def test_every_element_of_the_results_is_written(kernel, head_dim, query_block):
    """Memory that results may get is filled with NaN first: every query must come out finite, or zero and -inf."""
    run = RUNS[kernel]
    case = plain(head_dim=head_dim, query_block=query_block, num_queries=1000, num_heads=4, num_kv_heads=4)
    inputs = make_inputs(case)
    rows = inputs.rows.copy()
    rows[:, :, 1] = False
    mask = from_rows(jnp.asarray(rows), query_block=query_block, num_queries=case.num_queries)
    shape = inputs.query.shape
    for _ in range(3):
        filled = [jnp.full(shape, jnp.nan, inputs.query.dtype) for _ in range(8)]
        filled += [jnp.full((shape[0], shape[2], shape[1]), jnp.nan, jnp.float32) for _ in range(8)]
        jax.block_until_ready(filled)
        del filled
        output, lse = run(inputs.query, inputs.key, inputs.value, mask)
        assert np.isfinite(np.asarray(output, np.float32)).all()
        assert not np.isnan(np.asarray(lse)).any()
        empty = slice(query_block, 2 * query_block)
        assert (np.asarray(output[:, empty], np.float32) == 0).all()
        assert np.isneginf(np.asarray(lse[:, :, empty])).all()


@by_dtype
@by_block
@by_kernel
def test_rows_whose_largest_score_comes_last_or_first(kernel, dtype, query_block):
    """The running maximum changes in every tile, or never."""
    run = RUNS[kernel]
    case = plain(dtype, query_block=query_block, num_keys=777)
    inputs = make_inputs(case)
    slope = jnp.linspace(-1.0, 1.0, case.num_keys)[None, :, None, None]
    query = jnp.ones_like(inputs.query)
    for sign in (1, -1):
        key = jnp.broadcast_to(sign * slope, inputs.key.shape).astype(inputs.key.dtype)
        changed = inputs._replace(query=query, key=key)
        assert_matches(case, changed, run(query, key, inputs.value, inputs.mask, scale=0.5), scale=0.5)


@pytest.mark.parametrize("scale", [0.0, -0.125, 1e-30, 3.0])
@by_kernel
def test_unusual_scales(kernel, scale):
    case = plain(head_dim=64)
    inputs = make_inputs(case)
    result = attention_with_lse(inputs.query, inputs.key, inputs.value, inputs.mask, scale=scale, implementation=kernel)
    assert_matches(case, inputs, result, scale=scale)


@pytest.mark.parametrize("num_keys", [1, 31, 128, 1000, 5000])
def test_the_work_order_kernel_makes_what_the_mask_makes(num_keys):
    rng = np.random.default_rng(num_keys)
    rows = rng.random((2, 3, 300, num_keys)) < rng.integers(0, 4, (2, 3, 300, 1)) / 3  # many ties
    mask = from_rows(jnp.asarray(rows), query_block=64, num_queries=300 * 64)
    expected = mask.with_work_order().check().work_order
    chex.assert_trees_all_equal(
        jax.jit(functools.partial(cuda_attention.work_order, num_keys=num_keys))(mask.bits), expected
    )
    stray = jnp.broadcast_to(~jnp.asarray(full_words(num_keys)), mask.bits.shape)
    again = jax.jit(functools.partial(cuda_attention.work_order, num_keys=num_keys))(mask.bits | stray)
    chex.assert_trees_all_equal(again, expected)


@by_kernel
def test_more_elements_than_32_bits_can_count(kernel):
    """Offsets in query, keys, values and output pass 2^31: the last heads of the last queries tell."""
    run = RUNS[kernel]
    length, heads, width, kept = 132_000, 128, 128, 40
    rng = np.random.default_rng(0)
    make = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), (1, length, heads, width), jnp.bfloat16))
    query, key, value = make(0), make(1), make(2)
    assert query.size > 2**31
    num_rows = -(-length // 128)
    rows = np.zeros((1, 1, num_rows, length), bool)
    keys = np.sort(rng.integers(0, length, (num_rows, kept)), axis=-1)
    np.put_along_axis(rows[0, 0], keys, True, axis=-1)
    mask = from_rows(jnp.asarray(rows), query_block=128, num_queries=length)
    output, lse = run(query, key, value, mask)
    for row in (0, num_rows // 2, num_rows - 1):
        for head in (0, heads - 1):
            some, t = np.flatnonzero(rows[0, 0, row]), min(length - 1, row * 128 + 127)
            q, k, v = (np.asarray(x, np.float64) for x in (query[0, t, head], key[0, some, head], value[0, some, head]))
            scores = k @ q * width**-0.5
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(
                np.asarray(output[0, t, head], np.float64), weights @ v / weights.sum(), atol=CEILING["bfloat16"]
            )
            np.testing.assert_allclose(lse[0, head, t], scores.max() + np.log(weights.sum()), atol=1e-3)


@by_width
@by_block
@by_kernel
def test_many_rows_in_two_runs_are_bit_equal(kernel, head_dim, query_block):
    """More rows than thread blocks, of very different counts: whichever block takes a row, the sums are the same."""
    run = RUNS[kernel]
    case = plain(
        head_dim=head_dim, query_block=query_block, num_queries=20_000, num_keys=3000, num_heads=8, num_kv_heads=4,
        mask="uneven",
    )  # fmt: skip
    inputs = make_inputs(case)
    mask = inputs.mask.with_work_order()
    first = run(inputs.query, inputs.key, inputs.value, mask)
    for _ in range(5):
        chex.assert_trees_all_equal(run(inputs.query, inputs.key, inputs.value, mask), first)
    chex.assert_trees_all_equal(run(inputs.query, inputs.key, inputs.value, inputs.mask), first)


# Transforms, on the device.


@by_kernel
def test_vmap_scan_and_remat_agree_with_plain_calls(kernel):
    run = RUNS[kernel]
    case = for_cuda(NAMED["query order"])
    every = [make_inputs(case, seed) for seed in range(3)]
    calls = [(i.query, i.key, i.value, i.mask.with_work_order()) for i in every]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *calls)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *[run(*call) for call in calls])
    chex.assert_trees_all_equal(jax.jit(jax.vmap(run))(*stacked), expected)
    scanned = jax.jit(lambda x: jax.lax.scan(lambda c, call: (c, run(*call)), 0, x)[1])(stacked)
    chex.assert_trees_all_equal(scanned, expected)

    def loss(query, key, value, mask):
        output = attention(query, key, value, mask, implementation=kernel).astype(jnp.float32)
        return jnp.sum(output * jnp.cos(jnp.arange(output.size)).reshape(output.shape))

    plain_gradient = jax.jit(jax.grad(loss))(*calls[0])
    chex.assert_trees_all_close(jax.jit(jax.grad(jax.checkpoint(loss)))(*calls[0]), plain_gradient, atol=1e-2)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(*stacked)
    chex.assert_trees_all_close(mapped[0], plain_gradient, atol=1e-2)


def test_none_takes_the_kernel_on_this_machine():
    from fgattn_jax.attention import explain

    inputs = make_inputs(plain())
    assert explain(inputs.query, inputs.key, inputs.value, inputs.mask).implementation == "cuda"
    arrays = (inputs.query, inputs.key, inputs.value, inputs.mask)
    chex.assert_trees_all_equal(jax.jit(attention_with_lse)(*arrays), RUNS["cuda"](*arrays))


def test_arrays_on_the_cpu_run_as_xla_if_nothing_is_named_and_fail_if_it_is():
    case = plain()
    inputs = make_inputs(case)
    cpu = jax.devices("cpu")[0]
    arrays = jax.device_put((inputs.query, inputs.key, inputs.value, inputs.mask), cpu)
    result = jax.jit(attention_with_lse)(*arrays)
    assert result.output.devices() == {cpu}
    assert_matches(case, inputs, result)
    with pytest.raises(jax.errors.JaxRuntimeError, match="fgattn_"):
        jax.block_until_ready(RUNS["cuda"](*arrays))


@pytest.mark.parametrize("what", ["no_work_order", "work_order", "mean_mask"])
def test_a_captured_command_buffer_gives_the_same_results(run_python, tmp_path, what):
    program = PROGRAMS / "command_buffer.py"
    code = f"import runpy, sys; sys.argv[1:] = {[what, str(tmp_path)]!r}; runpy.run_path({str(program)!r})"
    flags = (
        "--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL "
        f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"
    )
    got = json.loads(run_python(code, platform="cuda,cpu", flags=flags).splitlines()[-1])
    assert got["equal"]
    assert got["captured"], "neither the HLO nor the thunks show the kernel inside a command buffer"


@pytest.mark.two_gpus
@pytest.mark.parametrize("with_work", [False, True], ids=["no_work_order", "work_order"])
@pytest.mark.parametrize("axis", ["heads", "batch"])
@by_kernel
def test_sharded_over_two_gpus_without_communication(kernel, axis, with_work):
    run = RUNS[kernel]
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    case = plain(batch=2, num_heads=4, num_kv_heads=2, ordered=True)
    inputs = make_inputs(case)
    mask = inputs.mask.with_work_order() if with_work else inputs.mask
    expected = run(inputs.query, inputs.key, inputs.value, mask)
    devices = jax.devices("cuda")[:2]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=devices)
    spec = PartitionSpec(None, None, "x") if axis == "heads" else PartitionSpec("x")
    of_mask = PartitionSpec(None, "x") if axis == "heads" else PartitionSpec("x")
    arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in inputs[:3]]
    sharded: SliceMask = jax.device_put(mask, NamedSharding(mesh, of_mask))
    compiled = run.lower(*arrays, sharded).compile()
    got = compiled(*arrays, sharded)
    text = compiled.as_text() or ""
    assert {"cuda": "fgattn_attention", "pallas": "mosaic_gpu"}[kernel] in text
    assert not [name for name in ("all-gather", "all-reduce", "all-to-all") if name in text]
    assert len(got.output.sharding.device_set) == 2
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.two_gpus
@by_kernel
def test_the_second_gpu_is_set_up_as_the_first(kernel):
    run = RUNS[kernel]
    inputs = make_inputs(plain())
    mask = full(query_block=128, num_queries=300, num_keys=500)
    expected = run(inputs.query, inputs.key, inputs.value, mask)
    moved = jax.device_put((inputs.query, inputs.key, inputs.value, mask), jax.devices("cuda")[1])
    for one, other in zip(run(*moved), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_dense_attention_with_its_lse_is_the_kernel_and_its_gradient_that_of_chunks(head_dim):
    query, key, value = (
        jax.random.normal(k, (2, 333, heads, head_dim), jnp.bfloat16)
        for k, heads in zip(jax.random.split(jax.random.key(0), 3), (4, 2, 2), strict=True)
    )

    def loss(run, *arrays):
        output, lse = run(*arrays)
        return jnp.sum(output.astype(jnp.float32) ** 2) + jnp.sum(jnp.sin(lse)), (output, lse)

    def by(run):
        return jax.jit(jax.value_and_grad(functools.partial(loss, run), argnums=(0, 1, 2), has_aux=True))

    assert "fgattn_attention" in jax.jit(attention_with_lse).lower(query, key, value).as_text()
    found, expected = (
        by(run)(query, key, value)
        for run in (attention_with_lse, functools.partial(dense.chunked, scale=head_dim**-0.5))
    )
    chex.assert_trees_all_close(found[0][1][1], expected[0][1][1], atol=1e-4, rtol=1e-5)
    chex.assert_trees_all_close((found[0][1][0], found[1]), (expected[0][1][0], expected[1]), atol=3e-2, rtol=3e-2)

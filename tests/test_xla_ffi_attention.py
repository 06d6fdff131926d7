"""The adapter, and `implementation="cuda"` from the public function to the handlers, over a kernel for host memory."""

import dataclasses
import functools
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_bounds import LSE_CEILING, output_bound
from cuda_cases import for_cuda, variants
from jax import export

from fgattn_jax.attention import attention, attention_with_lse, explain
from fgattn_jax.errors import UnsupportedError
from fgattn_jax.evaluation import layer_timing
from fgattn_jax.evaluation.cases import SMALL_CASES, make_inputs
from fgattn_jax.evaluation.layer import LayerSetup, Rule
from fgattn_jax.evaluation.model_shapes import ModelShape
from fgattn_jax.evaluation.oracle import attention_oracle
from fgattn_jax.implementations import cuda, dense, transforms
from fgattn_jax.xla_ffi import attention as adapter
from fgattn_jax.xla_ffi import library

NAMED = {case.name: case for case in SMALL_CASES}
PROGRAM = Path(__file__).parent / "programs" / "sharded_host_kernel.py"
SHORT = [c for c in SMALL_CASES if c.num_keys < 500]  # plain loops take their time

run = functools.partial(attention_with_lse, implementation="cuda")


def assert_matches_the_oracle(case, inputs, output, lse, scale=None):
    scaled = dataclasses.replace(case)
    expected, expected_lse = attention_oracle(
        inputs.query, inputs.key, inputs.value, inputs.rows,
        query_block=case.query_block, scale=case.scale if scale is None else scale, order=inputs.order,
    )  # fmt: skip
    assert output.dtype == inputs.query.dtype
    assert lse.dtype == jnp.float32
    bound = output_bound(scaled, inputs, expected) if scale is None else 4e-2
    chex.assert_trees_all_close(np.asarray(output, np.float64), expected, atol=bound, rtol=0)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    finite = np.isfinite(expected_lse)
    chex.assert_trees_all_close(np.asarray(lse)[finite], expected_lse[finite], atol=LSE_CEILING[case.dtype], rtol=0)


@pytest.mark.parametrize("case", SHORT, ids=lambda c: c.name.replace(" ", "_"))
def test_every_case_goes_through_adapter_and_handlers(host_kernel, case):
    case = for_cuda(case)
    inputs = make_inputs(case)
    assert_matches_the_oracle(case, inputs, *run(inputs.query, inputs.key, inputs.value, inputs.mask))


@pytest.mark.parametrize("case", variants(NAMED["shared query order"]), ids=lambda c: c.name.replace(" ", "_"))
def test_every_dtype_width_and_row_size_goes_through(host_kernel, case):
    inputs = make_inputs(case)
    mask = inputs.mask.with_work_order()
    assert_matches_the_oracle(case, inputs, *run(inputs.query, inputs.key, inputs.value, mask))


def test_a_negative_scale_is_a_negated_query(host_kernel):
    case = for_cuda(NAMED["plain"])
    inputs = make_inputs(case)
    output, lse = run(inputs.query, inputs.key, inputs.value, inputs.mask, scale=-0.2)
    assert_matches_the_oracle(case, inputs, output, lse, scale=-0.2)


def test_a_work_order_changes_nothing_and_makes_no_second_call(host_kernel, host_library):
    case = for_cuda(NAMED["grouped heads"])
    inputs = make_inputs(case)
    arrays = (inputs.query, inputs.key, inputs.value)
    chex.assert_trees_all_equal(run(*arrays, inputs.mask), run(*arrays, inputs.mask.with_work_order()))

    def calls(mask):
        return set(re.findall(r"fgattn_host_\w+", jax.jit(run).lower(*arrays, mask).as_text()))

    assert calls(inputs.mask) == {"fgattn_host_attention", "fgattn_host_work_order"}
    assert calls(inputs.mask.with_work_order()) == {"fgattn_host_attention"}


def test_gradients_are_those_of_xla(host_kernel):
    case = for_cuda(NAMED["shared query order"])
    inputs = make_inputs(case)
    mask = inputs.mask.with_work_order()  # which the backward kernel must not be given
    cotangent = jnp.asarray(np.random.default_rng(5).standard_normal(inputs.query.shape), inputs.query.dtype)

    def grads(implementation):
        def f(*arrays):
            return attention(*arrays, mask, implementation=implementation)

        return jax.vjp(f, inputs.query, inputs.key, inputs.value)[1](cotangent)

    chex.assert_trees_all_close(grads("cuda"), grads("xla"), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("with_work", [False, True], ids=["no_work_order", "work_order"])
def test_vmap_equals_a_loop(host_kernel, with_work):
    case = for_cuda(NAMED["query order"])
    every = [make_inputs(case, seed) for seed in range(2)]
    masks = [i.mask.with_work_order() if with_work else i.mask for i in every]
    calls = [(i.query, i.key, i.value, mask) for i, mask in zip(every, masks, strict=True)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *calls)
    want = jax.tree.map(lambda *x: jnp.stack(x), *[run(*call) for call in calls])
    chex.assert_trees_all_equal(jax.vmap(run)(*stacked), want)
    queries = stacked[0]
    shared = jax.vmap(run, in_axes=(0, None, None, None))(queries, *calls[0][1:])
    want = jax.tree.map(lambda *x: jnp.stack(x), *[run(q, *calls[0][1:]) for q in queries])
    chex.assert_trees_all_equal(shared, want)


def test_one_mask_over_the_batch_is_not_copied_by_vmap(host_kernel):
    case = for_cuda(NAMED["shared mask"])
    inputs = make_inputs(case)
    mask = inputs.mask.with_work_order()
    queries = jnp.stack([inputs.query, -inputs.query])
    text = (
        jax.jit(jax.vmap(run, in_axes=(0, None, None, None))).lower(queries, inputs.key, inputs.value, mask).as_text()
    )
    (line,) = [line for line in text.splitlines() if "custom_call @fgattn_host_attention" in line]
    rows, words = mask.bits.shape[2:]
    assert f"tensor<1x1x{rows}x{words}xui32>" in line
    assert f"tensor<1x1x{rows}x2xi32>" in line


def test_scan_over_masks_with_work_orders(host_kernel):
    case = for_cuda(NAMED["plain"])
    inputs = make_inputs(case)
    masks = [make_inputs(case, seed).mask.with_work_order() for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *masks)

    def body(query, mask):
        return query + attention(query, inputs.key, inputs.value, mask, implementation="cuda"), None

    looped = inputs.query
    for mask in masks:
        looped = jax.jit(lambda q, m: body(q, m)[0])(looped, mask)
    chex.assert_trees_all_equal(jax.lax.scan(body, inputs.query, stacked)[0], looped)


@pytest.mark.multidevice
@pytest.mark.parametrize("kind", ["jit", "explicit", "shard_map"])
def test_sharded_calls_need_no_communication_with_or_without_a_work_order(run_python, host_library, kind):
    code = f"import runpy, sys; sys.argv[1:] = {[kind, str(host_library)]!r}; runpy.run_path({str(PROGRAM)!r})"
    assert run_python(code, devices=2).split() == ["heads", "batch"]


# What the adapter refuses, and what it makes of a call.


@pytest.fixture
def unregistered(monkeypatch):
    """Lowering needs no library."""
    monkeypatch.setattr(library, "register", lambda: None)


def shapes(batch=2, queries=150, keys=70, heads=4, kv_heads=2, width=64, block=64, dtype=jnp.bfloat16):
    rows, words = -(-queries // block), 4 * -(-keys // 128)
    of = jax.ShapeDtypeStruct
    return {
        "query": of((batch, queries, heads, width), dtype),
        "key": of((batch, keys, kv_heads, width), dtype),
        "value": of((batch, keys, kv_heads, width), dtype),
        "bits": of((batch, heads, rows, words), jnp.uint32),
        "query_order": of((1, 1, queries), jnp.int32),
        "work_order": of((batch, heads, rows, 2), jnp.int32),
    }


def lowered(*, scale=0.125, query_block=64, platforms=("cuda",), **arrays):
    def f(*positional):
        return adapter.forward(*positional, scale=scale, query_block=query_block)

    checks = [export.DisabledSafetyCheck.custom_call(t) for t in (library.ATTENTION_TARGET, library.WORK_ORDER_TARGET)]
    return export.export(jax.jit(f), platforms=platforms, disabled_checks=checks)(*arrays.values()).mlir_module()


@pytest.mark.parametrize("given", ["both orders", "no orders"])
def test_the_program_for_cuda_is_the_call_and_nothing_that_moves_data(unregistered, given):
    arrays = shapes() | ({} if given == "both orders" else {"query_order": None, "work_order": None})
    text = lowered(**arrays)
    operations = re.findall(r"stablehlo\.(\w+)", text)
    calls = re.findall(r"custom_call @(\w+)\(([^)]*)\)", text)
    if given == "both orders":
        assert operations == ["custom_call"]
        # The handler's order of operands.
        assert calls == [("fgattn_attention", "%arg0, %arg1, %arg2, %arg3, %arg5, %arg4")]
    else:
        assert operations == ["custom_call", "custom_call"]
        assert [name for name, _ in calls] == ["fgattn_work_order", "fgattn_attention"]
        assert calls[1][1].startswith("%arg0, %arg1, %arg2, %arg3, %0")
    assert "scale = 1.250000e-01 : f32" in text
    assert "query_block = 64 : i32" in text


def test_a_negative_scale_costs_one_negation_of_the_query(unregistered):
    operations = re.findall(r"stablehlo\.(\w+)", lowered(scale=-0.5, **shapes()))
    assert operations == ["negate", "custom_call"]


def test_a_chosen_call_holds_xla_for_other_platforms_and_a_named_one_does_not(unregistered):
    case = for_cuda(NAMED["plain"])
    inputs = make_inputs(case)
    checks = [export.DisabledSafetyCheck.custom_call(t) for t in (library.ATTENTION_TARGET, library.WORK_ORDER_TARGET)]

    def program(pair, platform):
        def f(*arrays):
            return transforms.apply(pair, *arrays, scale=0.1, query_block=case.query_block)

        arrays = (inputs.query, inputs.key, inputs.value, inputs.mask.bits, None)
        return export.export(jax.jit(f), platforms=[platform], disabled_checks=checks)(*arrays).mlir_module()

    assert "@fgattn_attention" in program(cuda.CHOSEN, "cuda")
    assert "@fgattn_attention" not in program(cuda.CHOSEN, "cpu")
    assert "@fgattn_attention" in program(cuda.NAMED, "cuda")
    assert "@fgattn_attention" in program(cuda.NAMED, "cpu")  # which XLA then refuses to compile, below


def test_a_named_call_fails_where_another_platform_would_run_it(unregistered):
    case = for_cuda(NAMED["plain"])
    inputs = make_inputs(case)
    arrays = (inputs.query, inputs.key, inputs.value, inputs.mask.bits, None)
    static = {"scale": 0.1, "query_block": case.query_block}
    with pytest.raises(jax.errors.JaxRuntimeError, match="fgattn_"):
        jax.jit(lambda *a: transforms.apply(cuda.NAMED, *a, **static))(*arrays)
    output, _ = jax.jit(lambda *a: transforms.apply(cuda.CHOSEN, *a, **static))(*arrays)
    assert np.isfinite(np.asarray(output, np.float32)).all()


REFUSED = {
    "empty query": ({"query": (2, 0, 4, 64)}, r"`query` with 4 axes, none of them empty, got shape=\(2, 0, 4, 64\)"),
    "rank of key": ({"key": (2, 70, 64)}, r"`key` with 4 axes, .* got shape=\(2, 70, 64\)"),
    "head width": ({"query": (2, 150, 4, 80)}, r"head widths 64 and 128, and head_dim=80"),
    "dtype": ({"query": ((2, 150, 4, 64), "float32")}, r"takes bfloat16 or float16, and dtype='float32'"),
    "row size": ({"query_block": 32}, "64 or 128 queries per slice, and query_block=32"),
    "key of another batch": ({"key": (1, 70, 2, 64)}, r"`key` bfloat16\(2, 70, 2, 64\), got bfloat16\(1,"),
    "value of another length": ({"value": (2, 71, 2, 64)}, r"`value` bfloat16\(2, 70, 2, 64\), got bfloat16\(2, 71,"),
    "value of another dtype": ({"value": ((2, 70, 2, 64), "float16")}, r"`value` bfloat16.*, got float16"),
    "heads": ({"key": (2, 70, 3, 64), "value": (2, 70, 3, 64)}, "multiple of 3 key/value heads, got 4"),
    "scale": ({"scale": 1e39}, r"`scale` that float32 holds, got scale=1e\+39"),
    "bits of fewer words": ({"bits": (2, 4, 3, 3)}, r"`bits` uint32 .* \[2\|1, 4\|1, 3, 4\], got uint32\(2, 4, 3, 3\)"),
    "bits of another batch": ({"bits": (3, 4, 3, 4)}, r"`bits` uint32 .*, got uint32\(3, 4, 3, 4\)"),
    "signed bits": ({"bits": ((2, 4, 3, 4), "int32")}, r"`bits` uint32 .*, got int32"),
    "query order": ({"query_order": (1, 1, 70)}, r"`query_order` int32 .* \[2\|1, 4\|1, 150\], got int32\(1,"),
    "work order": ({"work_order": (2, 4, 3)}, r"`work_order` int32 .* \[2\|1, 4\|1, 3, 2\], got int32\(2,"),
    "work order of one head": ({"work_order": (2, 1, 3, 2)}, r"for every row of `bits`, got work_order=\(2, 1, 3, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_adapter_refuses_in_words(unregistered, name):
    changed, message = REFUSED[name]
    changed = dict(changed)
    static = {"scale": 0.1, "query_block": 64} | {k: changed.pop(k) for k in ("scale", "query_block") if k in changed}
    arrays = shapes()
    for which, new in changed.items():
        shape, dtype = new if isinstance(new[0], tuple) else (new, arrays[which].dtype)
        arrays[which] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(adapter.forward, **static), *arrays.values())


def test_work_order_refuses_bits_of_another_length(unregistered):
    bits = jax.ShapeDtypeStruct((1, 2, 3, 4), jnp.uint32)
    assert jax.eval_shape(lambda b: adapter.work_order(b, num_keys=128), bits).shape == (1, 2, 3, 2)
    with pytest.raises(ValueError, match=r"uint32\[B\|1, N\|1, R, W=8\] for num_keys=129, got uint32\(1, 2, 3, 4\)"):
        jax.eval_shape(lambda b: adapter.work_order(b, num_keys=129), bits)
    with pytest.raises(ValueError, match="at least 1, got num_keys=0"):
        jax.eval_shape(lambda b: adapter.work_order(b, num_keys=0), bits)


def test_naming_cuda_on_this_machine_raises_with_every_reason():
    inputs = make_inputs(for_cuda(NAMED["plain"]))
    if jax.default_backend() == "cpu":
        with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU of the Hopper generation, and platform='cpu'"):
            run(inputs.query, inputs.key, inputs.value, inputs.mask)
        assert explain(inputs.query, inputs.key, inputs.value, inputs.mask).implementation == "xla"


def test_the_layer_benchmark_times_the_order_of_work_alone(host_kernel):
    shape = ModelShape("small", "small", (3, 4, 5), num_heads=1, head_dim=64, num_layers=2, text_tokens=6)
    setup = LayerSetup(
        shape, 1, "bfloat16", query_block=64, predictors=("mean-query",), rule=Rule("top_k", 20), steps=8,
        implementation="cuda", rounds=1,
    )  # fmt: skip
    (row,) = layer_timing.measure(setup)
    assert row["implementation"] == "cuda"
    assert row["order_made"] == "work order kernel"
    assert row["step_order_ms"] == pytest.approx(row["order_ms"], abs=1e-3)
    assert row["target_density"] is None
    assert row["density"] == pytest.approx(26 / 66, abs=0.1)  # the 20 best keys, and 6 of text


def test_dense_attention_by_the_kernel_runs_in_chunks_on_other_platforms(unregistered):
    query, key, value = (
        jax.random.normal(k, (2, 150, 4, 64), jnp.bfloat16) for k in jax.random.split(jax.random.key(0), 3)
    )
    checks = [export.DisabledSafetyCheck.custom_call(t) for t in (library.ATTENTION_TARGET, library.WORK_ORDER_TARGET)]

    def program(platform):
        run = jax.jit(functools.partial(dense.by_kernel, scale=0.1))
        return export.export(run, platforms=[platform], disabled_checks=checks)(query, key, value).mlir_module()

    assert "@fgattn_attention" in program("cuda")
    assert "@fgattn_attention" not in program("cpu")

    def loss(run, *arrays):
        output, lse = run(*arrays, scale=0.1)
        return jnp.sum(output.astype(jnp.float32) ** 2) + jnp.sum(lse)

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, run), (0, 1, 2))) for run in (dense.by_kernel, dense.chunked)
    )
    chex.assert_trees_all_close(found(query, key, value), expected(query, key, value), atol=1e-5)

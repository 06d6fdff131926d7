"""What every implementation must do, on every case of the shared table."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_bounds import CEILING, LSE_CEILING, output_bound
from cuda_cases import for_cuda

from fgattn_jax.attention import AttentionOutput, attention, attention_with_lse
from fgattn_jax.evaluation.cases import SMALL_CASES, AttentionCase, make_inputs
from fgattn_jax.evaluation.oracle import attention_oracle, gradient_oracle, kept_keys
from fgattn_jax.masks import from_rows

HOPPER = ("cuda", "pallas")
by_implementation = pytest.mark.parametrize(
    "implementation",
    ["reference", "xla", *(pytest.param(name, marks=pytest.mark.gpu) for name in HOPPER)],
)
by_dense_implementation = pytest.mark.parametrize("implementation", ["reference", "xla"])
by_case = pytest.mark.parametrize("case", SMALL_CASES, ids=lambda c: c.name.replace(" ", "_"))
NAMED = {case.name: case for case in SMALL_CASES}

run = jax.jit(attention_with_lse, static_argnames=("scale", "implementation"))


def fitting(case: AttentionCase, implementation: str) -> AttentionCase:
    """The case in a dtype, head width and row size that the implementation takes: none is left out."""
    return for_cuda(case) if implementation in HOPPER else case


def assert_same_gradients(first, second):
    """Bit-equal on a CPU; on a GPU `xla` adds key and value gradients with atomics, in no fixed order.

    Float32 sums that differ in their last bits may round to neighbouring 16-bit numbers.
    """
    if jax.default_backend() == "cpu":
        chex.assert_trees_all_equal(first, second)
    else:
        slack = max(1e-5, *(float(jnp.finfo(x.dtype).eps) if x.dtype.itemsize == 2 else 0 for x in first))
        chex.assert_trees_all_close(first, second, rtol=slack, atol=slack)


def oracle_of(case, inputs):
    return attention_oracle(
        inputs.query, inputs.key, inputs.value, inputs.rows,
        query_block=case.query_block, scale=case.scale, order=inputs.order,
    )  # fmt: skip


@by_implementation
@by_case
def test_output_and_lse_match_the_oracle(case: AttentionCase, implementation: str):
    case = fitting(case, implementation)
    inputs = make_inputs(case)
    output, lse = run(inputs.query, inputs.key, inputs.value, inputs.mask, implementation=implementation)
    expected, expected_lse = oracle_of(case, inputs)
    assert output.dtype == inputs.query.dtype
    assert lse.dtype == jnp.float32
    bound = output_bound(case, inputs, expected)
    chex.assert_trees_all_close(np.asarray(output, np.float64), expected, atol=bound, rtol=0)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    finite = np.isfinite(expected_lse)
    chex.assert_trees_all_close(
        np.asarray(lse, np.float64)[finite], expected_lse[finite], atol=LSE_CEILING[case.dtype], rtol=0
    )


@by_implementation
@by_case
def test_gradients_match_the_oracle(case: AttentionCase, implementation: str):
    case = fitting(case, implementation)
    inputs = make_inputs(case, seed=1)
    rng = np.random.default_rng(7)
    d_output = jnp.asarray(rng.standard_normal(inputs.query.shape), inputs.query.dtype)
    d_lse = jnp.asarray(rng.standard_normal((case.batch, case.num_heads, case.num_queries)), jnp.float32)

    @jax.jit
    def pull_back(query, key, value):
        def both(*arrays):
            return tuple(attention_with_lse(*arrays, inputs.mask, implementation=implementation))

        return jax.vjp(both, query, key, value)[1]((d_output, d_lse))

    grads = pull_back(inputs.query, inputs.key, inputs.value)
    expected = gradient_oracle(
        inputs.query, inputs.key, inputs.value, inputs.rows, d_output, d_lse,
        query_block=case.query_block, scale=case.scale, order=inputs.order,
    )  # fmt: skip
    for got, want, x in zip(grads, expected, (inputs.query, inputs.key, inputs.value), strict=True):
        assert got.dtype == x.dtype
        size = max(1.0, float(np.abs(want).max()))
        chex.assert_trees_all_close(np.asarray(got, np.float64), want, atol=2 * CEILING[case.dtype] * size, rtol=0)


@by_implementation
@pytest.mark.parametrize("name", ["edge rows", "query order", "grouped heads", "runs, M=64"])
def test_output_depends_on_exactly_the_kept_keys(name: str, implementation: str):
    """With q = 0 all kept keys weigh the same; one-hot values then show which keys were read."""
    case = fitting(NAMED[name], implementation)
    inputs = make_inputs(case)
    query = jnp.zeros_like(inputs.query)
    seen = np.zeros((case.batch, case.num_queries, case.num_heads, case.num_keys), bool)
    one_hot = jax.jit(lambda value: attention(query, inputs.key, value, inputs.mask, implementation=implementation))
    for first in range(0, case.num_keys, case.head_dim):
        keys = np.arange(first, min(first + case.head_dim, case.num_keys))
        value = np.zeros(inputs.value.shape, np.float32)
        value[:, keys, :, keys - first] = 1.0
        seen[..., keys] = np.asarray(one_hot(jnp.asarray(value, inputs.value.dtype)))[..., : len(keys)] > 0
    rows = np.broadcast_to(inputs.rows, (case.batch, case.num_heads, *inputs.rows.shape[2:]))
    order = (
        None if inputs.order is None else np.broadcast_to(inputs.order, (case.batch, case.num_heads, case.num_queries))
    )
    for b in range(case.batch):
        for n in range(case.num_heads):
            head_order = None if order is None else order[b, n]
            expected = kept_keys(rows[b, n], case.query_block, head_order, case.num_queries)
            np.testing.assert_array_equal(seen[b, :, n], expected)


@by_implementation
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["edge rows", "query order", "bfloat16"])
def test_skipped_keys_and_values_are_never_read(name: str, poison: float, implementation: str):
    """Even rows keep even keys, odd rows odd keys: the other half is poison for them, and only for them."""
    case = fitting(NAMED[name], implementation)
    inputs = make_inputs(case)
    rows = inputs.rows & (np.arange(case.num_keys) % 2 == 0) & (np.arange(inputs.rows.shape[2])[:, None] % 2 == 0)
    mask = from_rows(
        jnp.asarray(rows),
        query_block=case.query_block,
        num_queries=case.num_queries,
        query_order=inputs.mask.query_order,
    )
    bad = np.arange(case.num_keys) % 2 == 1
    key = jnp.where(bad[None, :, None, None], jnp.asarray(poison, inputs.key.dtype), inputs.key)
    value = jnp.where(bad[None, :, None, None], jnp.asarray(poison, inputs.value.dtype), inputs.value)
    d_output = jnp.ones_like(inputs.query)

    @jax.jit
    def both(key, value):
        def f(*arrays):
            return attention(*arrays, mask, implementation=implementation)

        output, vjp = jax.vjp(f, inputs.query, key, value)
        return output, vjp(d_output)

    clean, poisoned = both(inputs.key, inputs.value), both(key, value)
    chex.assert_tree_all_finite(poisoned)
    chex.assert_trees_all_equal(clean[0], poisoned[0])
    assert_same_gradients(clean[1], poisoned[1])


@by_implementation
def test_a_kept_nan_reaches_its_row_and_no_other(implementation: str):
    case = fitting(NAMED["plain"], implementation)
    inputs = make_inputs(case)
    rows = np.ones_like(inputs.rows)
    rows[:, :, 0, 5] = False
    mask = from_rows(jnp.asarray(rows), query_block=case.query_block, num_queries=case.num_queries)
    value = inputs.value.at[:, 5].set(jnp.nan)
    output = np.asarray(attention(inputs.query, inputs.key, value, mask, implementation=implementation))
    assert np.isfinite(output[:, : case.query_block]).all()
    assert np.isnan(output[:, case.query_block :]).all()


@by_implementation
@pytest.mark.parametrize("num_keys", [1, 70])
def test_a_constant_mask_of_one_key_rows_is_not_lost(num_keys: int, implementation: str):
    """A mask that the compiler knows: jaxlib 0.11.2 dropped the loop over a single key (docs/notes/dropped_loop.md)."""
    case = fitting(dataclasses.replace(NAMED["one key"], num_keys=num_keys), implementation)
    inputs = make_inputs(case)
    rows = np.zeros_like(inputs.rows)
    rows[..., num_keys // 2] = True
    mask = from_rows(jnp.asarray(rows), query_block=case.query_block, num_queries=case.num_queries)
    output = jax.jit(lambda q, k, v: attention(q, k, v, mask, implementation=implementation))(*inputs[:3])
    expected = jnp.broadcast_to(inputs.value[:, num_keys // 2][:, None], output.shape)
    chex.assert_trees_all_close(output, expected, atol=1e-6)


@by_implementation
def test_a_kept_infinite_value_stays_infinite(implementation: str):
    """Entries that fill up a chunk must not turn it into NaN."""
    case = fitting(NAMED["plain"], implementation)
    inputs = make_inputs(case)
    rows = inputs.rows.copy()
    rows[..., 0] = True
    mask = from_rows(jnp.asarray(rows), query_block=case.query_block, num_queries=case.num_queries)
    value = inputs.value.at[:, 0].set(jnp.inf)
    output = attention(inputs.query, inputs.key, value, mask, implementation=implementation)
    assert np.isposinf(np.asarray(output)).all()


@by_implementation
def test_empty_rows_give_zero_minus_infinity_and_no_gradient(implementation: str):
    case = fitting(NAMED["plain"], implementation)
    inputs = make_inputs(case)
    rows = inputs.rows.copy()
    rows[:, :, 1] = False
    mask = from_rows(jnp.asarray(rows), query_block=case.query_block, num_queries=case.num_queries)
    empty = slice(case.query_block, 2 * case.query_block)

    def f(query):
        return attention_with_lse(query, inputs.key, inputs.value, mask, implementation=implementation)

    (output, lse), vjp = jax.vjp(f, inputs.query)
    (d_query,) = vjp(AttentionOutput(jnp.ones_like(output), jnp.ones_like(lse)))
    assert (np.asarray(output[:, empty]) == 0).all()
    assert np.isneginf(np.asarray(lse[:, :, empty])).all()
    assert (np.asarray(d_query[:, empty]) == 0).all()
    assert np.isfinite(np.asarray(d_query)).all()


@by_implementation
@pytest.mark.parametrize("size", [0.0, 1e2, 1e4])
def test_extreme_scores_stay_exact(size: float, implementation: str):
    """All scores equal (0), and scores up to 1e4 apart: the softmax is then nearly one-hot."""
    case = fitting(NAMED["odd lengths"], implementation)
    inputs = make_inputs(case)
    query = inputs.query * size
    output, lse = run(query, inputs.key, inputs.value, inputs.mask, implementation=implementation)
    expected, expected_lse = attention_oracle(
        query, inputs.key, inputs.value, inputs.rows, query_block=case.query_block, scale=case.scale
    )
    # A score of size x has an absolute float32 error of a few x * eps, which the exponential makes relative.
    bound = CEILING[case.dtype] + CEILING["float32"] * size * 4
    chex.assert_trees_all_close(np.asarray(output, np.float64), expected, atol=bound, rtol=0)
    finite = np.isfinite(expected_lse)
    chex.assert_trees_all_close(np.asarray(lse)[finite], expected_lse[finite], rtol=1e-5, atol=1e-5)


@by_implementation
def test_scores_that_overflow_to_minus_infinity_weigh_nothing(implementation: str):
    width, dtype = (64, jnp.bfloat16) if implementation in HOPPER else (16, jnp.float32)
    query = jnp.full((1, width, 1, width), 3e38, dtype)
    key = jnp.stack([jnp.full((width,), -1.0), jnp.zeros(width), jnp.zeros(width)])[None, :, None].astype(dtype)
    value = (jnp.arange(3.0)[None, :, None, None] * jnp.ones((1, 3, 1, width))).astype(dtype)
    mask = from_rows(jnp.ones((1, 1, 1, 3), bool), query_block=width, num_queries=width)
    output = attention(query, key, value, mask, implementation=implementation)
    chex.assert_trees_all_close(output, jnp.full_like(output, 1.5), atol=1e-6)


@by_implementation
@pytest.mark.parametrize("name", ["plain", "edge rows", "grouped heads", "bfloat16"])
def test_two_runs_are_bit_equal(name: str, implementation: str):
    case = fitting(NAMED[name], implementation)
    inputs = make_inputs(case)

    @jax.jit
    def both(query, key, value):
        def f(*arrays):
            return attention(*arrays, inputs.mask, implementation=implementation)

        output, vjp = jax.vjp(f, query, key, value)
        return output, vjp(output)

    first, second = (both(inputs.query, inputs.key, inputs.value) for _ in range(2))
    chex.assert_trees_all_equal(first[0], second[0])
    assert_same_gradients(first[1], second[1])


@by_implementation
def test_a_full_mask_equals_dense_attention(implementation: str):
    case = fitting(NAMED["full"], implementation)
    inputs = make_inputs(case)
    masked = run(inputs.query, inputs.key, inputs.value, inputs.mask, implementation=implementation)
    dense = run(
        inputs.query, inputs.key, inputs.value, implementation=None if implementation in HOPPER else implementation
    )
    bound = CEILING[case.dtype] if implementation in HOPPER else 5e-6
    chex.assert_trees_all_close(masked, dense, atol=bound)
    with jax.default_matmul_precision("highest"):  # GPUs would take TF32
        theirs = jax.nn.dot_product_attention(inputs.query, inputs.key, inputs.value)
    chex.assert_trees_all_close(dense.output, theirs, atol=bound)


@by_dense_implementation
@pytest.mark.parametrize("name", ["grouped heads", "odd lengths", "bfloat16"])
def test_dense_attention_matches_the_oracle(name: str, implementation: str):
    case = NAMED[name]
    inputs = make_inputs(case)
    rows = np.ones_like(inputs.rows)
    output, lse = run(inputs.query, inputs.key, inputs.value, implementation=implementation)
    expected, expected_lse = attention_oracle(
        inputs.query, inputs.key, inputs.value, rows, query_block=case.query_block, scale=case.scale
    )
    chex.assert_trees_all_close(np.asarray(output, np.float64), expected, atol=CEILING[case.dtype], rtol=0)
    chex.assert_trees_all_close(np.asarray(lse, np.float64), expected_lse, atol=LSE_CEILING[case.dtype], rtol=0)


@by_implementation
def test_scale_is_used(implementation: str):
    case = fitting(NAMED["plain"], implementation)
    inputs = make_inputs(case)
    output, _ = run(inputs.query, inputs.key, inputs.value, inputs.mask, scale=0.7, implementation=implementation)
    expected, _ = attention_oracle(
        inputs.query, inputs.key, inputs.value, inputs.rows, query_block=case.query_block, scale=0.7
    )
    chex.assert_trees_all_close(np.asarray(output, np.float64), expected, atol=CEILING[case.dtype], rtol=0)

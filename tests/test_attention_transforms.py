"""`attention` under JAX's transforms; the sharded cases run in `test_attention_sharding.py`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from fgattn_jax.attention import attention, attention_with_lse
from fgattn_jax.evaluation.cases import SMALL_CASES, make_inputs
from fgattn_jax.masks import SliceMask, from_rows

NAMED = {case.name: case for case in SMALL_CASES}
by_implementation = pytest.mark.parametrize("implementation", ["reference", "xla"])


@pytest.fixture(scope="module")
def plain():
    return make_inputs(NAMED["plain"])


class TestVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_all_variants_agree(self):
        inputs = make_inputs(NAMED["plain"])
        expected = attention(inputs.query, inputs.key, inputs.value, inputs.mask, implementation="reference")

        @self.variant
        def run(query, key, value, mask):
            return attention(query, key, value, mask, implementation="xla")

        chex.assert_trees_all_close(run(inputs.query, inputs.key, inputs.value, inputs.mask), expected, atol=2e-6)


def stacked(count: int):
    every = [make_inputs(NAMED["grouped heads"], seed) for seed in range(count)]
    return jax.tree.map(lambda *x: jnp.stack(x), *[(i.query, i.key, i.value, i.mask) for i in every]), every


@by_implementation
def test_vmap_over_everything_equals_a_loop(implementation):
    (query, key, value, mask), every = stacked(3)
    got = jax.vmap(lambda *a: attention(*a, implementation=implementation))(query, key, value, mask)
    want = jnp.stack([attention(i.query, i.key, i.value, i.mask, implementation=implementation) for i in every])
    chex.assert_trees_all_close(got, want, atol=2e-6)


@by_implementation
@pytest.mark.parametrize("name", ["grouped heads", "shared query order"])
def test_vmap_over_queries_only_shares_keys_and_mask(name, implementation):
    inputs = make_inputs(NAMED[name])
    queries = jnp.stack([inputs.query, 2 * inputs.query, -inputs.query])

    def run(query):
        return attention_with_lse(query, inputs.key, inputs.value, inputs.mask, implementation=implementation)

    got = jax.vmap(run)(queries)
    want = jax.tree.map(lambda *x: jnp.stack(x), *map(run, queries))
    chex.assert_trees_all_close(got, want, atol=2e-6)


def test_nested_vmap_and_vmap_of_grad_equal_loops():
    (query, key, value, mask), every = stacked(2)

    def loss(query, key, value, mask):
        output = attention(query, key, value, mask, implementation="xla")
        return jnp.sum(output * jnp.cos(jnp.arange(output.size).reshape(output.shape)))

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    want = [grad(i.query, i.key, i.value, i.mask) for i in every]
    got = jax.jit(jax.vmap(grad))(query, key, value, mask)
    chex.assert_trees_all_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), atol=1e-5)
    twice = jax.tree.map(lambda x: x[:, None], (query, key, value, mask))
    nested = jax.jit(jax.vmap(jax.vmap(grad)))(*twice)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[:, 0], nested), got, atol=1e-5)


def test_grad_of_vmap_sums_over_shared_keys(plain):
    queries = jnp.stack([plain.query, -plain.query])

    def loss(key):
        outputs = jax.vmap(lambda q: attention(q, key, plain.value, plain.mask, implementation="xla"))(queries)
        return jnp.sum(outputs[0] ** 2) + jnp.sum(outputs[1])

    def loop_loss(key):
        first, second = (attention(q, key, plain.value, plain.mask, implementation="reference") for q in queries)
        return jnp.sum(first**2) + jnp.sum(second)

    grads = (jax.jit(jax.grad(one))(plain.key) for one in (loss, loop_loss))
    chex.assert_trees_all_close(*grads, atol=1e-5)


@by_implementation
def test_remat_gives_the_same_gradient(plain, implementation):
    def loss(query):
        return jnp.sum(attention(query, plain.key, plain.value, plain.mask, implementation=implementation) ** 3)

    grads = (jax.jit(jax.grad(one))(plain.query) for one in (jax.checkpoint(loss), loss))
    chex.assert_trees_all_close(*grads, atol=1e-6)


def test_forward_mode_is_refused_by_jax(plain):
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(
            lambda q: attention(q, plain.key, plain.value, plain.mask, implementation="xla"),
            (plain.query,),
            (plain.query,),
        )


@by_implementation
def test_a_denoising_loop_is_traced_once(plain, implementation):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(query, mask):
        return attention(query, plain.key, plain.value, mask, implementation=implementation)

    query, mask = plain.query, plain.mask
    for i in range(3):
        query = step(query, mask)
        mask = from_rows(jnp.asarray(np.roll(plain.rows, i + 1, -1)), query_block=32, num_queries=96)
    assert np.isfinite(np.asarray(query)).all()


def test_scan_with_the_mask_in_the_carry_equals_a_loop(plain):
    def body(carry, shift):
        query, mask = carry
        query = query + 0.1 * attention(query, plain.key, plain.value, mask, implementation="xla")
        words = jnp.where(shift > 0, mask.bits, jnp.bitwise_not(mask.bits))
        keep = SliceMask(words, query_block=32, num_keys=96, num_queries=96)
        return (query, keep), keep.counts().sum()

    shifts = jnp.array([1, 0, 1])
    (query, _), counts = jax.lax.scan(body, (plain.query, plain.mask), shifts)
    carry, expected_counts = (plain.query, plain.mask), []
    for shift in shifts:
        carry, count = body(carry, shift)
        expected_counts.append(int(count))
    chex.assert_trees_all_close(query, carry[0], atol=1e-5)
    assert counts.tolist() == expected_counts


def test_eval_shape_computes_nothing(plain):
    got = jax.eval_shape(attention_with_lse, plain.query, plain.key, plain.value, plain.mask)
    assert got.output == jax.ShapeDtypeStruct((1, 96, 2, 32), jnp.float32)
    assert got.lse == jax.ShapeDtypeStruct((1, 2, 96), jnp.float32)


def test_an_exported_program_comes_back_and_runs(plain):
    def run(query, key, value, bits):
        mask = SliceMask(bits, query_block=32, num_keys=96, num_queries=96)
        return attention(query, key, value, mask, implementation="xla")

    arrays = (plain.query, plain.key, plain.value, plain.mask.bits)
    stored = export.export(jax.jit(run))(*arrays).serialize()
    chex.assert_trees_all_close(export.deserialize(stored).call(*arrays), run(*arrays), atol=1e-6)


def compiled_temp_bytes(function, *arrays) -> int:
    return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("what", ["forward", "gradient"])
def test_no_array_of_queries_times_keys_exists(what):
    """Temporary memory stays below one boolean [T, S] and grows with T, not with T * S."""

    def temp(length: int) -> int:
        shape = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
        mask = jax.eval_shape(
            lambda: SliceMask(
                jnp.zeros((1, 1, length // 64, length // 32), jnp.uint32),
                query_block=64,
                num_keys=length,
                num_queries=length,
            )
        )

        def run(q, k, v, m):
            return attention(q, k, v, m, implementation="xla")

        def grad(q, k, v, m):
            return jax.grad(lambda *a: jnp.sum(run(*a, m) ** 2), argnums=(0, 1, 2))(q, k, v)

        return compiled_temp_bytes(run if what == "forward" else grad, shape, shape, shape, mask)

    small, large = temp(4096), temp(16384)
    assert large < 16384 * 16384
    assert large < 5 * small  # four times the length; 16 times if anything were [T, S]


def test_dense_attention_holds_no_array_of_queries_times_keys():
    def temp(length: int) -> int:
        shape = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
        return compiled_temp_bytes(lambda q, k, v: attention(q, k, v), shape, shape, shape)

    assert temp(16384) < 16384 * 16384
    assert temp(16384) < 5 * temp(4096)

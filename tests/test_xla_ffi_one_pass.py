"""The adapter and handler of attention that finds a mask, over plain loops in host memory: checks, strides, axes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_kernel import load
from test_xla_ffi_masks import BF16, F16, F32, S32, U32, arrays, by_order

from fgattn_jax import attention_with_lse
from fgattn_jax.predictors import Budget, ExactPredictor, _hopper
from fgattn_jax.xla_ffi import one_pass

B, T, S, N, K, H, M = 2, 150, 70, 4, 2, 64, 64
R, W = 3, 4


def values(dtype=BF16):
    return jax.random.normal(jax.random.key(9), (B, S, K, H), dtype)


@by_order
@pytest.mark.parametrize("scale", [0.125, -0.125])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_attention_is_dense_and_the_mask_that_of_the_predictor(host_kernel, dtype, scale, order):
    query, key, lse = arrays(dtype)
    earlier = lse + jax.random.uniform(jax.random.key(3), lse.shape, minval=-1.0)
    limit = jnp.full((N,), np.log(0.3), F32)
    found = one_pass.attention_and_mask(
        query, key, values(dtype), earlier, limit, order, scale=scale, query_block=M, keep_best=True
    )
    expected = attention_with_lse(query, key, values(dtype), scale=scale)
    chex.assert_trees_all_close(*(x.astype(F32) for x in (found[0], expected.output)), atol=0.02)
    chex.assert_trees_all_close(found[1], expected.lse, atol=1e-5)
    predictor = ExactPredictor(M, query_order=order, budget=Budget(threshold=0.3))
    mask = predictor(query, key, earlier, scale=scale)
    chex.assert_trees_all_equal(found[2:], (mask.bits, mask.counts()))


@pytest.mark.parametrize("threshold", [0.4, (0.4, 0.0, 0.2, 0.9)], ids=["one threshold", "one per head"])
def test_the_predictor_hands_its_call_to_the_kernel(host_kernel, monkeypatch, threshold):
    monkeypatch.setattr(_hopper, "_runs_here", lambda *arguments: True)
    query, key, lse = arrays()
    budget = Budget(threshold=threshold, keep=(-1, 2), min_keys=0)
    run = _hopper.one_pass(query, key, budget, M, 0.125)
    assert run is not None
    _, _, bits = jax.jit(run)(query, key, values(), lse, None)
    chex.assert_trees_all_equal(bits, ExactPredictor(M, budget=budget)(query, key, lse).bits)
    assert _hopper.one_pass(query, key, Budget(top_k=3), M, 0.125) is None


def test_it_works_under_jit_and_vmap(host_kernel):
    query, key, lse = (jnp.stack([x, y]) for x, y in zip(arrays(), arrays(seed=1), strict=True))
    limit = jnp.full((N,), np.log(0.3), F32)

    def run(query, key, lse):
        sizes = {"scale": 0.125, "query_block": M, "keep_best": False}
        return one_pass.attention_and_mask(query, key, values(), lse, limit, None, **sizes)

    both = jax.jit(jax.vmap(run))(query, key, lse)
    for i in range(2):
        chex.assert_trees_all_equal(tuple(x[i] for x in both), run(query[i], key[i], lse[i]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": jnp.zeros((B, T, N, 32), BF16)}, "it takes head widths 64 and 128, and head_dim=32"),
        ({"key": jnp.zeros((B, S, K, H), F16)}, r"`key` bfloat16\(2, 70, 2, 64\), got float16"),
        ({"value": jnp.zeros((B, 71, K, H), BF16)}, r"`value` bfloat16\(2, 70, 2, 64\) as `key`, got bfloat16\(2, 71,"),
        ({"value": jnp.zeros((B, S, K, H), F16)}, r"`value` bfloat16\(2, 70, 2, 64\) as `key`, got float16"),
        ({"lse": jnp.zeros((B, T, N), F32)}, r"`lse` float32\(2, 4, 150\), got float32\(2, 150, 4\)"),
        ({"log_threshold": jnp.zeros((K,), F32)}, r"`log_threshold` float32\(4,\), got float32\(2,\)"),
        ({"query_order": jnp.zeros((B, N, S), S32)}, r"`query_order` int32 of shape \[2\|1, 4\|1, 150\]"),
        ({"query_block": 32}, "it takes 64 or 128 queries per slice, and query_block=32"),
        ({"scale": float("nan")}, "`scale` that float32 holds, got scale=nan"),
        ({"scale": 1e39}, r"`scale` that float32 holds, got scale=1e\+39"),
    ],
)
def test_wrong_arguments_are_named(host_kernel, changes, message):
    query, key, lse = arrays()
    given = {"query": query, "key": key, "value": values(), "lse": lse, "log_threshold": jnp.zeros((N,), F32)}
    given |= {"query_order": None, "scale": 0.125, "query_block": M, "keep_best": False} | changes
    with pytest.raises(ValueError, match=message):
        one_pass.attention_and_mask(**given)


OPERANDS = {
    "query": ((B, T, N, H), BF16),
    "key": ((B, S, K, H), BF16),
    "value": ((B, S, K, H), BF16),
    "last_lse": ((B, N, T), F32),
    "log_threshold": ((N,), F32),
    "query_order": ((B, N, T), S32),
}
RESULTS = {
    "output": ((B, T, N, H), BF16),
    "lse": ((B, N, T), F32),
    "bits": ((B, N, R, W), U32),
    "counts": ((B, N, R), S32),
    "workspace": ((4,), S32),
}


@pytest.fixture(scope="module")
def library(host_library):
    return load(host_library)


def call(*, scale=0.125, query_block=M, **changed):
    """Runs the checks of the handler on right arguments but for `changed`."""
    described = {name: changed.pop(name, value) for name, value in (OPERANDS | RESULTS).items()}
    assert not changed
    run = jax.ffi.ffi_call("fgattn_check_one_pass", [jax.ShapeDtypeStruct(*described[name]) for name in RESULTS])
    given = [jnp.zeros(*described[name]) for name in OPERANDS if described[name] is not None]
    return jax.block_until_ready(
        run(*given, scale=np.float32(scale), query_block=np.int32(query_block), keep_best=True)
    )


def test_right_arguments_pass_the_handler(library):
    call()
    call(query_order=None)
    call(query_order=((1, N, T), S32))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": ((B, T, H), BF16)}, r"`query` BF16 or F16 \[B, T, N, H\], got BF16\[2, 150, 64\]"),
        ({"query": ((B, T, N, 32), BF16)}, r"`query` with H=64 or H=128"),
        ({"key": ((B, S, K, H), F16)}, r"`key` BF16\[B=2, S, K, H=64\], got F16"),
        ({"value": ((B, 71, K, H), BF16)}, r"`value` BF16\[B=2, S=70, K=2, H=64\], got BF16\[2, 71,"),
        ({"key": ((B, 0, K, H), BF16), "value": ((B, 0, K, H), BF16)}, "`key` with at least one key"),
        ({"key": ((B, S, 3, H), BF16), "value": ((B, S, 3, H), BF16)}, "key heads K, got N=4 and K=3"),
        ({"last_lse": ((B, T, N), F32)}, r"`last_lse` F32\[B=2, N=4, T=150\], got F32\[2, 150, 4\]"),
        ({"log_threshold": ((K,), F32)}, r"`log_threshold` F32\[N=4\], got F32\[2\]"),
        ({"query_order": ((B, N, S), S32)}, r"`query_order` S32\[B=2\|1, N=4\|1, T=150\], got S32\[2, 4, 70\]"),
        ({"query_block": 32}, "`query_block` 64 or 128, got query_block=32"),
        ({"scale": -1.0}, "`scale` finite and not negative, got scale=-1"),
        ({"scale": np.inf}, "`scale` finite and not negative, got scale=inf"),
        ({"output": ((B, T, N, H), F32)}, r"`output` BF16\[.*, got F32"),
        ({"lse": ((B, T, N), F32)}, r"`lse` F32\[B=2, N=4, T=150\], got F32\[2, 150, 4\]"),
        ({"bits": ((B, 1, R, W), U32)}, r"`bits` U32\[B=2, N=4, R=3, W=4\], got U32\[2, 1, 3, 4\]"),
        ({"counts": ((B, N, R), U32)}, r"`counts` S32\[B=2, N=4, R=3\], got U32"),
        ({"workspace": ((3,), S32)}, r"`workspace` S32\[counters=4\], got S32\[3\]"),
    ],
)
def test_the_handler_names_what_is_wrong(library, changed, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(**changed)

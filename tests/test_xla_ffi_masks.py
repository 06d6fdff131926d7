"""The adapters and handlers of the mask kernels, over plain loops in host memory: checks in words, strides, axes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_kernel import load

from fgattn_jax.masks import SliceMask
from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor
from fgattn_jax.xla_ffi import masks

B, T, S, N, K, H, M = 2, 150, 70, 4, 2, 64, 64
R, W = 3, 4
BF16, F16, F32, S32, U32 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, jnp.uint32
SCALE = jnp.float32(0.125)


def arrays(dtype=BF16, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    query = 2 * jax.random.normal(keys[0], (B, T, N, H), dtype)
    key = jax.random.normal(keys[1], (B, S, K, H), dtype)
    wide = jnp.repeat(key, N // K, axis=2).astype(F32)
    lse = jax.nn.logsumexp(jnp.einsum("btnh,bsnh->bnts", query.astype(F32), wide) * SCALE, axis=-1)
    return query, key, lse


def orders():
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(T).astype(np.int32) for _ in range(N)])[None]


by_order = pytest.mark.parametrize("order", [None, orders()], ids=["raster", "query_order"])


def assert_same_mask(bits, counts, predictor, *operands):
    mask = predictor(*operands, scale=SCALE)
    chex.assert_trees_all_equal(bits, mask.bits)
    chex.assert_trees_all_equal(counts, mask.counts())


@by_order
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_exact_masks_are_those_of_xla(host_kernel, dtype, order):
    query, key, lse = arrays(dtype)
    limit = jnp.full((N,), np.log(0.3), F32)
    found = masks.exact_mask(query, key, lse, limit, order, scale=SCALE, query_block=M, keep_best=True)
    assert_same_mask(*found, ExactPredictor(M, query_order=order, budget=Budget(threshold=0.3)), query, key, lse)


def test_every_head_may_have_a_threshold_of_its_own(host_kernel):
    query, key, lse = arrays()
    thresholds = np.array([0.01, 0.1, 0.3, 0.6])
    call = functools.partial(masks.exact_mask, query, key, lse, scale=SCALE, query_block=M, keep_best=False)
    bits, _ = call(jnp.asarray(np.log(thresholds), F32), None)
    for head, threshold in enumerate(thresholds):
        of_all, _ = call(jnp.full((N,), np.log(threshold), F32), None)
        chex.assert_trees_all_equal(bits[:, head], of_all[:, head])


@by_order
@pytest.mark.parametrize("budget", [Budget(top_k=9), Budget(threshold=2.0, min_keys=3, max_keys=20)], ids=str)
def test_masks_of_masses_are_those_of_xla(host_kernel, budget, order):
    query, key, lse = arrays()
    rule = masks.SelectRule(budget.threshold, budget.top_p, budget.top_k, budget.min_keys, budget.max_keys)
    found = masks.exact_mass(query, key, lse, order, rule, scale=SCALE, query_block=M)
    assert_same_mask(*found, ExactPredictor(M, query_order=order, statistic="mass", budget=budget), query, key, lse)


@by_order
def test_masks_of_mean_queries_are_those_of_xla(host_kernel, order):
    query, key, _ = arrays()
    limit = jnp.full((N,), np.log(1.1 / S), F32)
    found = masks.mean_mask(query, key, limit, order, scale=SCALE, query_block=M, keep_best=True)
    assert_same_mask(*found, MeanQueryPredictor(M, query_order=order, budget=Budget(threshold=1.1 / S)), query, key)
    ranked = masks.mean_mask(query, key, masks.SelectRule(top_k=9), order, scale=SCALE, query_block=M, num_means=4)
    predictor = MeanQueryPredictor(M, query_order=order, num_means=4, budget=Budget(top_k=9))
    assert_same_mask(*ranked, predictor, query, key)


@pytest.mark.parametrize(("heads", "turns"), [(0, 8), (1, 8), (3, 3), (5, 2), (8, 1), (50, 1)])
def test_ranked_means_take_the_heads_that_fit_in_turns_of_equal_size(host_kernel, heads, turns):
    query, key, _ = arrays()
    of_head = R * W * 32 + 4

    def bits(query, key, workspace_bytes):
        rule, how = masks.SelectRule(top_k=9), {"scale": SCALE, "query_block": M, "workspace_bytes": workspace_bytes}
        return masks.mean_mask(query, key, rule, None, **how)[0]

    text = jax.jit(bits, static_argnums=2).lower(query, key, 4 * heads * of_head).as_text()
    assert f"workspace_heads = {-(-B * N // turns)} : i32" in text
    chex.assert_trees_all_equal(bits(query, key, 4 * heads * of_head), bits(query, key, 1 << 30))


def test_a_number_of_means_that_the_kernel_has_not_is_refused(host_kernel):
    query, key, _ = arrays()
    with pytest.raises(ValueError, match="`num_means` 1, 2, 4 or 8, got num_means=16"):
        masks.mean_mask(query, key, masks.SelectRule(top_k=9), None, scale=SCALE, query_block=M, num_means=16)


def test_they_work_under_jit_and_vmap_with_a_traced_scale(host_kernel):
    query, key, lse = (jnp.stack([x, y]) for x, y in zip(arrays(), arrays(seed=1), strict=True))
    limit = jnp.full((N,), np.log(0.3), F32)

    def bits(query, key, lse, scale):
        return masks.exact_mask(query, key, lse, limit, None, scale=scale, query_block=M, keep_best=False)[0]

    both = jax.jit(jax.vmap(bits, in_axes=(0, 0, 0, None)))(query, key, lse, SCALE)
    for i in range(2):
        chex.assert_trees_all_equal(both[i], bits(query[i], key[i], lse[i], SCALE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": jnp.zeros((B, T, N, 32), BF16)}, "it takes head widths 64 and 128, and head_dim=32"),
        ({"query": jnp.zeros((B, T, N, H), F32)}, "it takes bfloat16 or float16, and dtype='float32'"),
        ({"query": jnp.zeros((B, 0, N, H), BF16)}, "`query` with 4 axes, none of them empty"),
        ({"key": jnp.zeros((B, S, K, H), F16)}, r"`key` bfloat16\(2, 70, 2, 64\), got float16"),
        ({"key": jnp.zeros((B, S, 3, H), BF16)}, "a multiple of 3 key heads, got 4"),
        ({"lse": jnp.zeros((B, T, N), F32)}, r"`lse` float32\(2, 4, 150\), got float32\(2, 150, 4\)"),
        ({"log_threshold": jnp.zeros((K,), F32)}, r"`log_threshold` float32\(4,\), got float32\(2,\)"),
        ({"query_order": jnp.zeros((B, N, S), S32)}, r"`query_order` int32 of shape \[2\|1, 4\|1, 150\]"),
        ({"query_block": 32}, "it takes 64 or 128 queries per slice, and query_block=32"),
    ],
)
def test_wrong_arguments_are_named(host_kernel, changes, message):
    query, key, lse = arrays()
    given = {"query": query, "key": key, "lse": lse, "log_threshold": jnp.zeros((N,), F32), "query_order": None}
    given |= {"scale": SCALE, "query_block": M, "keep_best": False} | changes
    with pytest.raises(ValueError, match=message):
        masks.exact_mask(**given)


OPERANDS = {
    "query": ((B, T, N, H), BF16),
    "key": ((B, S, K, H), BF16),
    "lse": ((B, N, T), F32),
    "scale": ((), F32),
    "log_threshold": ((N,), F32),
    "query_order": ((B, N, T), S32),
}
RESULTS = {"bits": ((B, N, R, W), U32), "counts": ((B, N, R), S32)}
MASS_WORKSPACE = ((2 * (R * W * 32 + 4),), F32)
MEAN_WORKSPACE = ((B * N * 256 * (H // 2 + 32) + 3 * (R * W * 32 + 4) + B * N * R * 1028,), S32)
RULE = {"rule": 1, "value": 0.9, "top_k": 0, "min_keys": 1, "max_keys": S, "head_floor": 0.5}
MASS = {"workspace_heads": 2} | RULE
MEAN = {"num_means": 1, "workspace_heads": 3, "ranks": True, "keep_best": False} | RULE
TARGETS = {
    "exact_mask": (("query", "key", "lse", "scale", "log_threshold", "query_order"), None, {"keep_best": True}),
    "exact_mass": (("query", "key", "lse", "scale", "query_order"), MASS_WORKSPACE, MASS),
    "mean_mask": (("query", "key", "scale", "log_threshold", "query_order"), MEAN_WORKSPACE, MEAN),
}


@pytest.fixture(scope="module")
def library(host_library):
    return load(host_library)


def call(name, *, query_block=M, **changed):
    """Runs the checks of a handler on right arguments but for `changed`."""
    operands, workspace, attributes = TARGETS[name]
    results = RESULTS | ({} if workspace is None else {"workspace": workspace})
    described = {key: changed.pop(key, value) for key, value in (OPERANDS | results).items()}
    attributes = {key: changed.pop(key, value) for key, value in attributes.items()}
    assert not changed
    numbers = {bool: bool, int: np.int32, float: np.float32}
    run = jax.ffi.ffi_call(f"fgattn_check_{name}", [jax.ShapeDtypeStruct(*described[key]) for key in results])
    attributes = {key: numbers[type(value)](value) for key, value in attributes.items()}
    given = [jnp.zeros(*described[key]) for key in operands if described[key] is not None]
    return jax.block_until_ready(run(*given, query_block=np.int32(query_block), **attributes))


@pytest.mark.parametrize("name", TARGETS)
def test_right_arguments_pass_the_handlers(library, name):
    call(name)
    call(name, query_order=None)
    call(name, query_order=((1, N, T), S32))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": ((B, T, H), BF16)}, r"`query` BF16 or F16 \[B, T, N, H\], got BF16\[2, 150, 64\]"),
        ({"query": ((B, T, N, 32), BF16)}, r"`query` with H=64 or H=128"),
        ({"key": ((B, S, K, H), F16)}, r"`key` BF16\[B=2, S, K, H=64\], got F16"),
        ({"key": ((B, 0, K, H), BF16)}, "`key` with at least one key"),
        ({"key": ((B, S, 3, H), BF16)}, "a multiple of key heads K, got N=4 and K=3"),
        ({"scale": ((1,), F32)}, r"`scale` F32\[\], got F32\[1\]"),
        ({"query_order": ((B, N, S), S32)}, r"`query_order` S32\[B=2\|1, N=4\|1, T=150\], got S32\[2, 4, 70\]"),
        ({"query_block": 32}, "`query_block` 64 or 128, got query_block=32"),
        ({"bits": ((B, N, R, 8), U32)}, r"`bits` U32\[B=2, N=4, R=3, W=4\], got U32\[2, 4, 3, 8\]"),
        ({"bits": ((B, 1, R, W), U32)}, r"`bits` .*, got U32\[2, 1, 3, 4\]"),
        ({"counts": ((B, N, R), U32)}, r"`counts` S32\[B=2, N=4, R=3\], got U32"),
    ],
)
def test_the_handlers_name_what_is_wrong(library, name, changed, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(name, **changed)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("exact_mask", {"lse": ((B, T, N), F32)}, r"`lse` F32\[B=2, N=4, T=150\], got F32\[2, 150, 4\]"),
        ("exact_mass", {"lse": ((B, N, T), BF16)}, r"`lse` F32\[.*, got BF16"),
        ("exact_mask", {"log_threshold": ((K,), F32)}, r"`log_threshold` F32\[N=4\], got F32\[2\]"),
        ("mean_mask", {"log_threshold": ((N,), BF16)}, r"`log_threshold` F32\[N=4\], got BF16"),
        (
            "mean_mask",
            {"workspace": ((5,), S32)},
            r"`workspace` S32\[mean_workspace_size=156908\], got S32\[5\]",
        ),
        ("mean_mask", {"num_means": 3}, "`num_means` 1, 2, 4 or 8, got num_means=3"),
        ("mean_mask", {"num_means": 16}, "`num_means` 1, 2, 4 or 8, got num_means=16"),
        ("mean_mask", {"workspace_heads": 0}, "`workspace_heads` of at least 1 .*, got workspace_heads=0"),
        ("mean_mask", {"rule": -1}, "`rule` 0, 1 or 2, got rule=-1"),
        ("exact_mass", {"workspace": ((5,), F32)}, r"`workspace` F32\[.*=776\], got F32\[5\]"),
        ("exact_mass", {"workspace_heads": 0}, "`workspace_heads` of at least 1, got workspace_heads=0"),
        ("exact_mass", {"rule": 3}, "`rule` 0, 1 or 2, got rule=3"),
        ("exact_mass", {"value": float("nan")}, "`value` finite and not negative, got value=-?nan"),
        ("exact_mass", {"min_keys": -1}, "not negative, got 0, -1 and 70"),
        ("exact_mass", {"head_floor": 1.5}, "`head_floor` from 0 to 1, got head_floor=1.5"),
    ],
)
def test_what_is_wrong_for_one_of_them(library, name, changed, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(name, **changed)


def test_a_mask_takes_the_bits_as_they_are(host_kernel):
    query, key, lse = arrays()
    bits, counts = masks.exact_mask(
        query, key, lse, jnp.full((N,), -3.0, F32), None, scale=SCALE, query_block=M, keep_best=False
    )
    mask = SliceMask(bits, None, query_block=M, num_keys=S, num_queries=T)
    mask.check()
    chex.assert_trees_all_equal(mask.counts(), counts)

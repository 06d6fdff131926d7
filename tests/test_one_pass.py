"""Dense attention that finds the next mask on its way: `one_pass_refresh`, and policies with `one_pass`."""

import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from nn_cases import BATCH, FEATURES, HEADS, LENGTH, WIDTH, inputs

from fgattn_jax import attention, attention_with_lse
from fgattn_jax.nn import LinenSliceAttentionFn, NNXSliceAttentionFn, SliceMaskCache, _cached_step
from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor, RefreshPolicy, one_pass_refresh

SIZES = {"batch": BATCH, "num_heads": HEADS, "num_queries": LENGTH}
SHAPE = (BATCH, LENGTH, HEADS, WIDTH)
ORDER = np.random.default_rng(0).permutation(LENGTH)
PREDICTORS = {
    "default": ExactPredictor(16),
    "threshold, order and kept keys": ExactPredictor(
        16, query_order=ORDER, budget=Budget(threshold=0.1, keep=(-1, 3), min_keys=0)
    ),
}
EVERY_2 = RefreshPolicy(every=2, one_pass=True)
PEAKS = ExactPredictor(16, budget=Budget(threshold=0.05))


@nnx.jit
def attend(sparse, *call, **step):
    return sparse.attend(*call, **step)


def arrays(seed=0):
    return tuple(2 * inputs(3 * seed + i, SHAPE) for i in range(3))


@pytest.mark.parametrize("scale", [None, 0.3, -0.2])
@pytest.mark.parametrize("name", PREDICTORS)
def test_it_is_dense_attention_and_the_predictor_by_the_lse_that_is_given(name, scale):
    query, key, value = arrays()
    predictor, last = PREDICTORS[name], attention_with_lse(*arrays(1), scale=scale).lse
    found = one_pass_refresh(predictor, query, key, value, last, scale=scale)
    output, lse = attention_with_lse(query, key, value, scale=scale)
    chex.assert_trees_all_close((found.output, found.lse), (output, lse), rtol=1e-6)
    expected = predictor(query, key, last, scale=scale)
    chex.assert_trees_all_equal(found.mask, expected)
    assert (expected.bits != predictor(query, key, lse, scale=scale).bits).any()


def test_output_and_lse_have_gradients_and_the_given_lse_has_none():
    query, key, value = arrays()
    last = attention_with_lse(*arrays(1)).lse
    cotangents = jax.random.normal(jax.random.key(5), SHAPE), jax.random.normal(jax.random.key(6), last.shape)

    def one_pass(*operands):
        return one_pass_refresh(PEAKS, *operands)[:2]

    *grads, of_last = jax.vjp(one_pass, query, key, value, last)[1](cotangents)
    expected = jax.vjp(lambda *x: tuple(attention_with_lse(*x)), query, key, value)[1](cotangents)
    chex.assert_trees_all_close(tuple(grads), expected, atol=1e-5)
    assert not of_last.any()


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        (MeanQueryPredictor(16), "`ExactPredictor` with statistic='peak' for one pass, got MeanQueryPredictor"),
        (ExactPredictor(16, statistic="mass"), "got statistic='mass'"),
        (ExactPredictor(16, budget=Budget(top_k=3)), r"a threshold alone for one pass, got Budget\(.*top_k=3"),
        (ExactPredictor(16, budget=Budget(top_p=0.5)), r"a threshold alone .* got Budget\(.*top_p=0.5"),
        (ExactPredictor(16, budget=Budget(threshold=0.1, min_keys=2)), "min_keys=2"),
        (ExactPredictor(16, budget=Budget(max_keys=7)), "max_keys=7"),
        (ExactPredictor(16, budget=Budget(head_floor=0.5)), "head_floor=0.5"),
    ],
    ids=str,
)
def test_predictors_that_need_all_scores_at_once_are_refused(predictor, message):
    with pytest.raises(ValueError, match=message):
        one_pass_refresh(predictor, *arrays(), jnp.zeros((BATCH, HEADS, LENGTH)))
    with pytest.raises(ValueError, match=message):
        NNXSliceAttentionFn(predictor, EVERY_2, **SIZES)
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=LinenSliceAttentionFn(predictor, EVERY_2))
    with pytest.raises(ValueError, match=message):
        layer.init(jax.random.key(0), inputs())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lse": None}, r"`lse` \[B, N, T\], got None"),
        (
            {"lse": jnp.zeros((BATCH, LENGTH, HEADS))},
            r"`lse` of shape \[B, N, T\]=\(2, 2, 40\), got shape=\(2, 40, 2\)",
        ),
        ({"lse": jnp.zeros((BATCH, HEADS, LENGTH), jnp.bfloat16)}, "`lse` in float32, got dtype=bfloat16"),
        ({"value": jnp.zeros((BATCH, 3, HEADS, WIDTH))}, "`key` and `value` must have the same shape"),
        ({"scale": float("inf")}, "`scale` must be finite"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    query, key, value = arrays()
    given = {"query": query, "key": key, "value": value, "lse": jnp.zeros((BATCH, HEADS, LENGTH))} | changes
    with pytest.raises(ValueError, match=message):
        one_pass_refresh(PEAKS, **given)


def test_the_policy_takes_a_boolean_and_says_what_it_does():
    with pytest.raises(ValueError, match="True or False for `one_pass`, got one_pass=1"):
        RefreshPolicy(one_pass=1)
    assert "in one pass after the first" in EVERY_2.describe()
    assert RefreshPolicy(every=2).describe() in EVERY_2.describe()


def run_by_hand(calls, policy, predictor):
    """Outputs, masks and LSE of every step, as the policy's schedule has it."""
    last, mask, steps = None, None, []
    for kind, (query, key, value) in zip(policy.schedule(len(calls)), calls, strict=True):
        output, lse = attention_with_lse(query, key, value)
        if kind == "dense":
            lse = last
        elif kind == "cached":
            output, lse = attention_with_lse(query, key, value, mask)
            lse = jnp.where(lse > -jnp.inf, lse, last)
        else:
            mask = predictor(query, key, lse if last is None else last)
        last = lse
        steps.append((output, mask, lse))
    return steps


@pytest.mark.parametrize(
    "policy",
    [EVERY_2, RefreshPolicy(every=1, one_pass=True), RefreshPolicy(steps=(2, 3), dense_first=1, one_pass=True)],
    ids=lambda policy: policy.describe(),
)
def test_refreshes_but_the_first_take_the_lse_of_the_step_before(policy):
    sparse = NNXSliceAttentionFn(PEAKS, policy, **SIZES)
    calls = [arrays(seed) for seed in range(5)]
    changed = False
    for call, (output, mask, lse) in zip(calls, run_by_hand(calls, policy, PEAKS), strict=True):
        chex.assert_trees_all_close(attend(sparse, *call), output, atol=2e-6)
        if mask is not None:
            chex.assert_trees_all_equal(sparse.bits[...], mask.bits)
            chex.assert_trees_all_close(sparse.lse[...], lse, rtol=1e-6)
            changed |= bool((mask.bits != PEAKS(*call[:2], attention_with_lse(*call).lse).bits).any())
    assert changed  # else the LSE would not matter


def test_with_the_same_inputs_again_one_pass_and_two_make_the_same_masks():
    call = arrays()
    bits = []
    for one_pass in (True, False):
        sparse = NNXSliceAttentionFn(PEAKS, RefreshPolicy(every=1, one_pass=one_pass), **SIZES)
        for _ in range(3):
            attend(sparse, *call)
        assert int(sparse.num_refreshes[...]) == 3
        bits.append(sparse.bits[...])
    chex.assert_trees_all_equal(*bits)


def test_rows_that_a_mask_leaves_empty_do_not_stay_so():
    predictor = ExactPredictor(16, budget=Budget(threshold=0.3, min_keys=0))
    sparse = NNXSliceAttentionFn(predictor, EVERY_2, **SIZES)
    query, key, value = arrays()
    flat = 1e-3 * query
    attend(sparse, flat, key, value)
    assert not sparse.bits[...].any()
    first = attention_with_lse(flat, key, value).lse
    assert not attend(sparse, query, key, value).any()  # the mask keeps nothing
    chex.assert_trees_all_close(sparse.lse[...], first, rtol=1e-6)
    attend(sparse, query, key, value)
    chex.assert_trees_all_equal(sparse.bits[...], predictor(query, key, first).bits)
    assert sparse.bits[...].any()


def test_a_new_run_begins_with_two_passes():
    sparse = NNXSliceAttentionFn(PEAKS, EVERY_2, **SIZES)
    for step in range(3):
        attend(sparse, *arrays(step), step=step)
    again = arrays(7)
    expected = PEAKS(*again[:2], attention_with_lse(*again).lse).bits
    attend(sparse, *again, step=0)
    chex.assert_trees_all_equal(sparse.bits[...], expected)
    attend(sparse, *arrays(1))
    sparse.reset()
    assert not sparse.lse[...].any()
    attend(sparse, *again)
    chex.assert_trees_all_equal(sparse.bits[...], expected)


def test_no_lse_is_carried_without_one_pass():
    assert NNXSliceAttentionFn(PEAKS, RefreshPolicy(every=2), **SIZES).lse is None
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=LinenSliceAttentionFn(PEAKS, RefreshPolicy(every=2)))
    assert "lse" not in layer.init(jax.random.key(0), inputs())["slice_mask"]["attention_fn"]


def test_a_layer_that_is_always_dense_takes_the_option():
    sparse = NNXSliceAttentionFn(PEAKS, EVERY_2, dense=True, **SIZES)
    flagged = NNXSliceAttentionFn(PEAKS, EVERY_2, dense=jnp.array(True), **SIZES)
    for layer in (sparse, flagged):
        for step in range(3):
            call = arrays(step)
            chex.assert_trees_all_close(attend(layer, *call), attention(*call), atol=2e-6)
        assert not layer.num_refreshes[...]


def flax_layer(policy):
    sparse = NNXSliceAttentionFn(PEAKS, policy, **SIZES)
    options = {"decode": False, "attention_fn": sparse, "rngs": nnx.Rngs(0)}
    return nnx.MultiHeadAttention(HEADS, FEATURES, **options)


@nnx.jit
def step(layer, x):
    return x - 0.5 * layer(x)


@functools.partial(jax.jit, static_argnums=0)
def denoise(graph, params, cache, rest, x):
    def body(carry, _):
        x, cache = carry
        layer = nnx.merge(graph, *(jax.tree.map(lambda leaf: leaf, state) for state in (params, cache, rest)))
        x = x - 0.5 * layer(x)
        return (x, nnx.state(layer, SliceMaskCache)), None

    return jax.lax.scan(body, (x, cache), None, length=5)[0]


def test_the_lse_goes_through_a_scan_over_steps():
    x = 3 * inputs()
    graph, params, cache, rest = nnx.split(flax_layer(EVERY_2), nnx.Param, SliceMaskCache, ...)
    scanned, last = denoise(graph, params, cache, rest, x)
    layer = flax_layer(EVERY_2)
    sparse = layer.attention_fn
    assert isinstance(sparse, NNXSliceAttentionFn)
    assert sparse.lse is not None
    for _ in range(5):
        x = step(layer, x)
    chex.assert_trees_all_close(scanned, x, atol=1e-5)
    chex.assert_trees_all_close(last["attention_fn"]["lse"][...], sparse.lse[...], atol=1e-5)
    chex.assert_trees_all_equal(last["attention_fn"]["bits"][...], sparse.bits[...])


def test_branches_of_guidance_keep_an_lse_each():
    graph, params, cache, rest = nnx.split(flax_layer(EVERY_2), nnx.Param, SliceMaskCache, ...)
    starts = [3 * inputs(0), 2 * inputs(1)]
    alone = [denoise(graph, params, cache, rest, x) for x in starts]
    # In turns, step by step, each with its own copy of the cache.
    caches, xs = [jax.tree.map(lambda leaf: leaf, cache) for _ in starts], list(starts)
    for _ in range(5):
        for branch in range(2):
            layer = nnx.merge(graph, params, caches[branch], rest)
            xs[branch] = step(layer, xs[branch])
            caches[branch] = nnx.state(layer, SliceMaskCache)
    for branch, (x, last) in enumerate(alone):
        chex.assert_trees_all_close(xs[branch], x, atol=1e-5)
        chex.assert_trees_all_close(
            caches[branch]["attention_fn"]["lse"][...], last["attention_fn"]["lse"][...], atol=1e-5
        )
    different = [last["attention_fn"]["lse"][...] for _, last in alone]
    assert not np.allclose(*different, atol=0.1)


def test_linen_keeps_the_lse_in_its_collection():
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=LinenSliceAttentionFn(PEAKS, EVERY_2))
    variables = layer.init(jax.random.key(0), inputs())
    kept = variables["slice_mask"]
    assert not kept["attention_fn"]["lse"].any()
    run = jax.jit(
        lambda kept, x: layer.apply({"params": variables["params"], "slice_mask": kept}, x, mutable=["slice_mask"])
    )
    called = []
    real = _cached_step.attend

    def noting(query, key, value, state, **rest):
        called.append((query, key, value))
        return real(query, key, value, state, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cached_step, "attend", noting)
        for seed in range(4):
            layer.apply(variables, 3 * inputs(seed), mutable=["slice_mask"])
    for seed, (_, mask, lse) in enumerate(run_by_hand(called, EVERY_2, PEAKS)):
        _, new = run(kept, 3 * inputs(seed))
        kept = new["slice_mask"]
        chex.assert_trees_all_equal(kept["attention_fn"]["mask"].bits, mask.bits)
        chex.assert_trees_all_close(kept["attention_fn"]["lse"], lse, rtol=1e-5)


def test_a_linen_collection_without_an_lse_is_refused():
    two, one = (
        linen.MultiHeadDotProductAttention(HEADS, attention_fn=LinenSliceAttentionFn(PEAKS, policy))
        for policy in (RefreshPolicy(every=2), EVERY_2)
    )
    variables = two.init(jax.random.key(0), inputs())
    with pytest.raises(ValueError, match="expected `lse` in the collection 'slice_mask'"):
        one.apply(variables, inputs(), mutable=["slice_mask"])


def test_the_readme_shows_the_benchmarks_rows():
    from benchmarks import one_pass
    from fgattn_jax.evaluation import tables

    root = Path(__file__).resolve().parent.parent
    assert one_pass.summary(tables.read_rows(root / one_pass.ROWS)) in (root / "benchmarks" / "README.md").read_text()


@pytest.mark.slow
def test_the_benchmark_compares_both_ways_and_says_so(capsys, tmp_path):
    from benchmarks import one_pass

    path = tmp_path / "rows.json"
    options = ["--frames", "2", "--steps", "4", "--every", "2", "--shares", "0.5", "--rows", str(path)]
    assert one_pass.main(options) == 0
    two, one, refresh = json.loads(path.read_text())
    assert (two["passes"], one["passes"], refresh["step"]) == (2, 1, 2)
    assert 0 < two["density"] < 1
    assert min(two["psnr"], one["psnr"]) > 30
    assert 0.5 < refresh["jaccard_least"] <= refresh["jaccard"] < 1
    assert 0 <= refresh["missing"] < 0.5
    assert one_pass.main(["--summary", "--rows", str(path)]) == 0
    assert "psnr_to_two_passes" in capsys.readouterr().out

"""The NNX attention object in unmodified `flax.nnx.MultiHeadAttention` layers."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nn_cases import BATCH, FEATURES, HEADS, LENGTH, PATHS, WIDTH, PositiveKeys, inputs, policy_log, show_paths

from fgattn_jax.errors import UnsupportedError
from fgattn_jax.nn import DenseLayerFlag, NNXSliceAttentionFn, SliceMaskCache
from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor, RefreshPolicy

SIZES = {"batch": BATCH, "num_heads": HEADS, "num_queries": LENGTH}


def make(predictor=None, policy=None, *, layer_options=None, **changes):
    """A layer and the attention object inside it."""
    sparse = NNXSliceAttentionFn(predictor or PositiveKeys(), policy, **(SIZES | changes))
    return flax_layer(attention_fn=sparse, **(layer_options or {})), sparse


def flax_layer(**options):
    options = {"num_heads": HEADS, "in_features": FEATURES, "decode": False} | options
    return nnx.MultiHeadAttention(**options, rngs=nnx.Rngs(0))


@nnx.jit
def call(layer, x):
    return layer(x)


@nnx.jit
def call_with(layer, x, keep):
    return layer(x, mask=keep)


def dense_result(x, keep=None, **options):
    """What the layer, with the same parameters, gives with Flax's own attention and a boolean mask."""
    return call_with(flax_layer(**options), x, keep)


def kept_by_hand(layer, x):
    """The keys that `PositiveKeys` keeps for these inputs, `[B, N, 1, S]`."""
    kept = np.array(layer.key(x)[..., 0] > 0)
    kept[:, 0] = True
    return jnp.asarray(np.swapaxes(kept, 1, 2)[:, :, None])


@pytest.mark.parametrize(
    "predictor",
    [
        ExactPredictor(16, statistic="mass", budget=Budget(top_k=LENGTH)),
        MeanQueryPredictor(16, query_order=np.arange(LENGTH)[::-1], budget=Budget(top_k=LENGTH)),
    ],
    ids=["exact", "mean query in another order"],
)
def test_a_full_mask_gives_the_layers_own_dense_result(predictor):
    layer, sparse = make(predictor)
    for seed in (0, 1):  # the refresh, then a cached step
        x = inputs(seed)
        chex.assert_trees_all_close(call(layer, x), dense_result(x), atol=2e-6)
    assert float(sparse.density()) == 1.0
    assert int(sparse.num_refreshes[...]) == 1


@pytest.mark.parametrize("wants_lse", [True, False])
def test_cached_steps_use_the_mask_of_the_refresh_whatever_the_inputs_are(wants_lse):
    layer, sparse = make(PositiveKeys(wants_lse=wants_lse, reverse=True))
    first, second = inputs(0), inputs(1)
    refreshed = call(layer, first)
    kept = kept_by_hand(layer, first)
    # With an LSE the refresh is a dense step; without one it uses the new mask.
    expected = dense_result(first, jnp.ones_like(kept) if wants_lse else kept)
    chex.assert_trees_all_close(refreshed, expected, atol=2e-6)
    assert (kept != kept_by_hand(layer, second)).any()
    chex.assert_trees_all_close(call(layer, second), dense_result(second, kept), atol=2e-6)
    np.testing.assert_array_equal(sparse.mask.to_dense(), np.broadcast_to(kept, (BATCH, HEADS, LENGTH, LENGTH)))


def test_cached_steps_read_no_skipped_key():
    sparse = NNXSliceAttentionFn(PositiveKeys(), **SIZES)
    run = nnx.jit(lambda sparse, query, key: sparse.attend(query, key, key))
    query, key = inputs(2, (BATCH, LENGTH, HEADS, WIDTH)), inputs(3, (BATCH, LENGTH, HEADS, WIDTH))
    run(sparse, query, key)
    kept = sparse.mask.to_dense()[:, :, 0].swapaxes(1, 2)[..., None]
    assert not kept.all()
    assert np.isfinite(run(sparse, query, jnp.where(kept, key, jnp.nan))).all()
    assert np.isnan(run(sparse, query, jnp.where(kept, jnp.nan, key))).all()


@pytest.mark.parametrize("wants_lse", [True, False])
@pytest.mark.parametrize(
    "policy",
    [
        RefreshPolicy(),
        RefreshPolicy(every=3),
        RefreshPolicy(steps=(1, 4)),
        RefreshPolicy(every=2, dense_first=2),
        RefreshPolicy(max_age=1),
    ],
    ids=lambda policy: policy.describe(),
)
def test_steps_are_what_the_policy_says(policy, wants_lse, monkeypatch):
    show_paths(monkeypatch)
    sparse = NNXSliceAttentionFn(PositiveKeys(wants_lse=wants_lse), policy, **SIZES)
    run = nnx.jit(lambda sparse, x: sparse.attend(x, x, x))
    log, bits, paths = [], [np.zeros(sparse.bits[...].shape, np.uint32)], []
    for step in range(6):
        output = run(sparse, inputs(step, (BATCH, LENGTH, HEADS, WIDTH)))
        paths.append(float(output.min()))
        log.append((int(sparse.num_refreshes[...]), int(sparse.age[...])))
        bits.append(np.asarray(sparse.bits[...]))
    kinds = policy.schedule(6)
    assert log == policy_log(policy, 6)
    assert int(sparse.num_steps[...]) == 6
    changed = [bool((after != before).any()) for before, after in itertools.pairwise(bits)]
    assert changed == [kind == "refresh" for kind in kinds]
    assert paths == [PATHS["cached" if kind == "refresh" and not wants_lse else kind] for kind in kinds]


def test_dense_steps_are_dense_and_make_no_mask():
    layer, sparse = make(policy=RefreshPolicy(dense_first=1))
    x = inputs(0)
    chex.assert_trees_all_close(call(layer, x), dense_result(x), atol=2e-6)
    assert int(sparse.num_refreshes[...]) == 0
    assert np.isnan(sparse.density())


@pytest.mark.parametrize("wants_lse", [True, False])
@pytest.mark.parametrize("flag", [True, np.True_, jnp.array(True)], ids=["bool", "numpy", "array"])
def test_dense_layers_are_dense_at_every_step(flag, wants_lse, monkeypatch):
    show_paths(monkeypatch)
    predictor, policy = PositiveKeys(wants_lse=wants_lse), RefreshPolicy(dense_layers=(0,))
    sparse = NNXSliceAttentionFn(predictor, policy, dense=flag, **SIZES)
    run = nnx.jit(lambda sparse, x: sparse.attend(x, x, x))
    for seed in (0, 1):
        assert (run(sparse, inputs(seed, (BATCH, LENGTH, HEADS, WIDTH))) == PATHS["dense"]).all()
    assert int(sparse.num_refreshes[...]) == 0
    sparse.reset()
    assert float(sparse.density()) == 1.0
    assert isinstance(sparse.dense, DenseLayerFlag) == isinstance(flag, jax.Array)


def test_given_steps_may_repeat_and_a_lower_one_starts_a_new_run(monkeypatch):
    show_paths(monkeypatch)
    sparse = NNXSliceAttentionFn(PositiveKeys(), RefreshPolicy(every=3, dense_first=1), **SIZES)

    @nnx.jit
    def run(sparse, x, step):
        return sparse.attend(x, x, x, step=step)

    log = []
    for seed, step in enumerate([0, 1, 1, 2, 4, 4, 0, 0, 1, 2]):
        run(sparse, inputs(seed, (BATCH, LENGTH, HEADS, WIDTH)), step)
        log.append((step, int(sparse.num_refreshes[...]), int(sparse.age[...])))
    assert log == [
        (0, 0, -1),
        (1, 1, 0),
        (1, 1, 0),  # a second evaluation at the step that made the mask
        (2, 1, 1),
        (4, 2, 0),
        (4, 2, 0),
        (0, 2, -1),  # a new run: the mask is dropped,
        (0, 2, -1),
        (1, 3, 0),  # and made anew after the dense steps
        (2, 3, 1),
    ]


def test_reset_forgets_the_mask():
    layer, sparse = make(PositiveKeys(reverse=True))
    call(layer, inputs(0))
    sparse.reset()
    assert np.isnan(sparse.density())
    assert not sparse.bits[...].any()
    call(layer, inputs(1))
    np.testing.assert_array_equal(sparse.mask.to_dense()[:, :, :1], kept_by_hand(layer, inputs(1)))
    assert int(sparse.num_steps[...]) == int(sparse.num_refreshes[...]) == 1


def test_leading_axes_and_grouped_heads():
    layer, sparse = make(batch=4, layer_options={"num_kv_heads": 1})
    x = inputs(0, (2, 2, LENGTH, FEATURES))
    call(layer, x)
    kept = kept_by_hand(layer, x.reshape(4, LENGTH, FEATURES)).reshape(2, 2, 1, 1, LENGTH)
    y = call(layer, x)
    assert y.shape == x.shape
    assert sparse.mask.bits.shape[:2] == (4, HEADS)
    chex.assert_trees_all_close(y, dense_result(x, kept, num_kv_heads=1), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precision_layers(dtype):
    layer, sparse = make(layer_options={"dtype": dtype})
    x = inputs(0)
    call(layer, x)
    y = call(layer, x)
    kept = sparse.mask.to_dense()
    assert y.dtype == dtype
    exact = np.asarray(dense_result(x, kept), np.float64)
    own = np.abs(np.asarray(y, np.float64) - exact).max()
    # `jax.nn` has no float16 products on a CPU: there the bound is bfloat16's, by the ratio of their precisions.
    theirs = np.asarray(dense_result(x, kept, dtype=jnp.bfloat16), np.float64)
    ratio = float(jnp.finfo(dtype).eps / jnp.finfo(jnp.bfloat16).eps)
    flax = ratio * np.abs(theirs - exact).max()
    assert own <= 2 * flax + 4 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize(
    "predictor",
    [
        ExactPredictor(16, budget=Budget(top_k=12)),
        pytest.param(MeanQueryPredictor(16, budget=Budget(top_k=12)), marks=pytest.mark.slow),
    ],
    ids=["exact", "mean query"],
)
def test_gradients_reach_projections_and_inputs(predictor):
    layer, sparse = make(predictor)
    cotangent = inputs(9)

    def gradients(layer, x, keep=None):
        def loss(layer, x):
            return jnp.vdot(layer(x, mask=keep), cotangent)

        return nnx.grad(loss, argnums=(0, 1))(layer, x)

    gradients = nnx.jit(gradients)
    for seed in (0, 1):  # the refresh, then a cached step
        x = inputs(seed)
        parameters, from_input = gradients(layer, x)
        dense = seed == 0 and predictor.needs_lse
        keep = jnp.ones((BATCH, HEADS, LENGTH, LENGTH), bool) if dense else sparse.mask.to_dense()
        expected, expected_input = gradients(flax_layer(), x, keep)
        parameters, expected = nnx.to_pure_dict(parameters), nnx.to_pure_dict(expected)
        assert set(parameters) == {"query", "key", "value", "out"}
        chex.assert_trees_all_close(parameters, expected, rtol=1e-4, atol=1e-4)
        chex.assert_trees_all_close(from_input, expected_input, rtol=1e-4, atol=1e-5)
    assert int(sparse.num_refreshes[...]) == 1
    assert int(sparse.num_steps[...]) == 2


def test_every_variable_but_the_parameters_is_in_the_cache():
    layer, _ = make(PositiveKeys(reverse=True))
    _, params, cache, rest = nnx.split(layer, nnx.Param, SliceMaskCache, ...)
    names = {path[-1] for path, _ in nnx.to_flat_state(cache)}
    assert names == {"bits", "query_order", "num_steps", "age", "num_refreshes"}
    assert jax.tree.leaves(params)
    assert not jax.tree.leaves(rest)


def test_explain_says_what_cached_steps_run():
    _, sparse = make()
    arrays = [jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, WIDTH), jnp.float32)] * 3
    assert sparse.explain(*arrays).implementation == "xla"
    assert sparse.explain(*arrays).spec.query_block == 16
    assert make(implementation="reference")[1].explain(*arrays).implementation == "reference"
    assert make(dense=True)[1].explain(*arrays).spec.query_block is None
    with pytest.raises(ValueError, match="num_queries=40, num_keys=40, got batch=2, num_heads=2, num_queries=41"):
        sparse.explain(jax.ShapeDtypeStruct((BATCH, 41, HEADS, WIDTH), jnp.float32), *arrays[1:])


def test_a_named_implementation_that_cannot_run_raises():
    layer, _ = make(implementation="cuda")
    with pytest.raises(UnsupportedError, match="implementation='cuda' cannot run this call"):
        layer(inputs(0))


class TestRefusals:
    """Each with the layer's own way of asking for it, so that no keyword is lost on the way."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mask": jnp.ones((BATCH, 1, LENGTH, LENGTH), bool)}, r"`mask` of shape=\(2, 1, 40, 40\)"),
            ({"is_causal": True}, "`is_causal`: predicted masks are not causal"),
            ({"sow_weights": True}, "`sow_weights=True`"),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
    )
    def test_layer_options(self, options, message):
        layer, sparse = make()
        with pytest.raises(UnsupportedError, match=message):
            layer(inputs(0), **options)
        assert int(sparse.num_steps[...]) == 0

    def test_dropout(self):
        layer, _ = make(layer_options={"dropout_rate": 0.25})
        with pytest.raises(UnsupportedError, match=r"dropout_rate=0.25 with deterministic=False"):
            layer(inputs(0), deterministic=False)
        with pytest.raises(ValueError, match="got batch=3"):  # past the refusals
            layer(inputs(0, (3, LENGTH, FEATURES)), deterministic=True)

    def test_input_positions(self):
        # Not through the layer: Flax 0.12.8 knows no such argument.
        _, sparse = make()
        x = inputs(0, (BATCH, LENGTH, HEADS, WIDTH))
        with pytest.raises(UnsupportedError, match="`input_positions`: rotate"):
            sparse(x, x, x, input_positions=jnp.arange(LENGTH)[None])

    def test_bias_and_all_reasons_at_once(self):
        _, sparse = make()
        x = inputs(0, (BATCH, LENGTH, HEADS, WIDTH))
        with pytest.raises(UnsupportedError, match=r"`bias` of shape=\(1, 1, 40, 40\).*nor `is_causal`"):
            sparse(x, x, x, bias=jnp.zeros((1, 1, LENGTH, LENGTH)), is_causal=True)

    def test_unknown_keywords(self):
        _, sparse = make()
        x = inputs(0, (BATCH, LENGTH, HEADS, WIDTH))
        unknown = {"window": 3}
        with pytest.raises(TypeError, match="window"):
            sparse(x, x, x, **unknown)


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((3, LENGTH, FEATURES), "made for batch=2, .* got batch=3"),
            (
                (BATCH, 56, FEATURES),
                "num_queries=40, num_keys=40, got batch=2, num_heads=2, num_queries=56, num_keys=56",
            ),
        ],
    )
    def test_other_sizes_than_the_cache(self, shape, message):
        layer, _ = make()
        with pytest.raises(ValueError, match=message):
            layer(inputs(0, shape))

    def test_other_heads_and_keys_than_the_cache(self):
        _, sparse = make()
        x = inputs(0, (BATCH, LENGTH, 4, WIDTH))
        with pytest.raises(ValueError, match=r"num_heads=2, .* got batch=2, num_heads=4"):
            sparse(x, x, x)
        with pytest.raises(ValueError, match="got batch=2, num_heads=2, num_queries=40, num_keys=39"):
            sparse(x[:, :, :2], x[:, 1:, :2], x[:, 1:, :2])

    def test_leading_axes_that_differ(self):
        _, sparse = make()
        x = inputs(0, (BATCH, LENGTH, HEADS, WIDTH))
        with pytest.raises(ValueError, match=r"`query` and `value` with the same leading axes, .*value=\(1, 40"):
            sparse(x, x, x[:1])
        with pytest.raises(ValueError, match=r"`key` with axes .*shape=\(2, 16\)"):
            sparse(x, x[0, 0], x)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"batch": 0}, "`batch` >= 1, got batch=0"),
            ({"num_heads": 2.0}, "`num_heads` >= 1, got num_heads=2.0"),
            ({"num_queries": True}, "`num_queries` >= 1, got num_queries=True"),
            ({"num_keys": -1}, "`num_keys` >= 1, got num_keys=-1"),
            ({"policy": 15}, "`RefreshPolicy` for `policy`, got int"),
            ({"policy": RefreshPolicy(dense_layers=(3,))}, r"names dense_layers=\(3,\), got None"),
            ({"dense": jnp.array([True, False])}, r"one boolean for `dense`, got shape=\(2,\)"),
            ({"dense": jnp.array(1)}, "one boolean for `dense`, got .*dtype=int32"),
            ({"implementation": "fast"}, "got implementation='fast'"),
        ],
    )
    def test_construction(self, changes, message):
        with pytest.raises(ValueError, match=message):
            NNXSliceAttentionFn(PositiveKeys(), **(SIZES | changes))

    def test_a_predictor_that_is_none(self):
        with pytest.raises(ValueError, match="`AbstractPredictor` for `predictor`, got function"):
            NNXSliceAttentionFn(lambda q, k: None, **SIZES)
        with pytest.raises(ValueError, match="`top_k` <= num_keys=40, got top_k=41"):
            NNXSliceAttentionFn(ExactPredictor(16, budget=Budget(top_k=41)), **SIZES)

    @pytest.mark.parametrize(
        ("step", "message"),
        [
            (-1, "`step` >= 0, got step=-1"),
            (1.5, "got step=1.5"),
            (True, "got step=True"),
            (np.arange(2), "got step=array"),
        ],
    )
    def test_steps(self, step, message):
        _, sparse = make()
        x = inputs(0, (BATCH, LENGTH, HEADS, WIDTH))
        with pytest.raises(ValueError, match=message):
            sparse.attend(x, x, x, step=step)

"""The NNX layer: projections, normalisation, rotary tables, masks passed in or predicted."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nn_cases import BATCH, FEATURES, HEADS, LENGTH, PATHS, WIDTH, PositiveKeys, inputs, show_paths

from fgattn_jax import masks
from fgattn_jax.errors import UnsupportedError
from fgattn_jax.nn import SliceAttention, slice_attention
from fgattn_jax.predictors import Budget, ExactPredictor, RefreshPolicy

KEYS = 56
CACHE = {"batch": BATCH, "num_queries": LENGTH}


def make(**options):
    return SliceAttention(**({"in_features": FEATURES, "num_heads": HEADS, "rngs": nnx.Rngs(0)} | options))


@nnx.jit
def call(layer, *args, **options):
    return layer(*args, **options)


def random_mask(num_keys=LENGTH, num_heads=HEADS, query_order=None):
    rng = np.random.default_rng(0)
    rows = rng.random((BATCH, num_heads, -(-LENGTH // 16), num_keys)) < 0.3
    rows[..., 0] = True
    return masks.from_rows(jnp.asarray(rows), query_block=16, num_queries=LENGTH, query_order=query_order)


def turn(x, angles):
    """Channel pairs as complex numbers, turned."""
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def oracle(layer, x, context=None, keep=None, angles=None):
    """The layer in float64 NumPy, from its parameters."""
    state = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    state = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state)
    x = np.asarray(x, np.float64)
    context = x if context is None else np.asarray(context, np.float64)

    def project(name, source):
        return np.einsum("btd,dnh->btnh", source, state[name]["kernel"]) + state[name].get("bias", 0.0)

    query, key, value = project("query", x), project("key", context), project("value", context)
    if "query_norm" in state:
        query, key = (
            z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6) * state[f"{name}_norm"]["scale"]
            for name, z in (("query", query), ("key", key))
        )
    if angles is not None:
        query, key = turn(query, angles), turn(key, angles)
    key, value = (np.repeat(z, query.shape[2] // z.shape[2], axis=2) for z in (key, value))
    scores = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    if keep is not None:
        scores = np.where(np.asarray(keep), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    output = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)
    return np.einsum("btnh,nhe->bte", output, state["out"]["kernel"]) + state["out"].get("bias", 0.0)


def randomized(layer, seed=7):
    """The layer with all parameters random: biases and scales start as zeros and ones, which hide mistakes."""
    params = nnx.state(layer, nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    moved = [leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    nnx.update(layer, jax.tree.unflatten(tree, moved))
    return layer


def test_self_attention_with_all_options():
    layer = randomized(make(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True, use_bias=False, out_features=24))
    order = np.random.default_rng(1).permutation(LENGTH)
    mask = random_mask(num_heads=4, query_order=order)
    angles = np.random.default_rng(2).uniform(0, 6, size=(LENGTH, 8))
    rotary = (jnp.cos(angles), jnp.sin(angles))
    x = inputs(0)
    y = call(layer, x, mask=mask, rotary=rotary)
    assert y.shape == (BATCH, LENGTH, 24)
    np.testing.assert_allclose(y, oracle(layer, x, keep=mask.to_dense(), angles=angles), atol=2e-5)
    with_batch = tuple(jnp.broadcast_to(table, (BATCH, *table.shape)) for table in rotary)
    chex.assert_trees_all_close(call(layer, x, mask=mask, rotary=with_batch), y, atol=1e-6)


def test_cross_attention_with_other_lengths_and_channels():
    layer = randomized(make(context_features=20))
    mask = random_mask(num_keys=KEYS)
    x, context = inputs(0), inputs(1, (BATCH, KEYS, 20))
    y = nnx.jit(lambda layer, x, c, mask: layer(x, c, mask=mask, rotary=lambda q, k: (2 * q, 0.5 * k)))(
        layer, x, context, mask
    )
    np.testing.assert_allclose(y, oracle(layer, x, context, keep=mask.to_dense()), atol=2e-5)


def test_predicted_masks_of_cross_attention_are_cached():
    predictor = ExactPredictor(16, statistic="mass", budget=Budget(top_k=9))
    layer = randomized(make(predictor=predictor, num_keys=KEYS, **CACHE))
    first, second = inputs(1, (BATCH, KEYS, FEATURES)), inputs(2, (BATCH, KEYS, FEATURES))
    assert np.isnan(layer.density())
    np.testing.assert_allclose(call(layer, inputs(0), first), oracle(layer, inputs(0), first), atol=2e-5)
    keep = layer.attention_fn.mask.to_dense()
    assert (keep.sum(-1) == 9).all()
    np.testing.assert_allclose(call(layer, inputs(3), second), oracle(layer, inputs(3), second, keep), atol=2e-5)
    assert abs(float(layer.density()) - 9 / KEYS) < 1e-6
    layer.reset()
    assert np.isnan(layer.density())


def test_dense_on_demand_leaves_the_cache_alone(monkeypatch):
    show_paths(monkeypatch)
    monkeypatch.setattr(slice_attention, "attention", lambda q, k, v: jnp.full_like(q, PATHS["dense"]))
    layer = make(predictor=PositiveKeys(), policy=RefreshPolicy(every=3), **CACHE)
    layer.out.kernel[...] = jnp.eye(FEATURES).reshape(HEADS, WIDTH, FEATURES)
    assert (layer(inputs(0), mask="dense") == PATHS["dense"]).all()
    assert int(layer.attention_fn.num_steps[...]) == 0
    assert (layer(inputs(0)) == PATHS["refresh"]).all()
    assert (layer(inputs(0)) == PATHS["cached"]).all()
    assert (layer(inputs(0), mask="dense") == PATHS["dense"]).all()
    assert (layer(inputs(0), step=jnp.int32(3)) == PATHS["refresh"]).all()
    assert int(layer.attention_fn.num_refreshes[...]) == 2


def test_gradients_reach_every_parameter():
    layer = randomized(make(num_kv_heads=1, qk_norm=True))
    mask, x, cotangent = random_mask(), inputs(0), inputs(9)

    def loss(layer, x, mask):
        return jnp.vdot(layer(x, mask=mask), cotangent)

    grads = nnx.jit(nnx.grad(loss))(layer, x, mask)
    # Against differences of the float64 oracle, along one random direction per parameter.
    rng = np.random.default_rng(3)
    graph, params = nnx.split(layer, nnx.Param)
    for path, variable in nnx.to_flat_state(params):
        value = np.asarray(variable[...])
        direction = rng.normal(size=value.shape)
        losses = []
        for sign in (1, -1):
            moved = nnx.merge(graph, params)
            target = moved
            for name in path[:-1]:
                target = getattr(target, name)
            setattr(target, path[-1], nnx.Param(np.asarray(value + sign * 1e-2 * direction, np.float32)))
            losses.append(np.vdot(oracle(moved, x, keep=mask.to_dense()), np.asarray(cotangent, np.float64)))
        expected = (losses[0] - losses[1]) / 2e-2
        got = np.vdot(np.asarray(dict(nnx.to_flat_state(grads))[path][...], np.float64), direction)
        # The keys' bias moves all scores of a query alike, where nothing normalises them: here it counts.
        np.testing.assert_allclose(got, expected, rtol=2e-2, atol=2e-2, err_msg=str(path))


def test_parameter_and_computation_dtypes():
    layer = make(dtype=jnp.bfloat16, qk_norm=True, num_kv_heads=1)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    y = nnx.eval_shape(lambda layer, x, mask: layer(x, mask=mask), layer, inputs(0), random_mask())
    assert y.dtype == jnp.bfloat16
    stored = make(param_dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(nnx.state(stored, nnx.Param)))


def test_explain():
    assert make().explain(random_mask()).implementation == "xla"
    predicting = make(predictor=PositiveKeys(), num_keys=KEYS, num_kv_heads=1, dtype=jnp.bfloat16, **CACHE)
    spec = predicting.explain().spec
    assert (spec.batch, spec.num_queries, spec.num_keys, spec.num_heads, spec.num_kv_heads) == (2, 40, 56, 2, 1)
    assert (spec.head_dim, spec.dtype, spec.query_block) == (WIDTH, "bfloat16", 16)
    assert make(implementation="reference").explain(random_mask()).implementation == "reference"
    with pytest.raises(ValueError, match="expected a `mask` in a layer without a predictor"):
        make().explain()


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_heads": 3}, "in_features=32 to be a multiple of num_heads=3"),
            ({"num_heads": 4, "num_kv_heads": 3}, "got num_heads=4 and num_kv_heads=3"),
            ({"num_heads": 0}, "got num_heads=0 and num_kv_heads=0"),
            ({"batch": 2, "policy": RefreshPolicy()}, "`predictor` with `policy`, `batch`, got predictor=None"),
            ({"dense": True}, "`predictor` with `dense`, got predictor=None"),
            ({"predictor": PositiveKeys(), "num_queries": 40}, "expected `batch` with a `predictor`, got None"),
            ({"predictor": PositiveKeys()}, "expected `batch` and `num_queries` with a `predictor`"),
            ({"implementation": "flash"}, "got implementation='flash'"),
        ],
    )
    def test_construction(self, options, message):
        with pytest.raises(ValueError, match=message):
            make(**options)

    @pytest.mark.parametrize(
        ("args", "options", "message"),
        [
            ((inputs(0)[0],), {}, r"`inputs` \[batch, length, channels\], got shape=\(40, 32\)"),
            ((inputs(0)[..., :31],), {}, r"`inputs` with 32 channels, got shape=\(2, 40, 31\)"),
            ((inputs(0), inputs(0)[..., :30]), {}, r"`context` with 32 channels, got shape=\(2, 40, 30\)"),
            ((inputs(0),), {"mask": "sparse"}, "got mask='sparse'"),
            ((inputs(0),), {"mask": jnp.ones((LENGTH, LENGTH), bool)}, 'SliceMask, "dense" or None for `mask`, got'),
            ((inputs(0),), {"mask": random_mask(KEYS)}, "num_keys=56, but the arrays have num_keys=40"),
            ((inputs(0),), {"step": 3}, "`step` only where a mask is predicted, got step=3"),
            ((inputs(0),), {"rotary": (jnp.ones((40, 4)), jnp.ones((40, 8)))}, r"`cos` of shape .*got shape=\(40, 4\)"),
            ((inputs(0),), {"rotary": (jnp.ones((40, 8)), jnp.ones((3, 40, 8)))}, r"`sin` .* got shape=\(3, 40, 8\)"),
            ((inputs(0), inputs(0)), {"rotary": (jnp.ones((40, 8)),) * 2}, "function for `rotary` in cross-attention"),
        ],
    )
    def test_calls(self, args, options, message):
        with pytest.raises(ValueError, match=message):
            make()(*args, **({"mask": random_mask()} | options))

    def test_no_mask_and_no_predictor(self):
        with pytest.raises(ValueError, match="expected a `mask` in a layer without a predictor, got None"):
            make()(inputs(0))

    def test_a_mask_and_a_predictor(self):
        layer = make(predictor=PositiveKeys(), **CACHE)
        with pytest.raises(ValueError, match="expected no `mask` in a layer with a predictor"):
            layer(inputs(0), mask=random_mask())
        with pytest.raises(ValueError, match="`step` only where a mask is predicted, got step=1"):
            layer(inputs(0), mask="dense", step=1)
        with pytest.raises(ValueError, match="`step` >= 0, got step=-2"):
            layer(inputs(0), step=-2)

    def test_other_lengths_than_the_cache(self):
        layer = make(predictor=PositiveKeys(), num_keys=KEYS, **CACHE)
        with pytest.raises(ValueError, match="num_keys=56, got batch=2, num_heads=2, num_queries=40, num_keys=40"):
            layer(inputs(0))

    def test_context_features_without_a_context(self):
        with pytest.raises(ValueError, match=r"`context` with 20 channels, .*there is no context"):
            make(context_features=20)(inputs(0), mask="dense")

    @pytest.mark.parametrize("method", ["density", "reset"])
    def test_cache_methods_without_a_predictor(self, method):
        with pytest.raises(ValueError, match=f"`{method}` needs a layer with a `predictor`"):
            getattr(make(), method)()

    def test_an_odd_head_width_and_rotary_tables(self):
        tables = (jnp.ones((LENGTH, 8)),) * 2
        with pytest.raises(ValueError, match="even head width for rotary tables, got head_dim=17"):
            make(head_dim=17)(inputs(0), mask=random_mask(), rotary=tables)

    def test_a_named_implementation_that_cannot_run(self):
        with pytest.raises(UnsupportedError, match="implementation='cuda' cannot run this call"):
            make(implementation="cuda")(inputs(0), mask=random_mask())

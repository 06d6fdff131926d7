"""The Linen attention object in unmodified `flax.linen.MultiHeadDotProductAttention` layers."""

import inspect
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from nn_cases import BATCH, FEATURES, HEADS, LENGTH, PATHS, WIDTH, PositiveKeys, inputs, policy_log, show_paths

from fgattn_jax.errors import UnsupportedError
from fgattn_jax.nn import LinenSliceAttentionFn
from fgattn_jax.predictors import Budget, ExactPredictor, RefreshPolicy


def make(predictor=None, policy=None, *, layer_options=None, **changes):
    sparse = LinenSliceAttentionFn(predictor or PositiveKeys(), policy, **changes)
    return nn.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=sparse, **(layer_options or {}))


PLAIN = nn.MultiHeadDotProductAttention(num_heads=HEADS)


@pytest.fixture(scope="module")
def params():
    return jax.jit(PLAIN.init)(jax.random.key(0), inputs(0))["params"]


def fresh_masks(layer, x):
    """The collection before the first step, from the shapes that `init` makes: nothing runs."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["slice_mask"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def apply_of(layer):
    @jax.jit
    def apply(params, masks, x):
        y, updated = layer.apply({"params": params, "slice_mask": masks}, x, mutable=["slice_mask"])
        return y, updated["slice_mask"]

    return apply


def dense_result(params, x, keep=None):
    return PLAIN.apply({"params": params}, x, mask=keep)


def test_refresh_is_dense_and_cached_steps_use_its_mask(params):
    layer = make(PositiveKeys(reverse=True))
    apply, masks = apply_of(layer), fresh_masks(layer, inputs(0))
    y, masks = apply(params, masks, inputs(0))
    chex.assert_trees_all_close(y, dense_result(params, inputs(0)), atol=2e-6)
    kept = masks["attention_fn"]["mask"].to_dense()
    assert 0.2 < kept.mean() < 0.8
    y, masks = apply(params, masks, inputs(1))
    chex.assert_trees_all_close(y, dense_result(params, inputs(1), kept), atol=2e-6)
    np.testing.assert_array_equal(masks["attention_fn"]["mask"].to_dense(), kept)
    assert {name: int(masks["attention_fn"][name]) for name in ("num_steps", "age", "num_refreshes")} == {
        "num_steps": 2,
        "age": 1,
        "num_refreshes": 1,
    }
    # All zeros is a fresh start.
    _, masks = apply(params, jax.tree.map(jnp.zeros_like, masks), inputs(1))
    assert (masks["attention_fn"]["mask"].to_dense() != kept).any()
    assert int(masks["attention_fn"]["num_refreshes"]) == 1


def test_a_full_mask_gives_the_layers_own_dense_result(params):
    layer = make(ExactPredictor(16, statistic="mass", budget=Budget(top_k=LENGTH)))
    apply, masks = apply_of(layer), fresh_masks(layer, inputs(0))
    for seed in (0, 1):
        y, masks = apply(params, masks, inputs(seed))
        chex.assert_trees_all_close(y, dense_result(params, inputs(seed)), atol=2e-6)
    assert float(masks["attention_fn"]["mask"].density()) == 1.0


@pytest.mark.slow
def test_gradients_reach_the_parameters(params):
    layer, cotangent = make(PositiveKeys(wants_lse=False)), inputs(9)
    masks = fresh_masks(layer, inputs(0))

    @jax.jit
    def gradients(params, masks, x):
        def loss(params, x):
            y, updated = layer.apply({"params": params, "slice_mask": masks}, x, mutable=["slice_mask"])
            return jnp.vdot(y, cotangent), updated["slice_mask"]

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    got, masks = gradients(params, masks, inputs(0))
    kept = masks["attention_fn"]["mask"].to_dense()
    expected = jax.grad(lambda p, x: jnp.vdot(dense_result(p, x, kept), cotangent), argnums=(0, 1))(params, inputs(0))
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [None, RefreshPolicy(every=2, dense_first=1)], ids=["once", "every 2"])
def test_steps_are_what_the_policy_says(policy, monkeypatch):
    show_paths(monkeypatch)
    sparse = LinenSliceAttentionFn(PositiveKeys(), policy)
    x = [inputs(seed, (BATCH, LENGTH, HEADS, WIDTH)) for seed in range(5)]
    masks: Any = sparse.init(jax.random.key(0), x[0], x[0], x[0])["slice_mask"]
    assert not any(leaf.any() for leaf in jax.tree.leaves(masks))  # `init` is no step
    apply = jax.jit(lambda masks, x: sparse.apply({"slice_mask": masks}, x, x, x, mutable=["slice_mask"]))
    paths, log, bits = [], [], [masks["mask"].bits]
    for array in x:
        output, masks = apply(masks, array)
        masks = masks["slice_mask"]
        paths.append(float(output.min()))
        log.append((int(masks["num_refreshes"]), int(masks["age"])))
        bits.append(masks["mask"].bits)
    policy = policy or RefreshPolicy()
    kinds = policy.schedule(5)
    assert paths == [PATHS[kind] for kind in kinds]
    assert log == policy_log(policy, 5)
    changed = [bool((after != before).any()) for before, after in itertools.pairwise(bits)]
    assert changed == [kind == "refresh" for kind in kinds]


def test_leading_axes_are_folded():
    layer = make()
    x = inputs(0, (3, 2, LENGTH, FEATURES))
    masks = fresh_masks(layer, x)
    assert masks["attention_fn"]["mask"].bits.shape == (6, HEADS, 3, 4)
    assert jax.eval_shape(layer.init, jax.random.key(0), inputs(0))["slice_mask"]["attention_fn"]["mask"].num_keys == 40


def test_no_keyword_of_linen_is_dropped():
    """Linen passes only the keywords that the signature names; one that is missing here would be ignored silently."""
    known = set(inspect.signature(nn.dot_product_attention).parameters)
    assert known <= set(inspect.signature(LinenSliceAttentionFn(PositiveKeys())).parameters)


class QuantizedEinsum(nn.Module):
    def __call__(self, *args, **kwargs):
        return jnp.einsum(*args, **kwargs)


class TestRefusals:
    @pytest.mark.parametrize(
        ("layer_options", "options", "message"),
        [
            ({}, {"mask": jnp.ones((BATCH, 1, 1, LENGTH), bool)}, r"`mask` of shape=\(2, 1, 1, 40\)"),
            ({}, {"sow_weights": True}, "`sow_weights=True`"),
            ({"dropout_rate": 0.5}, {"deterministic": False}, "dropout_rate=0.5 with deterministic=False"),
            ({"qk_attn_weights_einsum_cls": QuantizedEinsum}, {}, "`qk_attn_weights_einsum`: scores are computed"),
            ({"attn_weights_value_einsum_cls": QuantizedEinsum}, {}, "`attn_weights_value_einsum`: scores"),
        ],
        ids=["mask", "sow", "dropout", "score einsum", "value einsum"],
    )
    def test_layer_options(self, layer_options, options, message):
        layer = make(layer_options=layer_options)
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        with pytest.raises(UnsupportedError, match=message):
            jax.eval_shape(lambda: layer.init(keys, inputs(0), **options))

    def test_bias_and_einsum(self):
        x = inputs(0, (BATCH, LENGTH, HEADS, WIDTH))
        sparse = LinenSliceAttentionFn(PositiveKeys())
        with pytest.raises(UnsupportedError, match=r"`bias` of shape=\(1,\).*; nor `einsum_dot_general`"):
            sparse.init(jax.random.key(0), x, x, x, jnp.zeros(1), einsum_dot_general=jax.lax.dot_general)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        sparse = LinenSliceAttentionFn(PositiveKeys())
        for _ in range(2):
            x = nn.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=sparse)(x)
        return x


class TestWrongUse:
    def test_apply_without_the_collection(self, params):
        with pytest.raises(ValueError, match="collection 'slice_mask' in `apply`, got none for attention_fn"):
            make().apply({"params": params}, inputs(0), mutable=["slice_mask"])

    def test_apply_with_an_immutable_collection(self, params):
        layer = make()
        masks = fresh_masks(layer, inputs(0))
        with pytest.raises(ValueError, match="mutable in `apply`, got an immutable one"):
            layer.apply({"params": params, "slice_mask": masks}, inputs(0))

    def test_a_collection_of_other_lengths(self, params):
        # 40 and 41 keys have words of the same shape: only the mask itself knows.
        layer = make()
        masks = fresh_masks(layer, inputs(0))
        x = inputs(0, (BATCH, 41, FEATURES))
        with pytest.raises(ValueError, match=r"num_queries=40, num_keys=40, this call needs .*num_keys=41"):
            layer.apply({"params": params, "slice_mask": masks}, inputs(0), x, mutable=["slice_mask"])

    def test_a_collection_that_is_none(self, params):
        layer = make()
        masks = {"attention_fn": {"mask": jnp.zeros(3), "num_steps": 0, "age": 0, "num_refreshes": 0}}
        with pytest.raises(ValueError, match="expected a SliceMask as `mask` in the collection"):
            layer.apply({"params": params, "slice_mask": masks}, inputs(0), mutable=["slice_mask"])

    def test_one_object_in_two_layers(self):
        with pytest.raises(ValueError, match="one attention object per layer, got one called twice by `init`"):
            jax.eval_shape(Shared().init, jax.random.key(0), inputs(0))

    def test_one_layer_may_be_initialized_again_and_called_twice(self, monkeypatch):
        show_paths(monkeypatch)
        layer = make()
        fresh_masks(layer, inputs(0))
        masks = fresh_masks(layer, inputs(0))
        variables = {"params": jax.eval_shape(layer.init, jax.random.key(0), inputs(0))["params"]}
        variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables) | {"slice_mask": masks}
        bound = layer.bind(variables, mutable=["slice_mask"])
        bound(inputs(0))
        bound(inputs(1))
        assert int(bound.variables["slice_mask"]["attention_fn"]["num_steps"]) == 2

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"policy": 3}, "`RefreshPolicy` for `policy`, got int"),
            ({"policy": RefreshPolicy(dense_layers=(1,))}, r"names dense_layers=\(1,\), got None"),
            ({"implementation": "mosaic"}, "got implementation='mosaic'"),
            ({"predictor": nn.softmax}, "`AbstractPredictor` for `predictor`, got"),
        ],
    )
    def test_settings(self, changes, message):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(make(**changes).init, jax.random.key(0), inputs(0))

    def test_a_named_implementation_that_cannot_run(self, params):
        with pytest.raises(UnsupportedError, match="implementation='pallas' cannot run this call"):
            jax.eval_shape(make(implementation="pallas").init, jax.random.key(0), inputs(0))

"""Stacked layers and denoising loops: scans over layers and over steps give what plain loops give, in one trace."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from nn_cases import BATCH, FEATURES, HEADS, LENGTH, PositiveKeys, inputs

from fgattn_jax.nn import DenseLayerFlag, LinenSliceAttentionFn, NNXSliceAttentionFn, SliceMaskCache
from fgattn_jax.predictors import RefreshPolicy

LAYERS, STEPS = 3, 4
POLICY = RefreshPolicy(every=2, dense_layers=(1,))
# Refreshes at steps 0 and 2; the layer in the middle makes no mask.
EXPECTED = {"num_steps": [4, 4, 4], "age": [1, -1, 1], "num_refreshes": [2, 0, 2]}


class NNXBlock(nnx.Module):
    def __init__(self, rngs, dense):
        sparse = NNXSliceAttentionFn(
            PositiveKeys(), POLICY, batch=BATCH, num_heads=HEADS, num_queries=LENGTH, dense=dense
        )
        self.attention = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, attention_fn=sparse, rngs=rngs)

    def __call__(self, x):
        return x + self.attention(x)


def sparse_of(block) -> NNXSliceAttentionFn:
    return block.attention.attention_fn


def nnx_stack():
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=(0, 0), out_axes=0)
    def make(rngs, dense):
        return NNXBlock(rngs, dense)

    return make(nnx.Rngs(0), jnp.asarray(POLICY.dense_layer_flags(LAYERS)))


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def nnx_forward(block, x):
    return block(x)


def update(x, direction):
    """A step that changes the keys enough to change masks, and keeps values in bounds."""
    return jnp.sin(2.0 * x + direction)


@pytest.mark.slow
def test_nnx_stack_in_nnx_scan_equals_single_layers():
    stack = nnx_stack()
    graph, state = nnx.split(stack)
    layers = [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(LAYERS)]
    step: Any = nnx.jit(chex.assert_max_traces(lambda stack, x: update(x, nnx_forward(stack, x)), n=1))
    layer_step: Any = nnx.jit(chex.assert_max_traces(lambda layer, x: layer(x), n=1))
    x = y = inputs(0)
    for _ in range(STEPS):
        x = step(stack, x)
        before = y
        for layer in layers:
            y = layer_step(layer, y)
        y = update(before, y)
    chex.assert_trees_all_close(x, y, atol=1e-4)
    sparse = sparse_of(stack)
    assert {name: getattr(sparse, name)[...].tolist() for name in EXPECTED} == EXPECTED
    singles = [sparse_of(layer) for layer in layers]
    np.testing.assert_array_equal(sparse.bits[...], jnp.stack([single.bits[...] for single in singles]))
    chex.assert_trees_all_close(sparse.density(), jnp.stack([single.density() for single in singles]))
    assert float(sparse.density()[1]) == 1.0
    assert ((sparse.density()[::2] > 0.2) & (sparse.density()[::2] < 0.8)).all()
    assert sparse.mask.bits.shape == (LAYERS, BATCH, HEADS, 3, 4)
    sparse.reset()
    assert sparse.num_steps[...].tolist() == [0, 0, 0]
    assert isinstance(sparse.dense, DenseLayerFlag)
    assert sparse.dense[...].tolist() == [False, True, False]


def test_nnx_stack_in_lax_scan_over_steps_is_traced_once():
    stack = nnx_stack()
    graph, params, cache, rest = nnx.split(stack, nnx.Param, SliceMaskCache, ...)
    cache = jax.tree.map(lambda leaf: leaf, cache)  # variables of its own: those of a split are the module's

    @jax.jit
    @chex.assert_max_traces(n=1)
    def denoise(params, cache, rest, x):
        def body(carry, _):
            x, cache = carry
            # Variables of the outer trace cannot be merged here: identity maps make new ones.
            states = (jax.tree.map(lambda leaf: leaf, state) for state in (params, cache, rest))
            stack = nnx.merge(graph, *states)
            return (update(x, nnx_forward(stack, x)), nnx.state(stack, SliceMaskCache)), None

        (x, cache), _ = jax.lax.scan(body, (x, cache), None, length=STEPS)
        return x, cache

    step = nnx.jit(lambda stack, x: update(x, nnx_forward(stack, x)))
    for seed in (0, 1):
        x, new_cache = denoise(params, cache, rest, inputs(seed))
        y = inputs(seed)
        sparse_of(stack).reset()
        for _ in range(STEPS):
            y = step(stack, y)
        chex.assert_trees_all_close(x, y, atol=1e-4)
        nnx.update(stack, new_cache)
        sparse = sparse_of(stack)
        assert {name: getattr(sparse, name)[...].tolist() for name in EXPECTED} == EXPECTED


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, dense):
        sparse = LinenSliceAttentionFn(PositiveKeys(), POLICY, dense=dense, name="sparse")
        return x + linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=sparse)(x), None


LinenStack = linen.scan(
    LinenBlock, variable_axes={"params": 0, "slice_mask": 0}, split_rngs={"params": True}, length=LAYERS
)


@pytest.mark.slow
def test_linen_scan_over_layers_in_lax_scan_over_steps_equals_single_layers():
    stack, block = LinenStack(), LinenBlock()
    flags = jnp.asarray(POLICY.dense_layer_flags(LAYERS))
    variables = jax.jit(stack.init)(jax.random.key(0), inputs(0), flags)
    params, masks = variables["params"], variables["slice_mask"]
    assert not any(leaf.any() for leaf in jax.tree.leaves(masks))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def denoise(params, masks, x):
        def body(carry, _):
            x, masks = carry
            variables = {"params": params, "slice_mask": masks}
            (y, _), updated = stack.apply(variables, x, flags, mutable=["slice_mask"])
            return (update(x, y), updated["slice_mask"]), None

        return jax.lax.scan(body, (x, masks), None, length=STEPS)[0]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def layer_step(params, masks, x, flag):
        variables = {"params": params, "slice_mask": masks}
        (x, _), updated = block.apply(variables, x, flag, mutable=["slice_mask"])
        return x, updated["slice_mask"]

    x, final = denoise(params, masks, inputs(0))
    denoise(params, masks, inputs(1))
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], (params, masks)) for i in range(LAYERS)]
    y = inputs(0)
    for _ in range(STEPS):
        before = y
        for i, (layer_params, layer_masks) in enumerate(layers):
            y, layer_masks = layer_step(layer_params, layer_masks, y, flags[i])
            layers[i] = (layer_params, layer_masks)
        y = update(before, y)
    chex.assert_trees_all_close(x, y, atol=1e-4)
    kept = final["sparse"]
    assert {name: kept[name].tolist() for name in EXPECTED} == EXPECTED
    singles = [layer_masks["sparse"]["mask"].bits for _, layer_masks in layers]
    np.testing.assert_array_equal(kept["mask"].bits, jnp.stack(singles))
    assert kept["mask"].bits.shape == (LAYERS, BATCH, HEADS, 3, 4)


@pytest.mark.slow
def test_gradients_through_scanned_and_rematerialised_layers_equal_those_of_single_layers():
    stack, cotangent = nnx_stack(), inputs(9)
    nnx_forward(stack, inputs(0))  # masks for the cached step below
    graph, params, rest = nnx.split(stack, nnx.Param, ...)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def forward(block, x):
        return block(x)

    def scanned(params, x):
        return jnp.vdot(forward(nnx.merge(graph, params, rest, copy=True), x), cotangent)

    def unrolled(params, x):
        for i in range(LAYERS):
            x = nnx.merge(graph, *jax.tree.map(lambda leaf, i=i: leaf[i], (params, rest)))(x)
        return jnp.vdot(x, cotangent)

    got, expected = (jax.jit(jax.grad(loss, argnums=(0, 1)))(params, inputs(1)) for loss in (scanned, unrolled))
    chex.assert_trees_all_close(jax.tree.leaves(got), jax.tree.leaves(expected), rtol=1e-3, atol=1e-3)

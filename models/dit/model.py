"""The video diffusion transformer: scanned adaLN-zero blocks with 3-axis rotary and per-head qk-norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fgattn_jax.models.dit import layers
from fgattn_jax.models.dit.config import CHANNELS, DiTConfig


class DiTOutput(NamedTuple):
    """What one call of `DiT` gives.

    Attributes:
        velocity: `[B, F, Y, X, 3]` float32; the model's estimate of `noise - clip`.
        masks: the predicted masks of all layers (a `SliceMask` whose arrays have a leading layer axis), or None.
    """

    velocity: Float[Array, "B F Y X 3"]
    masks: Any


class Block(nnx.Module):
    """One transformer block: modulated attention and modulated feed-forward, both with gates that start at zero."""

    def __init__(self, config: DiTConfig, *, dtype: jnp.dtype, attention: Any, rngs: nnx.Rngs):
        inner = config.num_heads * config.head_dim
        hidden = config.mlp_ratio * config.width
        self.config, self.dtype, self.attention = config, dtype, attention
        self.qkv = _linear(config.width, 3 * inner, dtype, rngs)
        self.out = _linear(inner, config.width, dtype, rngs)
        self.mlp_in = _linear(config.width, hidden, dtype, rngs)
        self.mlp_out = _linear(hidden, config.width, dtype, rngs)
        self.query_gain = nnx.Param(jnp.ones((config.num_heads, config.head_dim), jnp.float32))
        self.key_gain = nnx.Param(jnp.ones((config.num_heads, config.head_dim), jnp.float32))
        self.modulation_table = nnx.Param(jnp.zeros((6, config.width), jnp.float32))

    def __call__(self, x: Array, modulation: Array, rope: tuple[Array, Array], mask: Any, predictor: Any) -> tuple:
        """Run the block on `x` `[B, T, D]` with modulation `[B, 6, D]`; gives the new `x` and a mask or None."""
        batch, tokens, _ = x.shape
        heads, head_dim = self.config.num_heads, self.config.head_dim
        parts = modulation + self.modulation_table[...]
        shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in jnp.moveaxis(parts, 1, 0))

        y = layers.layer_norm(x) * (1 + scale1) + shift1
        qkv = self.qkv(y.astype(self.dtype)).reshape(batch, tokens, 3, heads, head_dim)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, T, N, H]
        query = layers.rotate(layers.rms_norm(query, self.query_gain[...]), *rope).astype(self.dtype)
        key = layers.rotate(layers.rms_norm(key, self.key_gain[...]), *rope).astype(self.dtype)
        attended, predicted = self.attention(query, key, value, mask, predictor)
        x = x + gate1 * self.out(attended.reshape(batch, tokens, -1)).astype(jnp.float32)

        y = layers.layer_norm(x) * (1 + scale2) + shift2
        y = self.mlp_out(jax.nn.gelu(self.mlp_in(y.astype(self.dtype))))
        return x + gate2 * y.astype(jnp.float32), predicted


class DiT(nnx.Module):
    """A video DiT that estimates the flow-matching velocity, with attention behind one function.

    Blocks are adaLN-zero (Peebles and Xie 2023, section 3.2) with the modulation shared over layers plus one small
    table per layer, as Wan does. Parameters, norms and the residual stream are float32; matrix products run in `dtype`.

    Args:
        config: sizes.
        dtype: dtype of matrix products and attention (bfloat16 on GPUs, float32 elsewhere).
        attention: `(query, key, value, mask, predictor) -> (output, mask or None)`, called once per block. The default
            goes through `fgattn_jax.attention`.
        remat: recompute each block in the backward pass instead of keeping its activations.
        rngs: random keys for the parameters.
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        dtype: Any = jnp.float32,
        attention: Any = layers.slice_attention,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(dtype)
        self.config, self.dtype, self.remat = config, dtype, remat
        self.patch_in = _linear(config.patch_dim, config.width, jnp.dtype(jnp.float32), rngs)
        self.time_in = _linear(config.time_features, config.width, jnp.dtype(jnp.float32), rngs)
        self.time_out = _linear(config.width, config.width, jnp.dtype(jnp.float32), rngs)
        table = 0.02 * jax.random.normal(rngs.params(), (config.num_classes + 1, config.width))
        self.class_table = nnx.Param(table)
        self.modulation = _linear(config.width, 6 * config.width, jnp.dtype(jnp.float32), rngs, zero=True)
        self.final_table = nnx.Param(jnp.zeros((2, config.width), jnp.float32))
        self.patch_out = _linear(config.width, config.patch_dim, jnp.dtype(jnp.float32), rngs, zero=True)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype=dtype, attention=attention, rngs=rngs)

        self.blocks = make_blocks(rngs)

    def __call__(
        self,
        x: Float[Array, "B F Y X 3"],
        t: Float[Array, " B"],
        label: Int[Array, " B"],
        *,
        masks: Any = None,
        predictor: Any = None,
    ) -> DiTOutput:
        """Estimate the velocity `noise - clip` at `x = (1 - t) * clip + t * noise`.

        Args:
            x: noisy clips; any number of frames, rows and columns that holds whole patches.
            t: diffusion time in [0, 1]; 1 is pure noise.
            label: class per clip, `config.null_label` for none. Out-of-range labels are clamped by XLA's gather.
            masks: a `SliceMask` whose arrays carry a leading layer axis; attention then computes kept slices only.
            predictor: called in every layer as `predictor(query, key, lse)`; attention is dense.

        Returns:
            The velocity, and the masks the predictor made (stacked over layers) or None.

        Raises:
            ValueError: shapes do not fit the config or each other, or both `masks` and `predictor` are given.
        """
        grid = self._check(x, t, label)
        if masks is not None and predictor is not None:
            raise ValueError("Give `masks` (reuse) or `predictor` (refresh), not both.")
        tokens = self.patch_in(layers.patchify(x.astype(jnp.float32), self.config.patch))  # [B, T, D]
        embedding = self.time_in(layers.time_features(t, self.config.time_features))
        embedding = self.time_out(jax.nn.silu(embedding)) + self.class_table[...][label]  # [B, D]
        modulation = self.modulation(jax.nn.silu(embedding)).reshape(-1, 6, self.config.width)
        rope = layers.rope_tables(grid, self.config.rope_dims, self.config.rope_theta)
        graph, stacked = nnx.split(self.blocks)

        def run_block(tokens, layer):
            state, mask = layer
            return nnx.merge(graph, state)(tokens, modulation, rope, mask, predictor)

        body = jax.checkpoint(run_block, prevent_cse=False) if self.remat else run_block
        tokens, predicted = jax.lax.scan(body, tokens, (stacked, masks))

        final = embedding[:, None] + self.final_table[...]  # [B, 2, D]
        tokens = layers.layer_norm(tokens) * (1 + final[:, 1:2]) + final[:, 0:1]
        velocity = layers.unpatchify(self.patch_out(tokens), grid, self.config.patch)
        return DiTOutput(velocity, predicted)

    def _check(self, x: Array, t: Array, label: Array) -> tuple[int, int, int]:
        if x.ndim != 5 or x.shape[-1] != CHANNELS:
            raise ValueError(f"`x` must be [B, F, Y, X, {CHANNELS}], got shape={x.shape}.")
        for name, value in (("t", t), ("label", label)):
            if value.shape != x.shape[:1]:
                raise ValueError(f"`{name}` must be [B={x.shape[0]}] like `x`, got shape={value.shape}.")
        if not jnp.issubdtype(label.dtype, jnp.integer):
            raise ValueError(f"`label` must hold integers, got dtype={label.dtype}.")
        return self.config.grid(*x.shape[1:4])


def num_parameters(model: nnx.Module) -> int:
    """Number of values in all parameters of a module."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _linear(features_in: int, features_out: int, dtype: jnp.dtype, rngs: nnx.Rngs, zero: bool = False) -> nnx.Linear:
    init = nnx.initializers.zeros_init() if zero else nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=False,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=init,
        rngs=rngs,
    )

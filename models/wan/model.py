"""The transformer of Wan 2.1: scanned blocks of self-attention, cross-attention and feed-forward.

Every cast stands where diffusers has it for a checkpoint loaded in 16 bits: the time embedding, the tables and the
affine norm have float32 parameters; norms, modulations and gated sums run in float32; all else runs in the model's
dtype. In float32 nothing is cast.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from fgattn_jax.attention import attention as dense_attention
from fgattn_jax.models.video import layers
from fgattn_jax.models.video.attention import VideoAttention, dense
from fgattn_jax.models.video.layers import Linear, Norm
from fgattn_jax.models.video.model import VideoOutput
from fgattn_jax.models.wan.config import WanConfig
from fgattn_jax.nn.rotary import rotate

ROPE_THETA = 10_000.0
Rope = tuple[Float32[Array, "T half"], Float32[Array, "T half"]]


class WanCondition(NamedTuple):
    """What a forward of Wan is conditioned on: one branch of guidance.

    Attributes:
        text: `[B, L, text_dim]`, the embedding of the prompt; L is 512, with zeros behind the prompt, which are
            attended as the rest is. Cast to the dtype of the model.
    """

    text: Float[Array, "B L E"]


class Mlp(nnx.Module):
    """Two linears, `linear_1` and `linear_2`, with an activation between them."""

    def __init__(self, features_in: int, width: int, *, activation: Any, dtype: Any, rngs: nnx.Rngs):
        self.activation = activation
        self.linear_1 = Linear(features_in, width, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """Run both; the result has the dtype of the parameters."""
        return self.linear_2(self.activation(self.linear_1(x)))


class Attention(nnx.Module):
    """The linears and norms of a self-attention or of a cross-attention; queries and keys are normed over all heads."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.config = config
        self.q, self.k, self.v, self.out = (
            Linear(config.width, config.width, dtype=dtype, rngs=rngs) for _ in range(4)
        )
        self.norm_q, self.norm_k = Norm(config.width, dtype=dtype), Norm(config.width, dtype=dtype)

    def project(self, x: Float[Array, "B T D"], context: Float[Array, "B S D"]) -> tuple[Array, Array, Array]:
        """Queries of `x`, keys and values of `context`: `[B, T, N, H]` and twice `[B, S, N, H]`, without rotation."""
        eps = self.config.eps
        projected = self.norm_q.rms(self.q(x), eps), self.norm_k.rms(self.k(context), eps), self.v(context)
        query, key, value = (y.reshape(*y.shape[:2], self.config.num_heads, self.config.head_dim) for y in projected)
        return query, key, value

    def merge(self, attended: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The linear behind the attention, over all heads."""
        return self.out(attended.reshape(*attended.shape[:2], self.config.width))


class FeedForward(nnx.Module):
    """Two linears with a GELU between them."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.up = Linear(config.width, config.hidden_dim, dtype=dtype, rngs=rngs)
        self.down = Linear(config.hidden_dim, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Run both."""
        return self.down(layers.gelu(self.up(x)))


class Block(nnx.Module):
    """One transformer block: modulated self-attention, cross-attention to the text, modulated feed-forward."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.attn1 = Attention(config, dtype=dtype, rngs=rngs)
        self.attn2 = Attention(config, dtype=dtype, rngs=rngs)
        self.norm2 = Norm(config.width, dtype=jnp.float32, bias=True)
        self.ffn = FeedForward(config, dtype=dtype, rngs=rngs)
        self.scale_shift_table = _table(6, config.width, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        modulation: Float[Array, "B 6 D"],
        text: Float[Array, "B L D"],
        rope: Rope,
        *,
        attention: VideoAttention,
        state: Any,
        layer: Int[Array, ""],
        cross_attention: Callable[..., Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Run the block.

        Args:
            x: residual stream, in the dtype of the model.
            modulation: projected time embedding.
            text: embedded text.
            rope: cosines and sines of the tokens.
            attention: the self-attention.
            state: handed to it.
            layer: number of this block.
            cross_attention: dense attention of video queries to text; None is `fgattn_jax.attention`.

        Returns:
            The new residual stream, and the state that the attention gave back.
        """
        parts = self.scale_shift_table[...] + modulation.astype(jnp.float32)  # [B, 6, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = (parts[:, i : i + 1] for i in range(6))
        eps = self.config.eps

        y = (layers.layer_norm(x, eps) * (1 + scale1) + shift1).astype(self.dtype)
        query, key, value = self.attn1.project(y, y)  # [B, T, N, H]
        query, key = rotate(query, *rope), rotate(key, *rope)
        attended, state = attention(query, key, value, state, layer=layer, text=None)
        if attended.shape != query.shape:
            raise ValueError(
                f"expected `attention` to give an output of shape [B, T, N, H]={query.shape}, got {attended.shape}"
            )
        gated = gate1 * self.attn1.merge(attended.astype(self.dtype)).astype(jnp.float32)
        x = (x.astype(jnp.float32) + gated).astype(self.dtype)

        y = self.norm2.layer(x, eps).astype(self.dtype)
        cross = dense_attention if cross_attention is None else cross_attention
        x = x + self.attn2.merge(cross(*self.attn2.project(y, text)))

        y = (layers.layer_norm(x, eps) * (1 + scale2) + shift2).astype(self.dtype)
        gated = gate2 * self.ffn(y).astype(jnp.float32)
        return (x.astype(jnp.float32) + gated).astype(self.dtype), state


class WanTransformer(nnx.Module):
    """The transformer of Wan 2.1 text-to-video; `fgattn_jax.models.wan.load` fills it from a checkpoint.

    Args:
        config: sizes.
        dtype: bfloat16 or float32: of parameters and activations, but for what diffusers keeps in float32.
        rngs: random keys for the parameters.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, config: WanConfig, *, dtype: Any = jnp.bfloat16, rngs: nnx.Rngs):
        dtype = jnp.dtype(dtype)
        if dtype not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f"expected bfloat16 or float32 for `dtype`, got dtype={dtype}")
        self.config, self.dtype, self.parallel = config, dtype, None
        width = config.width
        self.patch_embedding = Linear(config.patch_dim, width, dtype=dtype, rngs=rngs)
        self.time_embedder = Mlp(config.time_features, width, activation=layers.silu, dtype=jnp.float32, rngs=rngs)
        self.time_proj = Linear(width, 6 * width, dtype=dtype, rngs=rngs)
        self.text_embedder = Mlp(config.text_dim, width, activation=layers.gelu, dtype=dtype, rngs=rngs)
        self.scale_shift_table = _table(2, width, rngs)
        self.proj_out = Linear(width, config.patch_dim, dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype=dtype, rngs=rngs)

        self.blocks = make_blocks(rngs)

    def __call__(
        self,
        latents: Float[Array, "B C F Y X"],
        timestep: Float[Array, " B"],
        condition: WanCondition,
        *,
        attention: VideoAttention = dense,
        state: Any = None,
    ) -> VideoOutput:
        """Estimate the velocity at `latents`.

        Args:
            latents: noisy latents in the layout of diffusers; cast to the dtype of the model.
            timestep: from 0 (clip) to 1000 (noise), one per entry.
            condition: the text.
            attention: called in every self-attention, in the order of `layer`; `plain` wraps any function of
                `(query, key, value)`.
            state: handed to the first call; of the same shapes and dtypes after every call.

        Returns:
            The velocity in the dtype of the model, and the state after the last layer.

        Raises:
            ValueError: shapes do not fit the config or each other.
        """
        grid = self._check(latents, timestep, condition)
        tokens = self.embed_patches(latents)  # [B, T, D]
        time, modulation = self.embed_time(timestep)
        text = self.text_embedder(condition.text)  # [B, L, D]
        rope = layers.rotary_tables(grid, self.config.rope_dims, ROPE_THETA, np.float64)
        graph, stacked = nnx.split(self.blocks)
        cross = None if self.parallel is None else self.parallel.by_tokens(dense_attention)

        def run_block(carry, scanned):
            params, layer = scanned
            block = nnx.merge(graph, params if self.parallel is None else self.parallel.gather(params))
            own = {"attention": attention, "state": carry[1], "layer": layer, "cross_attention": cross}
            return block(carry[0], modulation, text, rope, **own), None

        numbers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (tokens, state), _ = jax.lax.scan(run_block, (tokens, state), (stacked, numbers))
        velocity = layers.unpatchify(self.project_out(tokens, time), grid, self.config.patch, channels_last=True)
        return VideoOutput(velocity, state)

    def embed_patches(self, latents: Float[Array, "B C F Y X"]) -> Float[Array, "B T D"]:
        """One token for each patch."""
        return self.patch_embedding(layers.patchify(latents.astype(self.dtype), self.config.patch))

    def embed_time(self, timestep: Float[Array, " B"]) -> tuple[Float[Array, "B D"], Float[Array, "B 6 D"]]:
        """The time embedding, and its projection for the blocks."""
        features = layers.sinusoid(timestep, self.config.time_features)
        time = self.time_embedder(features).astype(self.dtype)
        return time, self.time_proj(layers.silu(time)).reshape(-1, 6, self.config.width)

    def project_out(self, tokens: Float[Array, "B T D"], time: Float[Array, "B D"]) -> Float[Array, "B T P"]:
        """The values of the patches from the last residual stream."""
        parts = self.scale_shift_table[...] + time.astype(jnp.float32)[:, None]  # [B, 2, D]
        y = layers.layer_norm(tokens, self.config.eps) * (1 + parts[:, 1:]) + parts[:, :1]
        return self.proj_out(y.astype(self.dtype))

    def _check(self, latents: Array, timestep: Array, condition: WanCondition) -> layers.Grid:
        channels = self.config.in_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise ValueError(f"expected `latents` of shape [B, C={channels}, F, Y, X], got shape={latents.shape}")
        batch = latents.shape[0]
        if timestep.shape != (batch,):
            raise ValueError(f"expected `timestep` of shape [B={batch}] like `latents`, got shape={timestep.shape}")
        text = condition.text
        if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != self.config.text_dim:
            raise ValueError(
                f"expected the text of `condition` of shape [B={batch}, L, {self.config.text_dim}], got "
                f"shape={text.shape}: give the hidden states of the model's own text encoder"
            )
        return self.config.grid(*latents.shape[2:])


def _table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (1, rows, width), jnp.float32) * width**-0.5)

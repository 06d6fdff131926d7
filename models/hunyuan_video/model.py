"""HunyuanVideo in Flax NNX: text to video, with the joint attention of every block behind one call."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32

from fgattn_jax.models.hunyuan_video.blocks import DualBlock, SingleBlock, modulate, with_still_text
from fgattn_jax.models.hunyuan_video.conditioning import Conditioning, TokenRefiner
from fgattn_jax.models.hunyuan_video.config import HunyuanVideoConfig
from fgattn_jax.models.video.attention import Attended, TextTail, VideoAttention, dense
from fgattn_jax.models.video.layers import Grid, Linear, patchify, rotary_tables, silu, unpatchify
from fgattn_jax.models.video.model import VideoOutput


class HunyuanVideoCondition(NamedTuple):
    """What one branch of guidance is told.

    Attributes:
        text: `[B, S, 4096]`: text embeddings, the valid ones first; S is 256 in diffusers' pipeline. What stands
            behind `lengths` is not read, NaN included.
        lengths: int `[B]`, 0 to S: valid text embeddings; see `text_lengths`.
        pooled: `[B, 768]`: pooled text embedding.
        guidance: `[B]`: the guidance scale, such as 6.0; the model multiplies by 1000. None if the model takes none.
    """

    text: Float[Array, "B S E"]
    lengths: Int[Array, " B"]
    pooled: Float[Array, "B P"]
    guidance: Float[Array, " B"] | None = None


class Final(nnx.Module):
    """From tokens to the velocity of their patches.

    Args:
        config: sizes.
        dtype: of the parameters.
        rngs: random keys for the kernels.
    """

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.modulation = Linear(config.width, 2 * config.width, dtype=dtype, rngs=rngs)
        self.out = Linear(config.width, config.patch_values, dtype=dtype, rngs=rngs)

    def __call__(self, video: Float[Array, "B T D"], vector: Float[Array, "B D"]) -> Float[Array, "B T P"]:
        """The velocity of every patch; `vector` is the conditioning behind its SiLU."""
        scale, shift = jnp.split(self.modulation(vector)[:, None], 2, axis=-1)  # the scale first, unlike in the blocks
        return self.out(modulate(video, shift, scale))


class HunyuanVideoTransformer(nnx.Module):
    """The HunyuanVideo transformer in the arithmetic of diffusers, as three scans over blocks.

    All parameters, tokens and attentions have one dtype; norms, activations and sinusoids are computed in float32.

    Args:
        config: sizes.
        dtype: of the parameters, such as bfloat16.
        rngs: random keys for the parameters.
    """

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any = jnp.bfloat16, rngs: nnx.Rngs):
        dtype = jnp.dtype(dtype)
        self.config, self.dtype = config, dtype
        self.x_embedder = Linear(config.patch_values, config.width, dtype=dtype, rngs=rngs)
        self.cond = Conditioning(config, dtype=dtype, rngs=rngs)
        self.refiner = TokenRefiner(config, dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_dual_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_dual(rngs: nnx.Rngs) -> DualBlock:
            return DualBlock(config, dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_single_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_single(rngs: nnx.Rngs) -> SingleBlock:
            return SingleBlock(config, dtype=dtype, rngs=rngs)

        self.dual = make_dual(rngs)
        self.single = make_single(rngs)
        self.final = Final(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "B C F Y X"],
        timestep: Float[Array, " B"],
        condition: HunyuanVideoCondition,
        *,
        attention: VideoAttention = dense,
        state: Any = None,
    ) -> VideoOutput:
        """Estimate the velocity at `latents`.

        Args:
            latents: noisy latents in the layout of diffusers, whole patches; cast to the dtype of the model.
            timestep: from 0 (clip) to 1000 (noise). It and the guidance scale are taken as float32 whatever the dtype
                of the model; whoever wants diffusers' rounding to 16 bits rounds before.
            condition: text, pooled text and guidance scale; cast to the dtype of the model.
            attention: called once per dual block and then once per single block with video tokens first and text
                tokens behind them; `layer` counts from 0 to `config.num_attentions` - 1.
            state: handed to the first call of `attention`; every call must return one of the same shapes and dtypes.

        Returns:
            The velocity in the dtype of the model, and the state after the last block.

        Raises:
            ValueError: shapes or dtypes do not fit the config or each other, or there is a guidance scale but the model
                takes none, or the other way round.
        """
        grid = self._check(latents, timestep, condition)
        config, dtype = self.config, self.dtype
        num_text = condition.text.shape[1]
        lengths = jnp.clip(condition.lengths, 0, num_text).astype(jnp.int32)
        tail = TextTail(num_text, lengths)
        rope = rotary_tables(grid, config.rope_dims, config.rope_theta, np.float32)
        joint_rope = with_still_text(rope, num_text)

        video = self.x_embedder(patchify(latents.astype(dtype), config.patch))  # [B, T, D]
        vector = silu(self.cond(timestep, condition.guidance, condition.pooled.astype(dtype)))  # [B, D]
        # Padding takes part in products with weights of zero, where NaN would not vanish.
        valid = jnp.arange(num_text) < lengths[:, None]
        text = jnp.where(valid[..., None], condition.text, 0).astype(dtype)
        text = self.refiner(text, timestep, lengths)  # [B, S, D]

        def attend(layer: Int32[Array, ""], state: Any) -> Any:
            def call(query: Array, key: Array, value: Array) -> Attended:
                return attention(query, key, value, state, layer=layer, text=tail)

            return call

        dual_graph, dual = nnx.split(self.dual)
        single_graph, single = nnx.split(self.single)

        def run_dual(carry: Any, xs: Any) -> tuple[Any, None]:
            video, text, state = carry
            params, layer = xs
            return nnx.merge(dual_graph, params)(video, text, vector, rope, attend(layer, state)), None

        def run_single(carry: Any, xs: Any) -> tuple[Any, None]:
            tokens, state = carry
            params, layer = xs
            return nnx.merge(single_graph, params)(tokens, vector, joint_rope, attend(layer, state)), None

        layers = jnp.arange(config.num_attentions, dtype=jnp.int32)
        (video, text, state), _ = jax.lax.scan(run_dual, (video, text, state), (dual, layers[: config.num_dual_layers]))
        tokens = jnp.concatenate([video, text], axis=1)  # [B, T + S, D]
        (tokens, state), _ = jax.lax.scan(run_single, (tokens, state), (single, layers[config.num_dual_layers :]))
        patches = self.final(tokens[:, : video.shape[1]], vector)  # [B, T, P]
        return VideoOutput(unpatchify(patches, grid, config.patch, channels_last=False), state)

    def _check(self, latents: Array, timestep: Array, condition: HunyuanVideoCondition) -> Grid:
        config = self.config
        if latents.ndim != 5 or latents.shape[1] != config.in_channels:
            raise ValueError(f"expected `latents` [B, C={config.in_channels}, F, Y, X], got shape={latents.shape}")
        batch = latents.shape[0]
        text, lengths, pooled, guidance = condition
        if text.ndim != 3 or text.shape[0] != batch or text.shape[1] < 1 or text.shape[2] != config.text_dim:
            raise ValueError(
                f"expected `condition.text` [B={batch}, S, {config.text_dim}] with S of at least 1, got "
                f"shape={text.shape}"
            )
        if pooled.shape != (batch, config.pooled_dim):
            raise ValueError(f"expected `condition.pooled` [B={batch}, {config.pooled_dim}], got shape={pooled.shape}")
        if (guidance is None) == config.guidance_embeds:
            raise ValueError(
                "expected `condition.guidance` [B], the guidance scale, got None: this model takes it as an input"
                if guidance is None
                else f"expected `condition.guidance` to be None, got shape={guidance.shape}: this model takes no "
                "guidance scale"
            )
        named = {"timestep": timestep, "condition.lengths": lengths, "condition.guidance": guidance}
        for name, value in named.items():
            if value is not None and value.shape != (batch,):
                raise ValueError(f"expected `{name}` [B={batch}] like `latents`, got shape={value.shape}")
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(
                f"expected `condition.lengths` to hold integers, got dtype={lengths.dtype}: make them from a mask with "
                "`text_lengths`"
            )
        return config.grid(*latents.shape[2:])


def text_lengths(mask: Bool[np.ndarray, "B S"] | Int[np.ndarray, "B S"]) -> Int32[np.ndarray, " B"]:
    """Lengths from the attention mask of a tokenizer, on the host.

    Args:
        mask: true, or 1, where a text embedding is valid.

    Raises:
        ValueError: the mask is not [B, S], or valid embeddings do not stand first: diffusers then masks other text in
            the refiner than in the joint attention.
    """
    valid = np.asarray(mask) != 0
    if valid.ndim != 2:
        raise ValueError(f"expected a text mask [B, S], got shape={valid.shape}")
    lengths = valid.sum(axis=1).astype(np.int32)
    wrong = np.flatnonzero((valid != (np.arange(valid.shape[1]) < lengths[:, None])).any(axis=1))
    if wrong.size:
        raise ValueError(
            f"expected valid text to stand first in the mask, got padding before it in batch entry {wrong[0]}: pad "
            "prompts on the right"
        )
    return lengths

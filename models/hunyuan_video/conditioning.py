"""What HunyuanVideo is told: the conditioning vector, and the text tokens that the token refiner makes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fgattn_jax.models.hunyuan_video.blocks import FeedForward, Projections, split_modulation
from fgattn_jax.models.hunyuan_video.config import TIME_FEATURES, HunyuanVideoConfig
from fgattn_jax.models.video.layers import Linear, Norm, silu, sinusoid


class Embedder(nnx.Module):
    """Linear, SiLU, linear: from features to the width of the model.

    Args:
        features: channels of the input.
        width: channels of the result.
        dtype: of the parameters.
        rngs: random keys for the kernels.
    """

    def __init__(self, features: int, width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.linear_1 = Linear(features, width, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B F"]) -> Float[Array, "B D"]:
        """Embed."""
        return self.linear_2(silu(self.linear_1(x)))


class Conditioning(nnx.Module):
    """The conditioning vector: timestep, guidance scale if the model takes one, pooled text.

    Args:
        config: sizes.
        dtype: of the parameters.
        rngs: random keys for the kernels.
    """

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        def embedder(features: int) -> Embedder:
            return Embedder(features, config.width, dtype=dtype, rngs=rngs)

        self.time = embedder(TIME_FEATURES)
        self.guidance = nnx.data(embedder(TIME_FEATURES) if config.guidance_embeds else None)
        self.pooled = embedder(config.pooled_dim)

    def __call__(
        self, timestep: Float[Array, " B"], guidance: Float[Array, " B"] | None, pooled: Float[Array, "B P"]
    ) -> Float[Array, "B D"]:
        """Add the embeddings of all three.

        Args:
            timestep: 0 to 1000.
            guidance: the guidance scale, not yet times 1000; not read if the model takes none.
            pooled: pooled text embedding.
        """
        vector = self.time(sinusoid(timestep, TIME_FEATURES))
        if self.guidance is not None:
            assert guidance is not None
            vector = vector + self.guidance(sinusoid(guidance.astype(jnp.float32) * 1000, TIME_FEATURES))
        return vector + self.pooled(pooled)


class RefinerBlock(nnx.Module):
    """Self-attention among text tokens and a feed-forward part, with gates from the timestep and the mean text.

    Args:
        config: sizes.
        dtype: of the parameters.
        rngs: random keys for the kernels.
    """

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = Norm(config.width, dtype=dtype, bias=True)
        self.attn = Projections(config, norms=False, out=True, dtype=dtype, rngs=rngs)
        self.norm2 = Norm(config.width, dtype=dtype, bias=True)
        self.ff = FeedForward(config.width, config.refiner_mlp_width, silu, dtype=dtype, rngs=rngs)
        self.gates = Linear(config.width, 2 * config.width, dtype=dtype, rngs=rngs)

    def __call__(
        self, text: Float[Array, "B S D"], vector: Float[Array, "B D"], mask: Bool[Array, "B 1 S S"]
    ) -> Float[Array, "B S D"]:
        """Run the block on text tokens; `vector` is the conditioning behind its SiLU."""
        gate, gate_mlp = split_modulation(self.gates(vector), 2)
        heads = self.attn.heads(self.norm1.layer(text).astype(text.dtype))
        # A few hundred tokens: too short for anything but plain attention.
        text = text + self.attn.back(jax.nn.dot_product_attention(*heads, mask=mask)) * gate
        return text + self.ff(self.norm2.layer(text).astype(text.dtype)) * gate_mlp


class TokenRefiner(nnx.Module):
    """From text embeddings to text tokens: a linear map and blocks of self-attention among the valid ones.

    Args:
        config: sizes.
        dtype: of the parameters.
        rngs: random keys for the kernels.
    """

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.time = Embedder(TIME_FEATURES, config.width, dtype=dtype, rngs=rngs)
        self.pooled = Embedder(config.text_dim, config.width, dtype=dtype, rngs=rngs)
        self.proj_in = Linear(config.text_dim, config.width, dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_refiner_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs: nnx.Rngs) -> RefinerBlock:
            return RefinerBlock(config, dtype=dtype, rngs=rngs)

        self.blocks = make_blocks(rngs)

    def __call__(
        self, text: Float[Array, "B S E"], timestep: Float[Array, " B"], lengths: Int[Array, " B"]
    ) -> Float[Array, "B S D"]:
        """Refine.

        Args:
            text: text embeddings, valid ones first.
            timestep: 0 to 1000.
            lengths: valid embeddings. With 0 of them their mean is taken as zero.

        Returns:
            Text tokens. Those behind `lengths` mean nothing and influence no other.
        """
        valid = jnp.arange(text.shape[1]) < lengths[:, None]  # [B, S]
        total = jnp.sum(text.astype(jnp.float32) * valid[..., None], axis=1)
        mean = (total / jnp.maximum(lengths, 1)[:, None]).astype(text.dtype)
        vector = silu(self.time(sinusoid(timestep, TIME_FEATURES)) + self.pooled(mean))
        # The first key is open to all: padded rows would have no key else, and become NaN.
        mask = (valid[:, :, None] & valid[:, None, :]).at[:, :, 0].set(True)[:, None]  # [B, 1, S, S]
        graph, stacked = nnx.split(self.blocks)

        def run_block(text: Array, params: Any) -> tuple[Array, None]:
            return nnx.merge(graph, params)(text, vector, mask), None

        return jax.lax.scan(run_block, self.proj_in(text), stacked)[0]

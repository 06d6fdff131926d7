"""The blocks of HunyuanVideo: dual blocks with weights for each stream, single blocks with one set for both.

Arithmetic is that of diffusers: in 16 bits every step rounds where torch does, norms and activations count in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fgattn_jax.models.hunyuan_video.config import HunyuanVideoConfig
from fgattn_jax.models.video.attention import Attended
from fgattn_jax.models.video.layers import Linear, Norm, gelu, layer_norm
from fgattn_jax.nn.rotary import rotate

Rope = tuple[Array, Array]
"""Cosines and sines `[T, H/2]`."""
Attend = Callable[[Array, Array, Array], Attended]
"""The joint attention of one layer: `(query, key, value)`, all `[B, T, N, H]`."""


class Projections(nnx.Module):
    """Linear maps between tokens and attention: queries, keys, values, and the output where there is one.

    Args:
        config: sizes.
        norms: whether each head's queries and keys get a learned RMS norm.
        out: whether there is an output map.
        dtype: of the parameters.
        rngs: random keys for the kernels.
    """

    def __init__(self, config: HunyuanVideoConfig, *, norms: bool, out: bool, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.num_heads = config.num_heads
        self.q, self.k, self.v = (Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(3))
        self.out = nnx.data(Linear(width, width, dtype=dtype, rngs=rngs) if out else None)
        self.norm_q, self.norm_k = (nnx.data(Norm(config.head_dim, dtype=dtype) if norms else None) for _ in range(2))

    def heads(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries, keys and values `[B, T, N, H]`."""
        query, key, value = (
            linear(x).reshape(*x.shape[:2], self.num_heads, -1) for linear in (self.q, self.k, self.v)
        )  # [B, T, N, H]
        if self.norm_q is not None and self.norm_k is not None:
            query, key = _rms(query, self.norm_q), _rms(key, self.norm_k)
        return query, key, value

    def back(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The output map of what was attended."""
        assert self.out is not None
        return self.out(x.reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    """Linear, activation, linear.

    Args:
        width: channels of the tokens.
        hidden: channels between.
        activation: elementwise function.
        dtype: of the parameters.
        rngs: random keys for the kernels.
    """

    def __init__(self, width: int, hidden: int, activation: Callable[..., Array], *, dtype: Any, rngs: nnx.Rngs):
        self.activation = activation
        self.up = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Transform every token."""
        return self.down(self.activation(self.up(x)))


class DualBlock(nnx.Module):
    """Joint attention of two streams, video and text, each with its own weights, modulation and feed-forward part.

    Args:
        config: sizes.
        dtype: of the parameters and tokens.
        rngs: random keys for the kernels.
    """

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.modulation = Linear(width, 6 * width, dtype=dtype, rngs=rngs)
        self.modulation_text = Linear(width, 6 * width, dtype=dtype, rngs=rngs)
        self.attn = Projections(config, norms=True, out=True, dtype=dtype, rngs=rngs)
        self.attn_text = Projections(config, norms=True, out=True, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(width, config.mlp_width, gelu, dtype=dtype, rngs=rngs)
        self.ff_text = FeedForward(width, config.mlp_width, gelu, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        video: Float[Array, "B T D"],
        text: Float[Array, "B S D"],
        vector: Float[Array, "B D"],
        rope: Rope,
        attend: Attend,
    ) -> tuple[Array, Array, Any]:
        """Run the block.

        Args:
            video: video tokens.
            text: text tokens, padding included.
            vector: the conditioning, behind its SiLU.
            rope: rotary tables of the video tokens.
            attend: joint attention over video then text.

        Returns:
            The video tokens, the text tokens, and the state of the attention.
        """
        num_video = video.shape[1]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = split_modulation(self.modulation(vector), 6)
        shift_t, scale_t, gate_t, shift_mlp_t, scale_mlp_t, gate_mlp_t = split_modulation(
            self.modulation_text(vector), 6
        )
        query, key, value = self.attn.heads(modulate(video, shift, scale))
        query, key = rotate(query, *rope), rotate(key, *rope)
        query_t, key_t, value_t = self.attn_text.heads(modulate(text, shift_t, scale_t))
        joined = (jnp.concatenate(pair, axis=1) for pair in ((query, query_t), (key, key_t), (value, value_t)))
        attended = attend(*joined)  # [B, T + S, N, H]

        video = video + self.attn.back(attended.output[:, :num_video]) * gate
        text = text + self.attn_text.back(attended.output[:, num_video:]) * gate_t
        video = video + gate_mlp * self.ff(modulate(video, shift_mlp, scale_mlp))
        text = text + gate_mlp_t * self.ff_text(modulate(text, shift_mlp_t, scale_mlp_t))
        return video, text, attended.state


class SingleBlock(nnx.Module):
    """Attention and feed-forward part side by side over video and text tokens together.

    Args:
        config: sizes.
        dtype: of the parameters and tokens.
        rngs: random keys for the kernels.
    """

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.modulation = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.attn = Projections(config, norms=True, out=False, dtype=dtype, rngs=rngs)
        self.mlp = Linear(width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.out = Linear(width + config.mlp_width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "B T D"], vector: Float[Array, "B D"], rope: Rope, attend: Attend
    ) -> tuple[Array, Any]:
        """Run the block.

        Args:
            tokens: video tokens, then text tokens.
            vector: the conditioning, behind its SiLU.
            rope: rotary tables of all tokens; see `with_still_text`.
            attend: joint attention.

        Returns:
            The tokens, and the state of the attention.
        """
        shift, scale, gate = split_modulation(self.modulation(vector), 3)
        y = modulate(tokens, shift, scale)
        query, key, value = self.attn.heads(y)
        attended = attend(rotate(query, *rope), rotate(key, *rope), value)
        output = attended.output.reshape(*tokens.shape)
        y = self.out(jnp.concatenate([output, gelu(self.mlp(y))], axis=-1))
        return tokens + gate * y, attended.state


def with_still_text(rope: Rope, num_text: int) -> Rope:
    """The tables with angles of zero behind them: text tokens stay as they are, exactly."""
    cos, sin = rope
    still = (num_text, cos.shape[-1])
    return jnp.concatenate([cos, jnp.ones(still, cos.dtype)]), jnp.concatenate([sin, jnp.zeros(still, sin.dtype)])


def split_modulation(x: Float[Array, "B P"], num_parts: int) -> list[Float[Array, "B 1 D"]]:
    """Equal parts of a modulation, each to be broadcast over tokens."""
    return jnp.split(x[:, None], num_parts, axis=-1)


def modulate(
    x: Float[Array, "B T D"], shift: Float[Array, "B 1 D"], scale: Float[Array, "B 1 D"]
) -> Float[Array, "B T D"]:
    """Normalise every token, scale and shift it."""
    return layer_norm(x).astype(x.dtype) * (1 + scale) + shift


def _rms(x: Float[Array, "B T N H"], norm: Norm) -> Float[Array, "B T N H"]:
    # Rounded before the product with the weights, not after it: here diffusers differs from torch's own RMS norm.
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype) * norm.scale[...]

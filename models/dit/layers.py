"""Pieces of the DiT without parameters: patches, rotary angles, norms, time features; and the attention seam."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fgattn_jax.attention import attention, attention_with_lse
from fgattn_jax.models.dit.config import CHANNELS


def patchify(video: Float[Array, "B F Y X 3"], patch: tuple[int, int, int]) -> Float[Array, "B T P"]:
    """Cut a clip into patches, one token each, frames first, then rows, then columns.

    Args:
        video: clips; every size is a multiple of its patch size.
        patch: frames, rows and columns of a patch.

    Returns:
        The values of each patch, `P = prod(patch) * 3`.
    """
    batch, frames, height, width, _ = video.shape
    pf, py, px = patch
    x = video.reshape(batch, frames // pf, pf, height // py, py, width // px, px, CHANNELS)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)  # [B, f, y, x, pf, py, px, 3]
    return x.reshape(batch, -1, pf * py * px * CHANNELS)


def unpatchify(
    tokens: Float[Array, "B T P"], grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> Float[Array, "B F Y X 3"]:
    """Put patches back into a clip; the inverse of `patchify`.

    Args:
        tokens: patch values.
        grid: frames, rows and columns in tokens.
        patch: frames, rows and columns of a patch.
    """
    (f, y, x), (pf, py, px) = grid, patch
    out = tokens.reshape(-1, f, y, x, pf, py, px, CHANNELS).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return out.reshape(-1, f * pf, y * py, x * px, CHANNELS)


def rope_tables(
    grid: tuple[int, int, int], dims: tuple[int, int, int], theta: float
) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Cosine and sine of the rotary angles of every token.

    Args:
        grid: frames, rows and columns in tokens.
        dims: channels of a head that belong to each axis; even.
        theta: base of the frequencies.

    Returns:
        Two tables over tokens and pairs of channels, time pairs first, then rows, then columns.
    """
    angles = []
    for axis, (size, dim) in enumerate(zip(grid, dims, strict=True)):
        frequencies = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
        along = jnp.arange(size, dtype=jnp.float32)[:, None] * frequencies
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        angles.append(jnp.broadcast_to(along.reshape(shape), (*grid, dim // 2)))
    table = jnp.concatenate(angles, axis=-1).reshape(math.prod(grid), -1)  # [T, H/2]
    return jnp.cos(table), jnp.sin(table)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "B T N H"]:
    """Turn neighbouring channel pairs by the rotary angles (interleaved form)."""
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = cos[None, :, None], sin[None, :, None]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def layer_norm(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Zero mean and unit variance over the last axis in float32, without gain: the modulation supplies it."""
    x = x.astype(jnp.float32)
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def rms_norm(x: Float[Array, "... D"], gain: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Unit root mean square over the last axis in float32, times `gain`."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain


def time_features(t: Float[Array, " B"], num_features: int) -> Float[Array, "B num_features"]:
    """Sinusoidal features of the diffusion time in [0, 1], cosines first."""
    half = num_features // 2
    frequencies = jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = 1000.0 * t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def training_attention(query: Array, key: Array, value: Array, mask: Any = None, predictor: Any = None) -> tuple:
    """Dense attention for training: cuDNN for 16-bit inputs on a GPU, XLA elsewhere.

    Takes the arguments of the seam of `DiT`, and refuses masks: the model is trained dense.

    Raises:
        ValueError: a mask or a predictor is given.
    """
    if mask is not None or predictor is not None:
        raise ValueError("Training attention is dense; build `DiT` with its default `attention` to use masks.")
    fused = query.dtype in (jnp.bfloat16, jnp.float16) and jax.default_backend() == "gpu"
    output = jax.nn.dot_product_attention(query, key, value, implementation="cudnn" if fused else "xla")
    return output, None


def slice_attention(query: Array, key: Array, value: Array, mask: Any = None, predictor: Any = None) -> tuple:
    """Attention through `fgattn_jax`: dense, under a mask, or dense while a predictor makes the next mask.

    Args:
        query: queries `[B, T, N, H]`.
        key: keys of the same shape.
        value: values of the same shape.
        mask: a `SliceMask`, or None for dense attention.
        predictor: called as `predictor(query, key, lse)` beside dense attention, or None.

    Returns:
        The output `[B, T, N, H]`, and the predicted mask or None.

    Raises:
        ValueError: both a mask and a predictor are given.
    """
    if predictor is None:
        return attention(query, key, value, mask), None
    if mask is not None:
        raise ValueError("Give `masks` (reuse) or `predictor` (refresh), not both.")
    if predictor.needs_lse:
        output, lse = attention_with_lse(query, key, value)
        return output, predictor(query, key, lse)
    return attention(query, key, value), predictor(query, key, None)

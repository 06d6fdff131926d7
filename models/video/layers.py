"""Pieces that the video models share, in the arithmetic of diffusers: linears, norms, features, tables, patches."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

Grid = tuple[int, int, int]


class Linear(nnx.Module):
    """`x @ kernel + bias`, computed in the dtype of its parameters with float32 sums, as torch does.

    Args:
        features_in: channels of the input.
        features_out: channels of the result.
        dtype: of parameters, product and result; the input is cast to it.
        rngs: random keys for the kernel.
    """

    def __init__(self, features_in: int, features_out: int, *, dtype: Any, rngs: nnx.Rngs):
        kernel = jax.random.normal(rngs.params(), (features_in, features_out), dtype) * features_in**-0.5
        self.kernel = nnx.Param(kernel.astype(dtype))
        self.bias = nnx.Param(jnp.zeros((features_out,), dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """Multiply; the result has the dtype of the parameters."""
        kernel, bias = self.kernel[...], self.bias[...]
        return jax.lax.platform_dependent(x.astype(kernel.dtype), kernel, bias, cuda=_fused, default=_rounded_once)


def _precision(kernel: Array) -> jax.lax.Precision | None:
    """float32 is what torch takes it for: GPUs would multiply 11 of its 24 bits (TF32)."""
    return jax.lax.Precision.HIGHEST if kernel.dtype == jnp.float32 else None


def _rounded_once(x: Array, kernel: Array, bias: Array) -> Array:
    product = jnp.matmul(x, kernel, precision=_precision(kernel), preferred_element_type=jnp.float32)
    return (product + bias.astype(jnp.float32)).astype(kernel.dtype)


def _fused(x: Array, kernel: Array, bias: Array) -> Array:
    # cuBLAS adds the bias to its float32 sums before it rounds them. Written as above, XLA lets it write the sums as
    # float32 and rounds them in a second pass: three times the bytes (compiled for an H100 with jax 0.12.0.1).
    return jnp.matmul(x, kernel, precision=_precision(kernel)) + bias


class Norm(nnx.Module):
    """The learned parameters of a norm over the last axis: `scale`, and `bias` where there is one.

    Args:
        features: length of the axis.
        dtype: of the parameters.
        bias: whether there is a bias (LayerNorm has one, RMSNorm none).
    """

    def __init__(self, features: int, *, dtype: Any, bias: bool = False):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros((features,), dtype)) if bias else None)

    def rms(self, x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
        """Unit root mean square in float32, times `scale`; in the dtype of `x`."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)

    def layer(self, x: Float[Array, "... D"], eps: float = 1e-6) -> Float32[Array, "... D"]:
        """`layer_norm` times `scale` plus `bias`, in float32."""
        y = layer_norm(x, eps) * self.scale[...].astype(jnp.float32)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


def layer_norm(x: Float[Array, "... D"], eps: float = 1e-6) -> Float32[Array, "... D"]:
    """Zero mean and unit variance over the last axis, in float32, without parameters."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU with the hyperbolic tangent, in float32, in the dtype of `x`."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """SiLU in float32, in the dtype of `x`."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def sinusoid(t: Float[Array, " B"], num_features: int = 256) -> Float32[Array, "B num_features"]:
    """Sinusoidal features of a number in 0 .. 1000, cosines first: angles `t * 10000 ** (-i / half)`."""
    half = num_features // 2
    frequencies = jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotary_tables(
    grid: Grid, dims: Grid, theta: float, dtype: Any
) -> tuple[Float32[Array, "T half"], Float32[Array, "T half"]]:
    """Cosine and sine of the rotary angles of every token.

    The angles along each axis are made on the host; only they are constants of a program, not the tables of all tokens
    (40 MB for a long video), which are put together on the device.

    Args:
        grid: frames, rows and columns in tokens.
        dims: channels of a head that belong to each axis, even; the frame axis has the first ones.
        theta: base of the frequencies.
        dtype: of the angles, NumPy's: float64 for Wan, float32 for HunyuanVideo.

    Returns:
        Two float32 arrays `[T, H/2]` over tokens (frames first, then rows, then columns) and pairs of channels.
    """
    cosines, sines = [], []
    for axis, (size, dim) in enumerate(zip(grid, dims, strict=True)):
        frequencies = 1.0 / np.power(dtype(theta), np.arange(0, dim, 2, dtype=dtype) / dtype(dim))
        angles = np.outer(np.arange(size, dtype=dtype), frequencies)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        for parts, along in ((cosines, np.cos(angles)), (sines, np.sin(angles))):
            parts.append(jnp.broadcast_to(along.astype(np.float32).reshape(shape), (*grid, dim // 2)))
    cos, sin = (jnp.concatenate(parts, axis=-1).reshape(math.prod(grid), -1) for parts in (cosines, sines))
    return cos, sin  # [T, H/2]


def patchify(latents: Float[Array, "B C F Y X"], patch: Grid) -> Float[Array, "B T P"]:
    """Cut latents into patches, one token each: frames first, then rows, then columns; in a patch channels first.

    The patch convolution of a checkpoint is then a product with its kernel, flattened in the same order.
    """
    batch, channels, frames, height, width = latents.shape
    pf, py, px = patch
    x = latents.reshape(batch, channels, frames // pf, pf, height // py, py, width // px, px)
    x = x.transpose(0, 2, 4, 6, 1, 3, 5, 7)  # [B, f, y, x, C, pf, py, px]
    return x.reshape(batch, -1, channels * pf * py * px)


def unpatchify(
    tokens: Float[Array, "B T P"], grid: Grid, patch: Grid, *, channels_last: bool
) -> Float[Array, "B C F Y X"]:
    """Put patches back into latents.

    Args:
        tokens: values of the patches.
        grid: frames, rows and columns in tokens.
        patch: frames, rows and columns of a patch.
        channels_last: whether the channels of a patch vary fastest (Wan) or slowest (HunyuanVideo).
    """
    (f, y, x), (pf, py, px) = grid, patch
    batch = tokens.shape[0]
    if channels_last:
        parts = tokens.reshape(batch, f, y, x, pf, py, px, -1).transpose(0, 7, 1, 4, 2, 5, 3, 6)
    else:
        parts = tokens.reshape(batch, f, y, x, -1, pf, py, px).transpose(0, 4, 1, 5, 2, 6, 3, 7)
    return parts.reshape(batch, -1, f * pf, y * py, x * px)

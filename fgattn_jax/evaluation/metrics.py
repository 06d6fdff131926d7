"""How far a clip is from another one: PSNR and SSIM."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SSIM_SIGMA = 1.5
"""Standard deviation of the SSIM window in pixels."""
SSIM_RADIUS = 5
"""The SSIM window has 11 x 11 pixels (truncated at 3.5 standard deviations)."""


def psnr(
    video: Float[Array, "*B F Y X C"], reference: Float[Array, "*B F Y X C"], *, data_range: float = 2.0
) -> Float[Array, "*B"]:
    """Peak signal-to-noise ratio of a clip against a reference in decibels: `10 log10(data_range**2 / MSE)`.

    Args:
        video: Clips; the last four axes are frames, rows, columns, channels.
        reference: Clips of the same shape.
        data_range: Largest minus smallest possible value; 2 for values in [-1, 1]. Values outside are not clipped.

    Returns:
        One number per clip, float32; the error is averaged over all pixels of all frames. Infinite for equal clips.

    Raises:
        ValueError: The shapes differ, there are fewer than four axes, or `data_range` is not positive.
    """
    _check(video, reference, data_range)
    error = jnp.square(video.astype(jnp.float32) - reference.astype(jnp.float32))
    return 10.0 * jnp.log10(data_range**2 / jnp.mean(error, axis=(-4, -3, -2, -1)))


def ssim(
    video: Float[Array, "*B F Y X C"], reference: Float[Array, "*B F Y X C"], *, data_range: float = 2.0
) -> Float[Array, "*B"]:
    """Structural similarity of a clip against a reference, 1 for equal clips.

    Per frame and channel with a Gaussian window of 11 x 11 pixels and sigma 1.5 and population covariances, over the
    windows that lie within the frame; then the mean. The numbers are those of scikit-image's
    `structural_similarity(..., gaussian_weights=True, use_sample_covariance=False)`.

    Args:
        video: Clips; the last four axes are frames, rows, columns, channels. At least 11 rows and columns.
        reference: Clips of the same shape.
        data_range: Largest minus smallest possible value; 2 for values in [-1, 1].

    Returns:
        One number per clip, float32.

    Raises:
        ValueError: The shapes differ, a frame is smaller than the window, or `data_range` is not positive.

    References:
        Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", IEEE Trans. Image Processing 13 (2004), section 3.
    """
    _check(video, reference, data_range)
    size = 2 * SSIM_RADIUS + 1
    if min(video.shape[-3:-1]) < size:
        raise ValueError(f"expected frames of at least {size}x{size} pixels for SSIM, got shape={video.shape}")
    x, y = video.astype(jnp.float32), reference.astype(jnp.float32)
    # About the middle of the range: products of values far from zero would lose digits in float32.
    middle = jnp.mean(y, axis=(-4, -3, -2, -1), keepdims=True)
    shift = middle
    x, y = x - shift, y - shift
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x * mean_x
    var_y = _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + shift, mean_y + shift
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return jnp.mean(luminance * structure, axis=(-4, -3, -2, -1))


def _blur(values: Float[Array, "*B Y X C"]) -> Float[Array, "*B y x C"]:
    """Gaussian means of all windows that fit: rows and columns get `2 * SSIM_RADIUS` fewer."""
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (-3, -2):
        length = values.shape[axis] - 2 * SSIM_RADIUS
        parts = [
            weight * jax.lax.slice_in_dim(values, start, start + length, axis=values.ndim + axis)
            for start, weight in enumerate(weights)
        ]
        values = functools.reduce(operator.add, parts)
    return values


def _check(video: Array, reference: Array, data_range: float) -> None:
    if video.shape != reference.shape:
        raise ValueError(
            f"expected two clips of one shape, got video shape={video.shape} and reference shape={reference.shape}"
        )
    if video.ndim < 4:
        raise ValueError(f"expected clips [..., F, Y, X, C], got shape={video.shape}: add the missing axes")
    if not data_range > 0:
        raise ValueError(f"expected `data_range` > 0, got data_range={data_range}: 2 for values in [-1, 1]")

"""Queries, keys and values as a layer of a video model has them: smooth fields with three-axis rotary embedding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fgattn_jax.evaluation.model_shapes import ModelShape
from fgattn_jax.nn.rotary import rotate

_SMOOTH_OVER = 4
"""Tokens per axis between independent values of a field."""
_DETAIL = (0.2, 0.8)
"""Noise of queries and keys over their common field: the least detailed head and the most detailed one."""
_EPSILON = 1e-6


def make_inputs(
    shape: ModelShape, *, num_heads: int, dtype: str, seed: int = 0
) -> tuple[Float[Array, "1 T N H"], Float[Array, "1 T N H"], Float[Array, "1 T N H"]]:
    """Query, key and value of one layer, made on the device.

    Queries and keys of a head share a smooth random field over the grid, each with details of its own; they are
    RMS-normalised (as models with query-key norm have them) and rotated. Heads differ in how much detail they have.
    Text tokens are noise and not rotated.

    Args:
        shape: Sizes.
        num_heads: Heads to make: those of the model, or fewer.
        dtype: Of all three.
        seed: Of the fields; the same on devices of one kind.
    """
    cos, sin = _rotary_tables(shape)
    # Made by the device's own generator: gigabytes of noise in no time, and a program that compiles at once.
    return _make(shape, num_heads, dtype, jax.random.key(seed, impl="rbg"), cos, sin)


def _rotary_tables(shape: ModelShape) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines `[T, H / 2]`; angles of text tokens are 0."""
    places = np.unravel_index(np.arange(math.prod(shape.grid)), shape.grid)
    angles = []
    for place, width in zip(places, shape.rotary_dims(), strict=True):
        frequencies = shape.rope_theta ** (-np.arange(0, width, 2) / width)
        angles.append(place[:, None] * frequencies)
    table = np.pad(np.concatenate(angles, axis=1), ((0, shape.text_tokens), (0, 0)))
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _make(shape: ModelShape, num_heads: int, dtype: str, key: Array, cos: Array, sin: Array):
    coarse = tuple(-(-side // _SMOOTH_OVER) + 1 for side in shape.grid)
    tokens, width = math.prod(shape.grid), shape.head_dim

    def normal(key, *sizes):
        return jax.random.normal(key, (*sizes, width), jnp.float32)

    def one_head(operands):
        key, detail = operands
        keys = jax.random.split(key, 3)
        # Two fields, one for queries and keys and one for values; their channels lie side by side.
        values = jnp.concatenate(tuple(normal(keys[0], 2, *coarse)), axis=-1)
        fields = jax.image.resize(values, (*shape.grid, 2 * width), "linear").reshape(tokens, 2, width)
        fields = jnp.moveaxis(fields, 1, 0)[np.array([0, 0, 1])] + detail * normal(keys[1], 3, tokens)
        all_three = jnp.concatenate([fields, normal(keys[2], 3, shape.text_tokens)], axis=1)  # [3, T, H]
        mean_square = jnp.mean(all_three * all_three, axis=-1, keepdims=True)
        all_three = all_three * jax.lax.rsqrt(mean_square + _EPSILON)
        turned = rotate(all_three[:2, :, None], cos, sin)[:, :, 0]
        return jnp.concatenate([turned, all_three[2:]]).astype(dtype)

    heads = (jax.random.split(key, num_heads), jnp.linspace(*_DETAIL, num_heads))
    # One head after the other: in float32 all of them would take a multiple of what they become.
    arrays = jax.lax.map(one_head, heads)  # [N, 3, T, H]
    return tuple(jnp.moveaxis(arrays[:, number], 0, 1)[None] for number in range(3))  # [1, T, N, H]

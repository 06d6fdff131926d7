"""Generated scenes: textured objects that bounce and occlude each other over a panning background, motion known."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MAX_OBJECTS = 3
NUM_SHAPES = 3
_BACKGROUND_WAVES = 6


class Scene(NamedTuple):
    """A generated clip and what moves in it.

    Places are in units of the frame's side, (row, column), 0 at the top left and 1 at the bottom right; velocities are
    in such units per frame.

    Attributes:
        video: `[F, Y, X, 3]` float32 in [-1, 1].
        centers: place of every object in every frame.
        pan: velocity of the background.
        shapes: 0 disc, 1 square, 2 triangle.
        radii: half the size of each object.
        present: which of the object slots are used; later slots lie in front.
        visible: `[F, Y, X]` number of the object in front at each pixel, -1 for the background.
    """

    video: Float[Array, "F Y X 3"]
    centers: Float[Array, "F O 2"]
    pan: Float[Array, " 2"]
    shapes: Int[Array, " O"]
    radii: Float[Array, " O"]
    present: Bool[Array, " O"]
    visible: Int[Array, "F Y X"]


def make_scene(key: Array, *, num_frames: int, size: int) -> Scene:
    """Draw one scene; all of it follows from `key`, and it can be mapped and jitted.

    Args:
        key: a jax.random key.
        num_frames: frames of the clip.
        size: rows and columns in pixels.

    Raises:
        ValueError: a size is below 1.
    """
    if num_frames < 1 or size < 1:
        raise ValueError(f"A scene needs frames and pixels, got num_frames={num_frames}, size={size}.")
    keys = iter(jax.random.split(key, 16))
    times = jnp.arange(num_frames, dtype=jnp.float32)
    along = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
    points = jnp.stack(jnp.meshgrid(along, along, indexing="ij"), axis=-1)  # [Y, X, 2]

    pan = jax.random.uniform(next(keys), (2,), minval=-0.012, maxval=0.012)
    background = _background(next(keys), points[None] + times[:, None, None, None] * pan)

    count = jax.random.randint(next(keys), (), 1, MAX_OBJECTS + 1)
    present = jnp.arange(MAX_OBJECTS) < count
    shapes = jax.random.randint(next(keys), (MAX_OBJECTS,), 0, NUM_SHAPES)
    radii = jax.random.uniform(next(keys), (MAX_OBJECTS,), minval=0.10, maxval=0.22)
    start = jax.random.uniform(next(keys), (MAX_OBJECTS, 2))
    angle = jax.random.uniform(next(keys), (MAX_OBJECTS,), maxval=2 * jnp.pi)
    speed = jax.random.uniform(next(keys), (MAX_OBJECTS,), minval=0.01, maxval=0.04)
    velocity = speed[:, None] * jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    low, high = radii[:, None], 1 - radii[:, None]
    centers = bounce(low + start * (high - low) + times[:, None, None] * velocity, low, high)  # [F, O, 2]

    colors = jax.random.uniform(next(keys), (MAX_OBJECTS, 2, 3), minval=-0.9, maxval=0.9)
    stripe_angle = jax.random.uniform(next(keys), (MAX_OBJECTS,), maxval=jnp.pi)
    stripe_count = jax.random.uniform(next(keys), (MAX_OBJECTS,), minval=1.0, maxval=2.5)

    def paint(below, each):
        video, visible = below
        number, center, shape, radius, used, color, stripe_angle, stripes = each
        local = (points[None] - center[:, None, None]) / radius  # [F, Y, X, 2], +-1 at the rim
        # About one pixel of soft edge, so that motion below a pixel shows.
        softness = 1.0 / (size * radius)
        cover = jnp.clip(0.5 - _distance(shape, local) / softness, 0.0, 1.0) * used
        direction = jnp.stack([jnp.sin(stripe_angle), jnp.cos(stripe_angle)])
        wave = 0.5 + 0.5 * jnp.tanh(2.5 * jnp.sin(jnp.pi * stripes * (local @ direction)))
        texture = color[0] + wave[..., None] * (color[1] - color[0])
        return (video + cover[..., None] * (texture - video), jnp.where(cover > 0.5, number, visible)), None

    numbers = jnp.arange(MAX_OBJECTS, dtype=jnp.int32)
    paths = jnp.moveaxis(centers, 1, 0)  # [O, F, 2]
    objects = (numbers, paths, shapes, radii, present, colors, stripe_angle, stripe_count)
    nothing = jnp.full((num_frames, size, size), -1, jnp.int32)
    (video, visible), _ = jax.lax.scan(paint, (background, nothing), objects)
    return Scene(video, centers, pan, shapes, radii, present, visible)


def bounce(position: Float[Array, "..."], low: Float[Array, "..."], high: Float[Array, "..."]) -> Float[Array, "..."]:
    """Fold a straight path into [low, high], turning round at both ends."""
    span = high - low
    phase = jnp.mod(position - low, 2 * span)
    return low + span - jnp.abs(phase - span)


def _background(key: Array, points: Float[Array, "F Y X 2"]) -> Float[Array, "F Y X 3"]:
    """A smooth texture: a few waves of up to one and a half periods over the frame, one amplitude per colour."""
    keys = jax.random.split(key, 4)
    waves = jax.random.uniform(keys[0], (_BACKGROUND_WAVES, 2), minval=-1.5, maxval=1.5)
    phases = jax.random.uniform(keys[1], (_BACKGROUND_WAVES,), maxval=2 * jnp.pi)
    amplitudes = jax.random.normal(keys[2], (_BACKGROUND_WAVES, 3)) * 0.14
    base = jax.random.uniform(keys[3], (3,), minval=-0.4, maxval=0.4)
    values = jnp.sin(2 * jnp.pi * points @ waves.T + phases)  # [F, Y, X, waves]
    return jnp.clip(base + values @ amplitudes, -1.0, 1.0)


def _distance(shape: Int[Array, ""], local: Float[Array, "F Y X 2"]) -> Float[Array, "F Y X"]:
    """Signed distance to the rim of a disc, a square or a triangle of half size 1; negative inside."""
    row, column = local[..., 0], local[..., 1]
    disc = jnp.hypot(row, column) - 1.0
    square = jnp.maximum(jnp.abs(row), jnp.abs(column)) - 0.9
    triangle = jnp.maximum(0.894 * jnp.abs(column) - 0.447 * row - 0.447, row - 1.0)
    return jnp.select([shape == 0, shape == 1], [disc, square], triangle)

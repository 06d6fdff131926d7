"""A tiny DiT with weights that are not at their start, shared by the tests of `fgattn_jax.models.dit`."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from fgattn_jax.models.dit import DiT, DiTConfig
from fgattn_jax.models.dit.data import REAL_CLIPS
from fgattn_jax.models.dit.weights import leaf_name, materialize

TINY = DiTConfig(
    width=32, num_layers=2, num_heads=2, head_dim=16, num_frames=4, height=16, width_pixels=16, time_features=32
)
"""64 tokens, a grid of 4 x 4 x 4."""


@functools.cache
def make_model(**settings: Any) -> DiT:
    """A tiny model whose gates, gains and output are not at zero and one, so that every part counts; shared."""
    # NumPy and abstract shapes: the real initialisation takes seconds to compile.
    abstract = nnx.eval_shape(lambda: DiT(TINY, rngs=nnx.Rngs(0), **settings))
    graph, shapes, rest = nnx.split(abstract, nnx.Param, ...)
    rng = np.random.default_rng(1)

    def fill(path: Any, leaf: Any) -> jax.Array:
        start = 1.0 if leaf_name(path).endswith("gain") else 0.0
        spread = leaf.shape[-2] ** -0.5 if leaf_name(path).endswith("kernel") else 0.3
        return jax.numpy.asarray(start + rng.normal(scale=spread, size=leaf.shape), leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, shapes), materialize(rest))


@functools.cache
def new_model() -> DiT:
    """A tiny model as it is before training; shared."""
    return nnx.jit(lambda: DiT(TINY, rngs=nnx.Rngs(0)))()


@nnx.jit
def run(model: DiT, x: Any, t: Any, label: Any, masks: Any = None) -> jax.Array:
    """The velocity, compiled."""
    return model(x, t, label, masks=masks).velocity


def inputs(batch: int = 2, frames: int = 4) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Noisy clips, times and labels."""
    x = jax.random.normal(jax.random.key(2), (batch, frames, 16, 16, 3))
    return x, jax.numpy.linspace(0.2, 0.9, batch), jax.numpy.arange(batch) % TINY.num_classes


def coded_clips(num_frames: tuple[int, ...] = (60, 48, 50), widths: tuple[int, ...] = (40, 30, 24)) -> list[np.ndarray]:
    """Clips whose three colours are the frame, row and column of the pixel."""
    clips = []
    for frames, width in zip(num_frames, widths, strict=True):
        f, y, x = np.meshgrid(np.arange(frames), np.arange(20), np.arange(width), indexing="ij")
        clips.append(np.stack([f, y, x], axis=-1).astype(np.uint8))
    return clips


def write_clips(path: Any) -> Any:
    """A clips file as `fgattn_jax.models.dit.data` writes it; returns the path."""
    np.savez(path, **dict(zip(REAL_CLIPS, coded_clips(), strict=True)))  # pyright: ignore[reportArgumentType]
    return path

"""A tiny random DiT as a weights file: its attention is uneven enough to tell masks apart."""

from pathlib import Path

import jax
from flax import nnx

from fgattn_jax.models.dit.config import DiTConfig
from fgattn_jax.models.dit.model import DiT
from fgattn_jax.models.dit.weights import save_weights

CONFIG = DiTConfig(
    width=32, num_layers=2, num_heads=2, head_dim=16, num_frames=4, height=32, width_pixels=32, num_classes=4
)
"""256 tokens, a grid of 4 x 8 x 8."""


def save_tiny_weights(path: Path) -> Path:
    """Write the weights; returns the path."""
    params = nnx.state(DiT(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Gates and gains start at zero and one: without noise on them attention would do nothing.
    noisy = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    save_weights(path, jax.tree.unflatten(structure, noisy), CONFIG)
    return path

"""Wan 2.1 text-to-video in Flax NNX: diffusers checkpoints, its arithmetic, and attention behind one function."""

from fgattn_jax.models.wan.config import PRESETS, WanConfig
from fgattn_jax.models.wan.model import WanCondition, WanTransformer
from fgattn_jax.models.wan.weights import load, random, read_sizes

__all__ = ["PRESETS", "WanCondition", "WanConfig", "WanTransformer", "load", "random", "read_sizes"]

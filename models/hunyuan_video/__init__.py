"""HunyuanVideo, text to video: the transformer in Flax NNX, from diffusers checkpoints."""

from fgattn_jax.models.hunyuan_video.config import PRESETS, HunyuanVideoConfig
from fgattn_jax.models.hunyuan_video.model import HunyuanVideoCondition, HunyuanVideoTransformer, text_lengths
from fgattn_jax.models.hunyuan_video.weights import load, random, read_sizes, tensor_names

__all__ = [
    "PRESETS",
    "HunyuanVideoCondition",
    "HunyuanVideoConfig",
    "HunyuanVideoTransformer",
    "load",
    "random",
    "read_sizes",
    "tensor_names",
    "text_lengths",
]

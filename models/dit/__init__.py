"""A small video diffusion transformer that denoises with cached slice masks."""

from fgattn_jax.models.dit.config import DiTConfig
from fgattn_jax.models.dit.model import DiT, DiTOutput
from fgattn_jax.models.dit.sampling import Sample, sample
from fgattn_jax.models.dit.weights import load_pretrained, load_weights, save_weights

__all__ = ["DiT", "DiTConfig", "DiTOutput", "Sample", "load_pretrained", "load_weights", "sample", "save_weights"]

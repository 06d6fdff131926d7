"""Flax modules: attention that predicts its mask, keeps it between denoising steps, and skips what it does not need."""

from fgattn_jax.nn.linen_attention_fn import LinenSliceAttentionFn
from fgattn_jax.nn.nnx_attention_fn import DenseLayerFlag, NNXSliceAttentionFn, SliceMaskCache
from fgattn_jax.nn.slice_attention import SliceAttention

__all__ = ["DenseLayerFlag", "LinenSliceAttentionFn", "NNXSliceAttentionFn", "SliceAttention", "SliceMaskCache"]

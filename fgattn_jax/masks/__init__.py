"""Slice masks: container, builders, algebra, files."""

from fgattn_jax.masks.builders import empty, from_dense, from_rows, full
from fgattn_jax.masks.slice_mask import SliceMask

__all__ = ["SliceMask", "empty", "from_dense", "from_rows", "full"]

"""Slice masks: container, builders, algebra, files."""

from fgattn_jax.masks.slice_mask import SliceMask

__all__ = ["SliceMask"]

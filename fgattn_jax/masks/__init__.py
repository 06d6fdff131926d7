"""Slice masks: container, builders, algebra, measures, files."""

from fgattn_jax.masks.algebra import difference, intersection, regroup, union
from fgattn_jax.masks.builders import empty, from_blocks, from_dense, from_indices, from_rows, full
from fgattn_jax.masks.files import load_mask, save_mask
from fgattn_jax.masks.measures import MaskAgreement, agreement, mass_recall, row_histogram
from fgattn_jax.masks.patterns import causal, keep_keys, keep_lengths, local_window
from fgattn_jax.masks.slice_mask import SliceMask

__all__ = [
    "MaskAgreement",
    "SliceMask",
    "agreement",
    "causal",
    "difference",
    "empty",
    "from_blocks",
    "from_dense",
    "from_indices",
    "from_rows",
    "full",
    "intersection",
    "keep_keys",
    "keep_lengths",
    "load_mask",
    "local_window",
    "mass_recall",
    "regroup",
    "row_histogram",
    "save_mask",
    "union",
]

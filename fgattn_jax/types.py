"""Type aliases shared by all layers."""

from typing import Literal

Implementation = Literal["reference", "xla", "pallas", "cuda"]

IMPLEMENTATIONS: tuple[Implementation, ...] = ("cuda", "pallas", "xla", "reference")
"""Every implementation, fastest first."""

QUERY_BLOCKS: tuple[int, ...] = (16, 32, 64, 128)
"""The supported numbers of queries per slice (`M`)."""

"""Names of the stains of Cell Painting, in the order of the published models."""

from __future__ import annotations

CHANNEL_ORDER = ("Mito", "AGP", "RNA", "ER", "DNA", "HighZBF", "LowZBF", "Brightfield")
"""Channels of JUMP-CP images in the order of their numbers, 1 to 8."""

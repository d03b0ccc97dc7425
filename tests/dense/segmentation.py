"""Checkers of the segmentation fixtures, by the class that made them."""

from __future__ import annotations

from tests.dense.golden import Checker

CHECKERS: dict[str, Checker] = {}

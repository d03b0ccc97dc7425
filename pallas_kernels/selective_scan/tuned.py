"""Look up measured block sizes of a device in `tuned/<device>.json`, which `fastvim bench scan --tune` writes.

A shape that was measured takes its blocks from this file. Any other shape follows the rules in `mosaic`, and so do
scans of both directions in one launch, because their best blocks differ. The file keeps only blocks that were clearly
faster than those of the rules.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pallas_kernels import gpu
from pallas_kernels.selective_scan.types import ScanInputs

FOLDER = Path(__file__).parent / "tuned"


class Blocks(NamedTuple):
    """Steps of a tile, channels of a block, and number of parts that the time axis is cut into."""

    chunk: int
    channels: int
    splits: int


_forced: list[Blocks | None] = []


@contextlib.contextmanager
def forced(blocks: Blocks | None) -> Iterator[None]:
    """Make programs traced inside use these blocks for every shape, or the rules' blocks if None."""
    _forced.append(blocks)
    try:
        yield
    finally:
        _forced.pop()


def find(inputs: ScanInputs, gradient: bool) -> Blocks | None:
    """Find the measured blocks of this shape on the device that is traced for; None if there are none."""
    if _forced:
        return _forced[-1]
    if inputs.B.shape[2] != 1 or inputs.A.ndim == 3:
        return None
    batch, length, width = inputs.u.shape
    return _table(gpu.device_kind()).get(key(batch, length, width, inputs.A.shape[1], gradient))


def key(batch: int, length: int, channels: int, states: int, gradient: bool) -> str:
    """Return a shape's key in the file, such as "b128_l14_e384_n16_gradient" (for scans that a gradient follows)."""
    return f"b{batch}_l{length}_e{channels}_n{states}" + ("_gradient" if gradient else "")


def file_of(device_kind: str) -> Path:
    """Return the file with the blocks of a kind of device."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json")


@functools.cache
def _table(device_kind: str) -> dict[str, Blocks]:
    file = file_of(device_kind)
    if not file.exists():
        return {}
    blocks = json.loads(file.read_text())["blocks"]
    return {name: Blocks(*(b[k] for k in Blocks._fields)) for name, b in blocks.items()}

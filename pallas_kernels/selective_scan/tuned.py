"""Block sizes found by measuring, by device: `tuned/<device>.json`, made by `fastvim bench scan --tune`.

A shape that was measured takes its blocks from there, any other from the rules in `mosaic`; scans of both directions
in one launch, whose best blocks differ, always do. Only blocks that were clearly faster than the rules' are kept.
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
    """Steps of a tile, channels of a block, and parts the time is cut into."""

    chunk: int
    channels: int
    splits: int


_forced: list[Blocks | None] = []


@contextlib.contextmanager
def forced(blocks: Blocks | None) -> Iterator[None]:
    """Programs traced inside take these blocks, whatever their shape; those of the rules where None."""
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
    """Such as "b128_l14_e384_n16_gradient"; gradient: for scans whose gradient follows."""
    return f"b{batch}_l{length}_e{channels}_n{states}" + ("_gradient" if gradient else "")


def file_of(device_kind: str) -> Path:
    """Return where the blocks of a kind of device are kept."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json")


@functools.cache
def _table(device_kind: str) -> dict[str, Blocks]:
    file = file_of(device_kind)
    if not file.exists():
        return {}
    blocks = json.loads(file.read_text())["blocks"]
    return {name: Blocks(*(b[k] for k in Blocks._fields)) for name, b in blocks.items()}

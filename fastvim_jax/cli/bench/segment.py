"""`fastvim bench segment`: UperNet by parts, and its training steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastvim_jax.cli.bench.options import Options, measure, on_gpu, status
from fastvim_jax.cli.usage import as_usage_error, parse


@dataclasses.dataclass(frozen=True)
class Segment(Options):
    """Measure segmentation models, for all combinations of models, pixels, batches, precisions and parts."""

    models: tuple[str, ...] = ()
    """Backbones, see `fastvim models`; by default FastVim-T, Vim-T and ViT-T on a GPU, FastVim-T elsewhere."""
    pixels: tuple[int, ...] = ()
    """Sides of the images in pixels; by default 512 on a GPU, 64 elsewhere."""
    batches: tuple[int, ...] = ()
    """Images per batch; by default on a GPU 16 at 512 pixels and 4 at 1024; 2 elsewhere."""
    parts: tuple[Literal["backbone", "heads", "classes", "whole", "train"], ...] = (
        "backbone", "heads", "classes", "whole", "train",
    )  # fmt: skip
    """Parts to measure: parts of a forward pass, whole (all of it), and train (training steps)."""
    precisions: tuple[Literal["bf16", "tf32", "f32"], ...] = ("bf16",)
    """bf16; tf32: float32 with matrix products in TF32; f32: matrix products in full float32."""
    neck: Literal["none", "deconvolution", "multilevel"] = "none"
    """Layers between the backbone and the heads."""
    channels: int = 512
    """Width of UPerHead."""
    blocks: Literal["unroll", "scan"] | None = None
    """By default unroll on a GPU, scan elsewhere; scan compiles in a fraction of the time."""
    depth: int | None = None
    """Number of blocks, to measure a part of a model."""
    json: Path | None = None
    """Write all rows to this file, with device, versions and commit."""


def segment(arguments: Sequence[str]) -> int:
    """Measure segmentation models."""
    chosen = parse(Segment, "bench segment", arguments, f"{Segment.__doc__}")
    from fastvim_jax.bench import segmentation as bench

    gpu = on_gpu()
    tiny = ("fastvim_tiny_patch16_224", "vim_tiny_patch16_224", "vit_tiny_patch16_224")
    settings: list[Any] = [
        (name, pixels, batch, precision, part)
        for name in chosen.models or (tiny if gpu else tiny[:1])
        for pixels in chosen.pixels or ((512,) if gpu else (64,))
        for batch in chosen.batches or (bench.BATCHES.get(pixels, 1) if gpu else 2,)
        for precision in chosen.precisions
        for part in chosen.parts
    ]
    how: dict[str, Any] = {} if chosen.depth is None else {"depth": chosen.depth}
    with as_usage_error():
        cases = bench.cases(
            settings,
            neck=chosen.neck,
            channels=chosen.channels,
            blocks=chosen.blocks or ("unroll" if gpu else "scan"),
            **how,
        )
    return status(measure("segment", cases, bench.COLUMNS, arguments, chosen.json))

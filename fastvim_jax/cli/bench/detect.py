"""`fastvim bench detect`: a Cascade Mask R-CNN by parts, and its training steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastvim_jax.cli.bench.options import Options, measure, on_gpu, status
from fastvim_jax.cli.usage import as_usage_error, parse


@dataclasses.dataclass(frozen=True)
class Detect(Options):
    """Measure detectors, for all combinations of models, pixels, batches, precisions and parts."""

    models: tuple[str, ...] = ()
    """Backbones, see `fastvim models`; by default FastVim-T."""
    pixels: tuple[int, ...] = ()
    """Sides of the images in pixels, multiples of 32; by default 1024 on a GPU, 64 elsewhere."""
    batches: tuple[int, ...] = ()
    """Images per batch; by default 1 and 8 on a GPU, 1 elsewhere."""
    parts: tuple[
        Literal[
            "backbone", "neck", "rpn", "proposals", "boxes", "detections", "masks", "whole", "train"
        ],
        ...,
    ] = (
        "backbone", "neck", "rpn", "proposals", "boxes", "detections", "masks", "whole", "train",
    )  # fmt: skip
    """Parts to measure: parts of detection, whole (all of it), and train (training steps)."""
    precisions: tuple[Literal["bf16", "tf32", "f32"], ...] = ("bf16",)
    """bf16; tf32: float32 with matrix products in TF32; f32: matrix products in full float32."""
    width: int = 256
    """Channels of pyramid and heads."""
    blocks: Literal["unroll", "scan"] | None = None
    """By default unroll on a GPU, scan elsewhere; scan compiles in a fraction of the time."""
    depth: int | None = None
    """Number of blocks, to measure a part of a model."""
    peer: tuple[Literal["eager", "parts", "whole"], ...] = ()
    """Measure torchvision's Mask R-CNN (ResNet-50 FPN v2) instead, at these pixels and batches, on a GPU: eager, with
    its backbone and heads compiled, or compiled as a whole."""
    json: Path | None = None
    """Write all rows to this file, with device, versions and commit."""


def detect(arguments: Sequence[str]) -> int:
    """Measure detectors."""
    chosen = parse(Detect, "bench detect", arguments, f"{Detect.__doc__}")
    from fastvim_jax.bench import detection as bench

    gpu = on_gpu()
    settings: list[Any] = [
        (name, pixels, batch, precision, part)
        for name in chosen.models or ("fastvim_tiny_patch16_224",)
        for pixels in chosen.pixels or ((1024,) if gpu else (64,))
        for batch in chosen.batches or ((1, 8) if gpu else (1,))
        for precision in chosen.precisions
        for part in chosen.parts
    ]
    how: dict[str, Any] = {} if chosen.depth is None else {"depth": chosen.depth}
    with as_usage_error():
        if chosen.peer:
            from fastvim_jax.bench import torchvision_peer

            places = dict.fromkeys((pixels, batch) for _, pixels, batch, _, _ in settings)
            cases = torchvision_peer.cases(list(places), chosen.peer)
        else:
            cases = bench.cases(
                settings,
                detector={"width": chosen.width},
                blocks=chosen.blocks or ("unroll" if gpu else "scan"),
                **how,
            )
    return status(measure("detect", cases, bench.COLUMNS, arguments, chosen.json))

"""`fastvim bench model|train`: images per second of whole models, forward and in training steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastvim_jax.cli.bench.options import (
    Options,
    measure,
    on_gpu,
    status,
)
from fastvim_jax.cli.usage import as_usage_error, parse
from fastvim_jax.errors import UserError

Precision = Literal["bf16", "tf32", "f32"]


@dataclasses.dataclass(frozen=True)
class Model(Options):
    """Measure forward passes of models, for all combinations of models, pixels, batches and precisions.

    Masked autoencoders encode a quarter of the patches and decode all; channel models see all their channels.
    """

    models: tuple[str, ...] = ()
    """Names of models, see `fastvim models`; by default FastVim-T, Vim-T and ViT-T on a GPU, FastVim-T elsewhere."""
    pixels: tuple[int, ...] = (224,)
    """Sides of the images in pixels."""
    batches: tuple[int, ...] = ()
    """Images per batch; by default 128 on a GPU at 224 pixels and fewer at larger sizes, 2 on other devices."""
    precisions: tuple[Precision, ...] = ("bf16",)
    """bf16; tf32: float32 with matrix products in TF32; f32: matrix products in full float32."""
    activations: Literal["compute", "wide"] = "compute"
    """For bf16, the models' option of that name. compute: results between products are bfloat16; wide: float32."""
    residual_in_fp32: bool | None = None
    """For bf16, the models' option of that name. By default False (as in the fast mode), with wide activations True."""
    blocks: Literal["unroll", "scan"] | None = None
    """unroll: compile every block; scan: compile one period of blocks. By default unroll on a GPU, scan elsewhere."""
    depth: int | None = None
    """Number of blocks, to measure a part of a model."""
    json: Path | None = None
    """Write all rows to this file, with device, versions and commit."""


@dataclasses.dataclass(frozen=True)
class Train(Model):
    """Measure training steps: forward, backward and AdamW; of masked autoencoders those of pre-training."""

    recipe: bool = False
    """Measure the supervised recipe's step: uint8 images, flip, RandAugment, erasing and mixing on the device, drop
    path, and the average of the weights."""
    data: int = 1
    """Groups of GPUs of this host; --batches are the images of each GPU."""
    fsdp: int = 1
    """GPUs of a group, over which parameters, optimizer state and average are spread."""
    remat: Literal["none", "block", "dots"] = "none"
    """What the backward pass recomputes, to save memory: nothing, whole blocks, or all but matrix products (dots)."""
    largest_batch: bool = False
    """Instead find the largest batch whose step fits into the device's memory: the first of --batches that fits. With
    two batches in rising order, search between them by bisection."""
    compile_only: bool = False
    """Instead only trace and compile, and count the program's lines."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.largest_batch and self.compile_only:
            raise UserError("choose one of --largest-batch and --compile-only.")
        if self.largest_batch:
            self.refuse("--largest-batch", "data", "fsdp")


def model(arguments: Sequence[str]) -> int:
    """Measure forward passes of models."""
    chosen = parse(Model, "bench model", arguments, f"{Model.__doc__}")
    from fastvim_jax.bench import model as bench

    with as_usage_error():
        cases = bench.cases(_settings(chosen), **_how(chosen))
    return status(measure("model", cases, bench.COLUMNS, arguments, chosen.json))


def train(arguments: Sequence[str]) -> int:
    """Measure training steps."""
    chosen = parse(Train, "bench train", arguments, f"{Train.__doc__}")
    from fastvim_jax.bench import train as bench

    make = bench.largest_batch_cases if chosen.largest_batch else bench.step_cases
    make = bench.compile_cases if chosen.compile_only else make
    with as_usage_error():
        more = {"data": chosen.data, "fsdp": chosen.fsdp, "remat": chosen.remat}
        cases = make(_settings(chosen), recipe=chosen.recipe, **more, **_how(chosen))
    return status(measure("train", cases, bench.COLUMNS, arguments, chosen.json))


def _settings(chosen: Model) -> list[tuple[str, int, int, str]]:
    """List all combinations. Where no batches are given, the image size chooses one."""
    from fastvim_jax.bench.model import BATCHES

    gpu = on_gpu()
    tiny = ("fastvim_tiny_patch16_224", "vim_tiny_patch16_224", "vit_tiny_patch16_224")
    return [
        (name, pixels, batch, precision)
        for name in chosen.models or (tiny if gpu else tiny[:1])
        for pixels in chosen.pixels
        for batch in chosen.batches or (BATCHES.get(pixels, 1) if gpu else 2,)
        for precision in chosen.precisions
    ]


def _how(chosen: Model) -> dict[str, Any]:
    blocks = chosen.blocks or ("unroll" if on_gpu() else "scan")
    depth = {} if chosen.depth is None else {"depth": chosen.depth}
    residual = {"residual_in_fp32": chosen.residual_in_fp32}
    return {"activations": chosen.activations, "blocks": blocks, **residual, **depth}

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
    """Measure models, forward. All combinations of models, pixels, batches and precisions are measured."""

    models: tuple[str, ...] = ()
    """Names, see `fastvim models`; by default FastVim-T, Vim-T and ViT-T on a GPU, FastVim-T elsewhere."""
    pixels: tuple[int, ...] = (224,)
    """Sides of the images."""
    batches: tuple[int, ...] = ()
    """Images at a time; by default on a GPU 128 at 224 pixels, fewer at larger sizes; 2 elsewhere."""
    precisions: tuple[Precision, ...] = ("bf16",)
    """bf16, tf32 (float32, products in TF32), f32 (products in full float32)."""
    activations: Literal["compute", "wide"] = "compute"
    """What bf16 models keep between products; see the option of the models."""
    blocks: Literal["unroll", "scan"] | None = None
    """By default unroll on a GPU, scan elsewhere."""
    depth: int | None = None
    """Number of blocks, to measure a part of a model."""
    json: Path | None = None
    """Keep all rows in this file, with device, versions and commit."""


@dataclasses.dataclass(frozen=True)
class Train(Model):
    """Measure training steps: forward, backward and AdamW."""

    recipe: bool = False
    """Measure the supervised recipe's step: uint8 images, flip, RandAugment, erasing and mixing on the device, drop
    path, and the average of the weights."""
    largest_batch: bool = False
    """Instead find the first of the batches, as given, of which a step fits into the device's memory; of two in rising
    order, the largest between them by bisection."""
    compile_only: bool = False
    """Instead trace and compile only, and count the program's lines."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.largest_batch and self.compile_only:
            raise UserError("choose one of --largest-batch and --compile-only.")


def model(arguments: Sequence[str]) -> int:
    """Models, forward."""
    chosen = parse(Model, "bench model", arguments, f"{Model.__doc__}")
    from fastvim_jax.bench import model as bench

    with as_usage_error():
        cases = bench.cases(_settings(chosen), **_how(chosen))
    return status(measure("model", cases, bench.COLUMNS, arguments, chosen.json))


def train(arguments: Sequence[str]) -> int:
    """Training steps."""
    chosen = parse(Train, "bench train", arguments, f"{Train.__doc__}")
    from fastvim_jax.bench import train as bench

    make = bench.largest_batch_cases if chosen.largest_batch else bench.step_cases
    make = bench.compile_cases if chosen.compile_only else make
    with as_usage_error():
        cases = make(_settings(chosen), recipe=chosen.recipe, **_how(chosen))
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
    return {"activations": chosen.activations, "blocks": blocks, **depth}

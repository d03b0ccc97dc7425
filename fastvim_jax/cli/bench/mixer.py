"""`fastvim bench mixer`: one mixer, stage by stage and as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastvim_jax.cli.bench.options import (
    Direction,
    Options,
    gradients_of,
    measure,
    on_gpu,
    status,
)
from fastvim_jax.cli.usage import parse
from fastvim_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mixer(Options):
    """Measure one mixer: the stages of its state-space part, and its whole core."""

    pixels: tuple[int, ...] = ()
    """Sides of the images, in whole patches of 16; by default 224 to 2048 on a GPU, 64 and 128 elsewhere."""
    batch: int | None = None
    """Images per batch; by default 128 on a GPU, 2 elsewhere."""
    width: int | None = None
    """Width of the model; by default 192 (Tiny) on a GPU, 64 elsewhere."""
    parts: tuple[Literal["stages", "core"], ...] = ("stages", "core")
    """stages: the stages of the state-space part, one by one. core: everything between the mixer's two projections."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Dtypes of the core. Stages are measured in float32."""
    directions: tuple[Direction, ...] = ("forward", "both")
    """forward: the forward pass. both: forward and backward, with all gradients (of the stages, only of total)."""
    json: Path | None = None
    """Write all rows to this file, with device, versions and commit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(side % 16 for side in self.pixels):
            raise UserError("--pixels must be multiples of 16, the side of a patch.")


def mixer(arguments: Sequence[str]) -> int:
    """Measure one mixer."""
    chosen = parse(Mixer, "bench mixer", arguments, f"{Mixer.__doc__}")
    from fastvim_jax.bench import mixer as bench

    gpu = on_gpu()
    cases = bench.cases(
        width=chosen.width or (192 if gpu else 64),
        batch=chosen.batch or (128 if gpu else 2),
        pixels=chosen.pixels or ((224, 512, 1024, 2048) if gpu else (64, 128)),
        parts=chosen.parts,
        dtypes=chosen.dtypes,
        gradients=gradients_of(chosen.directions),
    )
    return status(measure("mixer", cases, bench.COLUMNS, arguments, chosen.json))

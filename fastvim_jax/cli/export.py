"""`fastvim export RUN --out FILE`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastvim_jax.cli.usage import parse


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The run to export, and the file to write."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, a folder of `save_pretrained`, or hf://owner/name."""
    out: Path
    """File to write; its name ends in .npz."""
    fast: bool = False
    """Include the GPU kernels: the file then needs a Hopper GPU and one batch size. Otherwise CPU or CUDA."""
    batch: int | None = None
    """Images per call; without --fast and --batch the program takes any number."""
    weights: Literal["raw", "ema"] | None = None
    """The trained weights or their average; by default the average, or what scored better in the run's log."""
    step: int | Literal["best"] | None = None
    """Which checkpoint: its step, or best for the one with the best score; by default the last."""


def run(arguments: Sequence[str]) -> int:
    """Export a trained classifier to one file that runs with JAX and NumPy alone."""
    chosen = parse(Arguments, "export", arguments, f"{run.__doc__}")
    from fastvim_jax.inference.export import export_classifier
    from fastvim_jax.models.pretrained import is_pretrained, load_pretrained, refuse_choice
    from fastvim_jax.training import load_run

    loaded: Any
    if is_pretrained(chosen.run):
        refuse_choice(chosen.run, chosen.weights, chosen.step)
        loaded = load_pretrained(chosen.run)
    else:
        loaded = load_run(chosen.run, weights=chosen.weights, step=chosen.step)
    about = export_classifier(loaded, chosen.out, fast=chosen.fast, batch=chosen.batch)
    size = "any number of" if about["batch"] is None else about["batch"]
    print(
        f"{chosen.out}: {chosen.out.stat().st_size / 1e6:.1f} MB, for {' and '.join(about['platforms'])}, "
        f"{size} images of {'x'.join(map(str, about['image']))} a call."
    )
    return 0

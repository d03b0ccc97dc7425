"""`fastvim export-weights RUN --out PATH`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastvim_jax.cli.usage import command, parse


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The weights to write, and the file or folder."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, a folder of `save_pretrained`, or hf://owner/name."""
    out: Path
    """The folder to write; with --to torch a file that ends in .safetensors, .pth, .pt or .ckpt."""
    to: Literal["folder", "torch"] = "folder"
    """folder: weights, config and model card, which other commands take and the Hugging Face hub shows; torch: one file
    under the names of the authors' PyTorch code."""
    weights: Literal["raw", "ema"] | None = None
    """The trained weights or their average; by default the average, or what scored better in the run's log."""
    step: int | Literal["best"] | None = None
    """Which checkpoint: its step, or best for the one with the best score; by default the last."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights: bfloat16 halves the file and rounds the weights."""
    licence: str = ""
    """Licence for the model card and the Hugging Face hub, such as cc-by-4.0 or apache-2.0. By default none is named,
    or for a saved model the one that its card names."""
    overwrite: bool = False
    """Replace a saved model that the folder holds."""


def run(arguments: Sequence[str]) -> int:
    """Write the weights of a run for others: a folder to share, or a file for PyTorch."""
    chosen = parse(Arguments, "export-weights", arguments, f"{run.__doc__}")
    from fastvim_jax.inference.export_weights import export_weights
    from fastvim_jax.inference.next_command import next_command
    from fastvim_jax.models.pretrained import read_model_config

    out = export_weights(
        chosen.run,
        chosen.out,
        to=chosen.to,
        weights=chosen.weights,
        step=chosen.step,
        dtype=chosen.dtype,
        licence=chosen.licence,
        overwrite=chosen.overwrite,
    )
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    size = sum(file.stat().st_size for file in files)
    names = f", {', '.join(file.name for file in files)}" if out.is_dir() else ""
    print(f"{out}: {size / 1e6:.1f} MB{names}.")
    if chosen.to == "folder":
        uses = next_command(out, read_model_config(out))
        print(
            f"Load it by from_pretrained({str(out)!r})"
            + (f", or: {command()} {uses}" if uses else ".")
        )
    return 0

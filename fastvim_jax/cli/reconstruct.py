"""`fastvim reconstruct RUN IMAGE... --out FILE`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastvim_jax.cli.usage import UsageError, as_usage_error, parse

_MOST = 100
"""Images of one picture."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The images to reconstruct, and the model."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a masked pre-training run or of a saved masked autoencoder, or hf://owner/name."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image files of any size and kind, folders, tar files, patterns in quotes, or @FILE with one name per line;
    together at most 100."""
    out: Path = Path("reconstructions.png")
    """PNG file to write: one row per image, with original, masked, reconstructed and pasted image."""
    mask_ratio: float | None = None
    """Share of the patches to remove; by default that of the run."""
    seed: int = 0
    """Seed of the choice of patches."""
    weights: Literal["raw", "ema"] | None = None
    """The trained weights or their average; by default the average, or what scored better in the run's log."""
    step: int | None = None
    """Step of the checkpoint; by default the last."""


def run(arguments: Sequence[str]) -> int:
    """Draw image files as a masked autoencoder reconstructs them.

    Files that are not images are reported and left out; the exit status is then 1.
    """
    chosen = parse(Arguments, "reconstruct", arguments, f"{run.__doc__}")
    if not chosen.images:
        raise UsageError(
            "name at least one image file: fastvim reconstruct RUN IMAGE... --out FILE"
        )
    from fastvim_jax.inference.image_files import find_images
    from fastvim_jax.inference.reconstruct import load_masked, reconstruct_files

    with as_usage_error():
        files = find_images(chosen.images)
    if len(files) > _MOST:
        raise UsageError(
            f"the picture has one row per image, at most {_MOST}, but {len(files):,} are named: name fewer."
        )
    loaded = load_masked(chosen.run, weights=chosen.weights, step=chosen.step)
    problems = reconstruct_files(
        loaded, files, chosen.out, mask_ratio=chosen.mask_ratio, seed=chosen.seed
    )
    for problem in problems:
        print(f"fastvim: {problem}", file=sys.stderr)
    print(f"Wrote {chosen.out}: original, masked, reconstructed, pasted.")
    return int(bool(problems))

"""`fastvim import-weights FILE --out FOLDER`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from fastvim_jax.cli.usage import command, parse

_LICENCE = (
    "The weights keep the licence of whoever made them: those of the FastVim authors are CC BY-NC-SA 4.0 "
    "(no commercial use, name the authors, share alike), whatever this library's own licence is. The model card names "
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The file to import, and the folder to write."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A .pth, .pth.tar, .pt, .ckpt, .bin or .safetensors file. Nothing in it is run, and PyTorch is not needed."""
    out: Path
    """Folder to write: weights, config and model card."""
    model: str | None = None
    """Name of the model, as `fastvim models` lists them; by default it is recognised from names and shapes."""
    entry: str | None = None
    """Entry of a checkpoint that holds the weights; by default the averaged ones if there are any."""
    image_size: int | None = None
    """Pixels for which the position embeddings are resampled; by default those of the file."""
    num_classes: int | None = None
    """Classes of a new head, drawn at random; by default the file's head is kept."""
    classes: Path | None = None
    """Names of the classes: a text file with one per line, or a class list (.tsv, .csv). Without it predictions show
    the classes' numbers."""
    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A field of the model's config, NAME=VALUE, that names and shapes do not determine. May be given several times."""
    mean: tuple[float, ...] = ()
    """Mean of each channel, for pixels from 0 to 1; by default ImageNet's, or for cell images JUMP-CP's."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, for pixels from 0 to 1."""
    seed: int = 0
    """Seed of parameters that are drawn at random, such as a new head."""
    licence: str = ""
    """Licence of the weights for the model card, such as cc-by-4.0 or apache-2.0. By default cc-by-nc-sa-4.0, that of
    the FastVim authors' weights, for models that only they released; otherwise none is named."""
    overwrite: bool = False
    """Replace a saved model that the folder holds."""


def run(arguments: Sequence[str]) -> int:
    """Import the weights of a PyTorch or safetensors file into a folder that other commands take.

    The table says what became of every entry. A name or shape that fits nowhere is an error.
    """
    chosen = parse(Arguments, "import-weights", arguments, f"{run.__doc__}")
    from fastvim_jax.inference.import_weights import import_weights, parse_options

    options = parse_options(chosen.option)
    if chosen.num_classes is not None:
        options["num_classes"] = chosen.num_classes
    if chosen.image_size is not None:
        options["image_size"] = chosen.image_size
    imported = import_weights(
        chosen.file,
        chosen.out,
        name=chosen.model,
        entry=chosen.entry,
        options=options,
        classes=chosen.classes,
        mean=chosen.mean,
        std=chosen.std,
        seed=chosen.seed,
        licence=chosen.licence,
        overwrite=chosen.overwrite,
    )
    print(imported.in_words())
    print(_LICENCE + (f"{imported.licence}." if imported.licence else "none: give --licence."))
    print(f"Everything is in {chosen.out}. Next: {command()} {imported.next_command}")
    return 0

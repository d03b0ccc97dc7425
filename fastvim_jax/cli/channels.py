"""`fastvim channels RUN [IMAGE]`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastvim_jax.cli.usage import parse, require_picture


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The run, and the channels."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of a run on images of many channels."""
    image: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")] = None
    """An image of all channels. Show what each channel contributes to its class, instead of accuracies. Of a larger
    image than the model's input only the centre is read."""
    subsets: tuple[str, ...] = ()
    """Subsets of channels to evaluate, written as DNA+ER; by default all, all but one, and single ones."""
    split: str | None = None
    """Split to evaluate on; by default the run's data.eval_split."""
    weights: Literal["raw", "ema"] | None = None
    """The trained weights or their average; by default the average, or what scored better in the run's log."""
    plot: Path | None = None
    """Draw the result to this PNG file."""


def run(arguments: Sequence[str]) -> int:
    """Show which channels matter: accuracy by subset of channels, or each channel's contribution to one image."""
    chosen = parse(Arguments, "channels", arguments, f"{run.__doc__}")
    require_picture(chosen.plot)
    return _accuracies(chosen) if chosen.image is None else _contributions(chosen, chosen.image)


def _accuracies(chosen: Arguments) -> int:
    from fastvim_jax.inference.channel_scores import (
        as_table,
        channel_data,
        default_subsets,
        draw,
        score_subsets,
    )
    from fastvim_jax.training.run_folder import read_config

    names = channel_data(read_config(chosen.run), chosen.run).names
    subsets = [tuple(text.split("+")) for text in chosen.subsets] or default_subsets(names)
    changes = {} if chosen.split is None else {"eval_split": chosen.split}
    scores = score_subsets(chosen.run, subsets, weights=chosen.weights, **changes)
    if chosen.plot:
        draw(scores, names, chosen.plot)
    print(as_table(scores, names))
    return 0


def _contributions(chosen: Arguments, image: Path) -> int:
    from fastvim_jax.data.cells import load_image
    from fastvim_jax.inference.channel_model import channel_data
    from fastvim_jax.inference.contributions import channel_contributions, draw_contributions
    from fastvim_jax.training import load_run

    loaded = load_run(chosen.run, weights=chosen.weights)
    data = channel_data(loaded.config, chosen.run)
    pixels = load_image(image, data)
    label, probability, found = channel_contributions(loaded.model, data, pixels)
    name = (loaded.class_names or (str(label),) * (label + 1))[label]
    if chosen.plot:
        draw_contributions(pixels, name, probability, found, chosen.plot)
    height, width = data.height_width
    print(
        f"{image} (centre, {height} x {width} pixels): {name}, probability {probability:.3f} with all channels"
    )
    for one in found:
        print(f"  {one.channel}: {one.without:.3f} without it, {one.alone:.3f} alone")
    return 0

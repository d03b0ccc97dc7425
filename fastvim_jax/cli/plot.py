"""`fastvim plot NAME`: the figures of the documentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastvim_jax.cli.usage import UsageError, parse
from fastvim_jax.errors import suggest

RECORDS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The figure to draw, and its inputs."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ""
    """Name of the figure, or `all`. `--list` shows the names."""
    out: Path | None = None
    """PNG file to write (default: NAME.png). With `all`, the folder for all figures (default: this folder)."""
    records: Path | None = None
    """Folder with the JSON files of `fastvim bench ... --json`, for `throughput` and `stages`. Default: the
    project's own records on the card that --card names."""
    card: Literal["h100", "h200"] = "h100"
    """Whose records to draw without --records. Those of an H200 are newer, of fewer models, and for `throughput`
    alone."""
    image: Path | None = None
    """Photograph for `selection`. Default: a photograph that comes with scikit-learn."""
    run: Path | None = None
    """Trained run whose model `selection` looks into. Default: models with random weights."""
    list: bool = False
    """List the figures and exit."""


def run(arguments: Sequence[str]) -> int:
    """Draw a figure of the documentation as a PNG file, from recorded benchmarks or a fresh computation."""
    chosen = parse(Arguments, "plot", arguments, f"{run.__doc__}")
    from fastvim_jax.analysis.figures import FIGURES, Inputs, draw_figure

    if chosen.list:
        width = max(map(len, FIGURES))
        for name, spec in FIGURES.items():
            print(f"{name:<{width}}  {spec.text}")
        return 0
    if not chosen.name:
        raise UsageError(f"name a figure: {', '.join(FIGURES)}, or all.")
    if chosen.name not in (*FIGURES, "all"):
        hint = suggest(chosen.name, FIGURES) or f" Figures: {', '.join(FIGURES)}, all."
        raise UsageError(f"unknown figure {chosen.name!r}.{hint}")
    if chosen.records is not None and not chosen.records.is_dir():
        raise UsageError(f"--records {chosen.records} is no folder.")
    own = RECORDS / chosen.card
    inputs = Inputs(
        records=chosen.records or (own if own.is_dir() else None),
        image=chosen.image,
        **({} if chosen.run is None else _of_run(chosen.run)),
    )
    every = chosen.name == "all"
    for name in FIGURES if every else [chosen.name]:
        file = (chosen.out or Path(".")) / f"{name}.png" if every else chosen.out
        file = file or Path(f"{name}.png")
        draw_figure(name, file, inputs)
        print(f"Wrote {file}")
    return 0


def _of_run(folder: Path) -> dict[str, Any]:
    """Return a run's model, and by what its images are normalised."""
    from fastvim_jax.training import load_run

    run = load_run(folder)
    data: Any = run.config.data
    return {"model": run.model, "mean": data.mean, "std": data.std}

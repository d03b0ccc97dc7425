"""`fastvim quickstart-report RUN`: restore the run in a new process, and evaluate it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from fastvim_jax.cli.usage import command, parse
from fastvim_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The run to report on."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    picture: Path | None = None
    """PNG file to write; by default quickstart.png in the run's folder."""
    at_least: float = 0.0
    """Exit with status 1 if the accuracy is lower."""


def run(arguments: Sequence[str]) -> int:
    """Restore a trained run, classify its held-out images and draw its curves and some predictions."""
    chosen = parse(Arguments, "quickstart-report", arguments, f"{run.__doc__}")
    from fastvim_jax.inference.report import report_run
    from fastvim_jax.training import load_run

    loaded = load_run(chosen.run)
    picture = chosen.picture or chosen.run / "quickstart.png"
    report = report_run(loaded, chosen.run, picture)
    print(
        f"Restored step {loaded.step} ({loaded.weights} weights): {report.correct} of {report.count} held-out "
        f"images right, accuracy {report.accuracy:.2%}."
    )
    print(
        f"Everything is in {chosen.run}; curves and predictions: {picture}. Try next: "
        f"`{command()} eval {chosen.run}`, or `models`, `predict {chosen.run} IMAGE...`, "
        f"`train digits/fastvim_digits --help` in its place."
    )
    if report.accuracy < chosen.at_least:
        raise UserError(f"accuracy {report.accuracy:.2%} is below {chosen.at_least:.2%}.")
    return 0

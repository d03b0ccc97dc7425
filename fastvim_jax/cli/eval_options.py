"""Define the options that `fastvim eval` has for both segmentation and detection."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastvim_jax.cli.usage import as_usage_error


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """The run to evaluate, and the data."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    step: int | Literal["best"] | None = None
    """Which checkpoint: its step, or best for the one with the best score; by default the last."""
    split: str | None = None
    """Split of the data; by default the one that the run was evaluated on."""
    path: str | None = None
    """The data set's folder; by default the run's."""
    per_class: bool = False
    """Also show the scores of each class."""
    json: bool = False
    """Print JSON."""

    def data(self) -> Any:
        """Return the config of the run's data, with the split and the folder that were given.

        Raises:
            UsageError: the run has no readable config, or the config refuses what was given.
        """
        from fastvim_jax.training.run_folder import read_config

        given = {"eval_split": self.split, "path": self.path}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        with as_usage_error():
            return dataclasses.replace(read_config(self.run).data, **changes)

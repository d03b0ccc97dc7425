"""Send a run's numbers to Weights & Biases (extra `wandb`): `fastvim train ... --wandb PROJECT`."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvim_jax.errors import UserError

_ID_FILE = "wandb_id"


class WandbLog:
    """Log of scalars in a W&B run that belongs to the run folder. A resumed run continues the same W&B run.

    Steps that an interrupted run has sent already are sent again, and W&B ignores them.

    Args:
        project: the W&B project.
        folder: the run folder; W&B keeps its own files in `wandb/` there.
        config: shown beside the run.

    Raises:
        UserError: W&B is not installed.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise UserError(
                "Weights & Biases is not installed: pip install 'fastvim-jax[wandb]', or leave out --wandb."
            ) from error
        identity = folder / _ID_FILE
        if not identity.is_file():
            identity.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=project,
            id=identity.read_text().strip(),
            resume="allow",
            name=folder.resolve().name,
            dir=str(folder),
            config=dict(config),
        )

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send scalars by their names."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()

"""Whether two run folders hold the same run, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from fastvim_jax.training.clock import TIMING
from fastvim_jax.training.metrics import read_metrics

ITEMS = ("params", "ema", "optimizer")


def read_checkpoint(folder: Path, step: int) -> dict[str, dict[str, np.ndarray]]:
    """Read all arrays of a checkpoint from disk, without the trainer's code. Not every run keeps an average."""
    parts = [(folder / "checkpoints" / str(step) / item).absolute() for item in ITEMS]
    with ocp.StandardCheckpointer() as reader:
        return {part.name: reader.restore(part) for part in parts if part.exists()}


def steps_of(folder: Path) -> list[int]:
    names = (path.name for path in (folder / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdigit())


def assert_same_run(a: Path, b: Path) -> None:
    """Assert equal bits of weights, average and optimizer in every checkpoint, and equal metrics."""
    assert steps_of(a) == steps_of(b)
    for step in steps_of(a):
        ours, theirs = read_checkpoint(a, step), read_checkpoint(b, step)
        assert ours.keys() == theirs.keys() >= {"params", "optimizer"}
        for item in ours:
            assert ours[item].keys() == theirs[item].keys()
            for name, value in ours[item].items():
                same = np.asarray(value).tobytes() == np.asarray(theirs[item][name]).tobytes()
                assert same, f"step {step}: {item} {name} differs"
    ours_log, theirs_log = (
        [{k: v for k, v in record.items() if k not in TIMING} for record in read_metrics(folder)]
        for folder in (a, b)
    )
    assert ours_log == theirs_log

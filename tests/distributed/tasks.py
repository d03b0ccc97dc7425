"""Run as a program, in one or several processes: a short run of a task, in FOLDER/run.

python tests/distributed/tasks.py FOLDER NAME [SECONDS]     (names: programs.py)

All processes but the first make their first update SECONDS later than it does.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from fastvim_jax.distributed import initialize_distributed, is_first_process
from fastvim_jax.training import train
from fastvim_jax.training.steps import TrainStep
from tests.distributed.programs import config_of


def be_late(seconds: float) -> None:
    step = TrainStep.__call__

    def wait(*arguments: Any, **options: Any) -> Any:
        TrainStep.__call__ = step  # type: ignore[method-assign]
        time.sleep(seconds)
        return step(*arguments, **options)

    TrainStep.__call__ = wait  # type: ignore[method-assign]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)  # which some of the configs want
    initialize_distributed()
    if len(sys.argv) > 3 and not is_first_process():
        be_late(float(sys.argv[3]))
    with tempfile.TemporaryDirectory() as data:  # every process writes the same
        config = config_of(sys.argv[2], Path(data))
        config = dataclasses.replace(config, epochs=1, log_every_steps=1)
        train(config, Path(sys.argv[1], "run"), progress=False)

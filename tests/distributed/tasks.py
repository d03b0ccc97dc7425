"""Run as a program, in one or several processes: a short run of a task, in FOLDER/run.

python tests/distributed/tasks.py FOLDER NAME     (names: programs.py)
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import jax

from fastvim_jax.distributed import initialize_distributed
from fastvim_jax.training import train
from tests.distributed.programs import config_of

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)  # which some of the configs want
    initialize_distributed()
    with tempfile.TemporaryDirectory() as data:  # every process writes the same
        config = config_of(sys.argv[2], Path(data))
        config = dataclasses.replace(config, epochs=1, log_every_steps=1)
        train(config, Path(sys.argv[1], "run"), progress=False)

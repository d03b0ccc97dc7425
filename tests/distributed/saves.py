"""Run as a program in two processes: process 0 finishes a save while process 1 has not come so far.

python tests/distributed/saves.py FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fastvim_jax.distributed import MeshConfig, initialize_distributed, make_mesh
from fastvim_jax.training.checkpoints import Checkpoints
from fastvim_jax.training.steps import TrainState

PATIENCE = 60.0  # seconds


def main(folder: str) -> None:
    initialize_distributed()
    mesh = make_mesh(MeshConfig())
    everywhere = NamedSharding(mesh, PartitionSpec())
    step, params = jax.jit(
        lambda: (jnp.int32(1), {"w": jnp.arange(64.0)}), out_shardings=everywhere
    )()
    done = Path(folder, "process_0_has_waited")
    with Checkpoints(Path(folder, "checkpoints")) as checkpoints:
        state = TrainState(step=step, params=params, optimizer=params, ema=None)
        checkpoints.save(state, {})
        if jax.process_index() == 0:
            checkpoints.wait()
            done.touch()
        else:
            end = time.monotonic() + PATIENCE
            while not done.exists():
                assert time.monotonic() < end, "process 0 waits for this process"
                time.sleep(0.05)
            checkpoints.wait()
    print("saved", checkpoints.latest())


if __name__ == "__main__":
    main(*sys.argv[1:])

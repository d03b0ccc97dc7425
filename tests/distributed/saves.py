"""Run as a program in two processes: process 0 finishes a save while process 1 has not come so far.

Then process 1 does not see the checkpoint, and a second save fails in process 0 alone.

python tests/distributed/saves.py FOLDER
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fastvim_jax.distributed import MeshConfig, fail_at_once, initialize_distributed, make_mesh
from fastvim_jax.training import checkpoints as module
from fastvim_jax.training.checkpoints import CheckpointError, Checkpoints
from fastvim_jax.training.steps import TrainState

PATIENCE = 30.0  # seconds


def await_file(path: Path) -> None:
    """Wait for the other process to write a file. End at once if it does not, because it may wait for this one."""
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            print("the other process stands still", flush=True)
            os._exit(1)
        time.sleep(0.05)


def main(folder: str) -> None:
    initialize_distributed()
    mesh = make_mesh(MeshConfig())
    everywhere = NamedSharding(mesh, PartitionSpec())
    step, params = jax.jit(
        lambda: (jnp.int32(1), {"w": jnp.arange(64.0)}), out_shardings=everywhere
    )()
    done, failed, left = (Path(folder, name) for name in ("done", "failed", "left"))
    with Checkpoints(Path(folder, "checkpoints")) as checkpoints:
        state = TrainState(step=step, params=params, optimizer=params, ema=None)
        checkpoints.save(state, {})
        if jax.process_index() == 0:
            checkpoints.wait()
            done.touch()
        else:
            await_file(done)
            checkpoints.wait()
        print("saved", checkpoints.latest(), flush=True)
        see_late(checkpoints)
        if jax.process_index() == 0:
            module.write_checksums = refuse
        checkpoints.save(TrainState(step=step + 1, params=params, optimizer=params, ema=None), {})
        if jax.process_index() == 0:
            try:
                checkpoints.wait()
            except CheckpointError as error:
                print(str(error).partition(":")[0], flush=True)
                failed.touch()
            await_file(left)
        await_file(failed)
        left.touch()
        os._exit(0)  # A normal exit of process 1 would wait for the save.


def see_late(checkpoints: Checkpoints) -> None:
    """Let process 1 not see the checkpoint yet, like another host of a shared file system. It is read all the same."""
    step_folders = module.step_folders
    if jax.process_index() == 1:
        module.step_folders = lambda _: []
    assert checkpoints.latest_for_all() == 1
    assert checkpoints.read_meta()["step"] == 1
    module.step_folders = step_folders


def refuse(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception:
        fail_at_once(1, traceback.format_exc())

"""Run as a program in several processes: one of them gets SIGTERM, and each prints the step it stopped after.

python tests/distributed/stops.py STEP            only asks, without a model
python tests/distributed/stops.py STEP FOLDER     trains there; a second time to the end
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import jax

from fastvim_jax.distributed import initialize_distributed
from fastvim_jax.training import Stopped, train
from fastvim_jax.training.metrics import RunLog
from fastvim_jax.training.stopping import StopRequest
from tests.training.tiny import tiny_config, tiny_model


def signal_at(step: int, at: int) -> None:
    if step == at and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def ask(at: int) -> int:
    with StopRequest() as stop:
        for step in range(1, 100):
            signal_at(step, at)
            if stop.agreed(step):
                return step
    return 0


def stop_training(at: int, folder: Path) -> int:
    advance, count = RunLog.advance, iter(range(1, 1000))

    def send(log: RunLog) -> None:
        advance(log)
        signal_at(next(count), at)

    config = tiny_config(model=tiny_model(depth=1), keep_checkpoints=1)
    try:
        if at:
            RunLog.advance = send  # type: ignore[method-assign]
        return train(config, folder, progress=False).step
    except Stopped as stopped:
        return stopped.step


def main(at: str, *folder: str) -> None:
    initialize_distributed()
    print("stopped", stop_training(int(at), Path(folder[0])) if folder else ask(int(at)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A run killed without warning, twice, resumes to the bits of one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.compare_runs import assert_same_run, steps_of
from tests.training.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from pathlib import Path
from fastvim_jax.training import TrainConfig, train
train(TrainConfig.from_json(Path(sys.argv[1]).read_text()), sys.argv[2], progress=False)
"""


def start(config: Path, folder: Path, cache: Path) -> subprocess.Popen:
    # Compiled once: the second and later processes only load.
    settings = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(config), str(folder)],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


def kill_after(process: subprocess.Popen, folder: Path, step: int, delay: float) -> None:
    """Kill the process `delay` seconds after its checkpoint of `step` is there."""
    checkpoints = folder / "checkpoints"
    deadline = time.monotonic() + 600
    while not (checkpoints.is_dir() and steps_of(folder) and steps_of(folder)[-1] >= step):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, rng):
    # Long enough to be killed on the way: 110 steps, a checkpoint every 4, a line of the log every 3.
    config = tmp_path / "config.json"
    config.write_text(tiny_config(epochs=10, evaluate_every_epochs=3).to_json())
    alone, killed, cache = tmp_path / "alone", tmp_path / "killed", tmp_path / "cache"
    finish(start(config, alone, cache))
    reached = 0
    for _ in range(2):
        process = start(config, killed, cache)
        kill_after(process, killed, reached + int(rng.integers(4, 30)), float(rng.uniform(0, 0.2)))
        assert steps_of(killed)[-1] > reached
        reached = steps_of(killed)[-1]
    finish(start(config, killed, cache))
    assert_same_run(killed, alone)
    starts = (killed / "environment.json").read_text().count('"started"')
    assert starts == 3

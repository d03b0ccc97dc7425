"""A run killed again and again without warning ends in the bits of one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.support import ROOT
from tests.training.compare_runs import assert_same_run, steps_of
from tests.training.tiny import STEPS_PER_EPOCH, tiny_config, tiny_model

KILLS = int(
    os.environ.get("FASTVIM_TEST_KILLS", "1")
)  # a start costs 5 seconds of processor time and more
CONFIG = tiny_config(
    model=tiny_model(depth=1),
    epochs=8 if KILLS == 1 else 16,
    evaluate_every_epochs=2,
    checkpoint_every_steps=6,
)
TOTAL = CONFIG.epochs * STEPS_PER_EPOCH
TIMEOUT = 300

# Imports first, and waits: the next process gets ready while this one trains.
SCRIPT = """
import sys
from pathlib import Path
import sklearn.datasets
from fastvim_jax.training import TrainConfig, train
config = TrainConfig.from_json(Path(sys.argv[1]).read_text())
sys.stdin.readline()
train(config, sys.argv[2], progress=False)
"""


class Killer:
    """Starts the run's processes and kills them.

    Three ways: `early`, at any moment of the first seconds (the folder being made or locked, the checkpoint being
    read); `saving`, while a checkpoint is being written; `any`, some steps and some time after the start.
    """

    def __init__(self, folder: Path, config: Path, cache: Path, rng: np.random.Generator) -> None:
        self.folder, self.rng = folder, rng
        self.config, self.cache = config, cache
        self.next = self._start()

    def _start(self) -> subprocess.Popen:
        settings = {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            # Compiled once: the later processes only load.
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(self.config), str(self.folder)],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _go(self) -> subprocess.Popen:
        process = self.next
        process.stdin.write("go\n")
        process.stdin.flush()
        return process

    def run_to_the_end(self) -> None:
        process = self._go()
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, errors

    def kill_once(self, how: str) -> None:
        before = self.reached()
        process = self._go()
        self.next = self._start()
        if how == "early":
            time.sleep(float(self.rng.uniform(0, 5)))
        else:
            step = before + int(self.rng.integers(1, 20))
            until = self._is_saving if how == "saving" else self.reached
            deadline = time.monotonic() + TIMEOUT
            while until() < step:
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(float(self.rng.uniform(0, 0.02 if how == "saving" else 0.2)))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors

    def close(self) -> None:
        self.next.kill()
        self.next.communicate()

    def reached(self) -> int:
        """Return the last finished checkpoint's step."""
        return max(steps_of(self.folder), default=0) if self._names() else 0

    def _is_saving(self) -> int:
        """Return the step of the checkpoint that is being written; 0: none is."""
        return max((int(name.split(".")[0]) for name in self._names() if "tmp" in name), default=0)

    def _names(self) -> list[str]:
        folder = self.folder / "checkpoints"
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []


@pytest.mark.drawn("trainings", one_in=6)
@pytest.mark.slow
def test_a_run_killed_many_times_ends_in_the_same_bits(tmp_path, rng, record_property):
    begin = time.monotonic()
    config = tmp_path / "config.json"
    config.write_text(CONFIG.to_json())
    alone = Killer(tmp_path / "alone", config, tmp_path / "cache", rng)
    alone.run_to_the_end()

    killer = Killer(tmp_path / "killed", config, tmp_path / "cache", rng)
    done: Counter[str] = Counter()
    half_written = 0
    order = rng.permutation(["saving", "early", "any"]).tolist()
    try:
        while done.total() < KILLS:
            # Each way in turn; near the end only kills that cannot come too late.
            in_time = killer.reached() < TOTAL - 66
            how = order[done.total() % len(order)] if in_time else "early"
            killer.kill_once(how)
            done[how] += 1
            half_written += killer._is_saving() > 0
        reached = killer.reached()
        killer.run_to_the_end()
    finally:
        killer.close()
    assert_same_run(tmp_path / "killed", tmp_path / "alone")
    # Killed early alone, the run may have reached nothing.
    assert (0 if done.keys() == {"early"} else 1) <= reached < TOTAL
    starts = json.loads((tmp_path / "killed" / "environment.json").read_text())["starts"]
    ways = ", ".join(f"{count} {how}" for how, count in sorted(done.items()))
    record_property(
        "summary",
        f"killed {KILLS} times ({ways}; {half_written} left a half-written checkpoint; {len(starts)} starts got "
        f"as far as the run folder), {reached} of {TOTAL} steps by then, same bits at the end: "
        f"{time.monotonic() - begin:.0f} s",
    )

"""A signal to one of several processes stops all of them at the same step."""

from __future__ import annotations

import re

import pytest

from fastvim_jax.training import read_metrics
from tests.distributed.two import run_two
from tests.training.compare_runs import steps_of
from tests.training.tiny import STEPS_PER_EPOCH


def stop_steps(*arguments: str) -> list[int]:
    """Return the steps after which two processes stopped."""
    outputs = run_two("stops.py", *arguments)
    return [int(re.search(r"^stopped (\d+)$", output, re.MULTILINE)[1]) for output in outputs]


@pytest.mark.drawn("processes and devices", one_in=6)
def test_all_processes_stop_at_the_same_step(rng):
    at = int(rng.integers(1, 20))
    first, second = stop_steps(str(at))
    assert first == second and at < first <= at + 8


@pytest.mark.slow
@pytest.mark.drawn("runs on several devices", one_in=20)
def test_a_run_of_two_processes_stops_and_goes_on(tmp_path):
    folder = tmp_path / "run"
    first, second = stop_steps("3", str(folder))
    assert first == second and 3 < first <= 11
    assert steps_of(folder) == [first]
    assert stop_steps("0", str(folder)) == [2 * STEPS_PER_EPOCH] * 2
    assert [line["step"] for line in read_metrics(folder, "eval")] == [11, 22]
    assert [line["step"] for line in read_metrics(folder, "train")] == [*range(3, 22, 3), 22]

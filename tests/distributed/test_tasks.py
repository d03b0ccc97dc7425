"""Every task trains and evaluates in two processes as in one."""

from __future__ import annotations

import numpy as np
import pytest

from fastvim_jax.training import read_metrics
from tests.distributed.test_many_devices import finish, launch, together

TASKS = ("masked-2x2", "channels-2x2", "segmentation-4x1", "detection-4x1", "probe-2x2")


@pytest.mark.slow
@pytest.mark.drawn("tasks in two processes", one_in=5)
@pytest.mark.parametrize("name", TASKS)
def test_a_task_runs_in_two_processes_as_in_one(tmp_path, name):
    """Compare losses, sizes of gradients and counts; scores of a model that knows nothing may jump."""
    finish(launch("tasks.py", str(tmp_path / "one"), name, devices=4))
    together("tasks.py", str(tmp_path / "two"), name)
    one, two = (read_metrics(tmp_path / processes / "run") for processes in ("one", "two"))
    assert {record["kind"] for record in one} >= {"train", "eval"}
    for record, expected in zip(two, one, strict=True):
        assert record["kind"] == expected["kind"]
        compared = {"loss", "grad_norm", "param_norm", "count", "raw_loss"} & expected.keys()
        assert compared or record["kind"] == "norms"
        for key in compared:
            np.testing.assert_allclose(record[key], expected[key], rtol=1e-4, err_msg=key)


@pytest.mark.slow
@pytest.mark.drawn("tasks in two processes", one_in=5)
def test_a_process_may_be_late_for_the_first_update(tmp_path):
    """Let one process wait longer than the 30 s in which devices of CPUs must connect."""
    together("tasks.py", str(tmp_path), "channels-2x2", "35")

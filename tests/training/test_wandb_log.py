"""Weights & Biases through a stand-in for its module: what it is told, and that a resumed run is the same one."""

import sys
import types

import pytest

from fastvim_jax.errors import UserError
from fastvim_jax.training.metrics import RunLog, open_sinks
from tests.training.tiny import tiny_config


@pytest.fixture
def wandb(monkeypatch):
    module = types.SimpleNamespace(runs=[])

    class Run:
        def __init__(self, **options):
            self.options, self.logged, self.finished = options, [], False

        def log(self, scalars, step):
            self.logged.append((step, scalars))

        def finish(self):
            self.finished = True

    def init(**options):
        module.runs.append(Run(**options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def log_something(folder, start):
    sinks = open_sinks("my-project", folder, tiny_config())
    with RunLog(folder, step=start, total_steps=9, progress=False, sinks=sinks) as log:
        log.write("train", start + 1, {"epoch": 0.5, "loss": 2.0})


def test_wandb_gets_all_numbers_and_a_resumed_run_continues_its_run(wandb, tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    for start in (0, 4):
        log_something(folder, start)
    first, second = wandb.runs
    assert first.options["project"] == "my-project" and first.options["name"] == "my run"
    assert first.options["config"]["optimizer"]["learning_rate"] == 2e-3
    assert first.options["dir"] == str(folder)
    assert first.options["id"] == second.options["id"]
    assert second.options["resume"] == "allow"
    assert first.logged == [(1, {"train/epoch": 0.5, "train/loss": 2.0})]
    assert second.logged[0][0] == 5
    assert first.finished and second.finished
    other = tmp_path / "other"
    other.mkdir()
    log_something(other, 0)
    assert wandb.runs[-1].options["id"] != first.options["id"]


def test_the_extra_is_named_when_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"pip install 'fastvim-jax\[wandb\]', or leave out --wandb"
    ):
        open_sinks("my-project", tmp_path, tiny_config())


def test_nobody_is_told_without_a_project(wandb, tmp_path):
    assert open_sinks(None, tmp_path, tiny_config()) == [] and wandb.runs == []

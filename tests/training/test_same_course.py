"""All processes of a run must agree about its course: one that does not would wait for the others forever."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from fastvim_jax.distributed import processes
from fastvim_jax.errors import UserError
from fastvim_jax.training import course, loop, train
from fastvim_jax.training.evaluators import Evaluation, Evaluator
from tests.training.tiny import STEPS_PER_EPOCH, tiny_config


class Asked(Exception):
    """Stands for the end of the test."""


def test_a_process_with_another_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    first = {"values": np.asarray('{"epochs": 3, "mesh.data": null, "sizes": [1, 2]}')}
    monkeypatch.setattr(processes, "arrays_of_first_process", lambda make: first)
    processes.require_same({"epochs": 3, "mesh.data": None, "sizes": (1, 2)})
    with pytest.raises(UserError, match=r"process 2 .*\n  epochs: 3 there, 4 here\n  sizes: .*\n"):
        processes.require_same({"epochs": 4, "mesh.data": None, "sizes": (1, 3)})


def test_a_run_compares_settings_and_the_length_of_an_epoch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compare them before the first step, but not where a host keeps its data."""
    asked: dict[str, object] = {}

    def ask(values: dict[str, object]) -> None:
        asked.update(values)
        raise Asked

    monkeypatch.setattr(course, "require_same", ask)
    config = tiny_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="here"))
    with pytest.raises(Asked):
        train(config, tmp_path / "run", progress=False)
    assert asked["steps per epoch"] == STEPS_PER_EPOCH and asked["step to start from"] == 0
    assert str(asked["class names"]).startswith("10 with digest ")
    assert asked["batches of eval"] == 4  # 360 images, 100 at a time
    assert asked["epochs"] == 2 and asked["optimizer.warmup_epochs"] == 0.5
    assert "data.batch_size" in asked and "data.path" not in asked


def test_an_evaluation_compares_data_classes_and_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(course, "require_same", asked.append)
    data = dataclasses.replace(tiny_config().data, path="here")
    for names in (("ant", "bee"), ("bee", "ant")):
        course.require_same_course({"data": data}, names, weights="all", per_class=True)
    first, second = asked
    assert first["weights"] == "all" and first["per class"] is True
    assert first["data.batch_size"] == 128 and "data.path" not in first
    assert {key for key in first if first[key] != second[key]} == {"class names"}


def test_weights_are_compared_by_name_shape_and_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(course, "require_same", asked.append)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    kernel = np.arange(6.0).reshape(2, 3)
    other = kernel.copy()
    other[1, 2] = np.nextafter(other[1, 2], 9.0)
    for weights in (
        {"a": kernel},
        {"a": kernel.copy()},
        {"b": kernel},
        {"a": kernel.T},
        {"a": other},
    ):
        course.require_same_weights(weights)
    first, same, *changed = asked
    assert first == same and len({str(each) for each in asked}) == 4 and first not in changed


def test_the_first_process_says_which_evaluations_were_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Go by its log, because another host may see its last line later."""
    evaluators = [Evaluator(name, lambda state, step: Evaluation({})) for name in ("eval", "more")]
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 4}\n')
    assert loop._missed(tmp_path, 4, evaluators) == [False, True]
    assert loop._missed(tmp_path, 8, evaluators) == [True, True]
    assert loop._missed(tmp_path, 8, []) == []
    first = {"missed": np.asarray([False, False])}
    monkeypatch.setattr(loop, "arrays_of_first_process", lambda make: first)
    assert loop._missed(tmp_path, 8, evaluators) == [False, False]

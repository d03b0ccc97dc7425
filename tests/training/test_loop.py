"""The loop with a task of the test's own: a model with running statistics, metrics beside the loss, two evaluators."""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fastvim_jax.analysis.headline import Headline
from fastvim_jax.data.records import DecodeError
from fastvim_jax.distributed import make_mesh, on_mesh
from fastvim_jax.errors import UserError
from fastvim_jax.training import Stopped, loop, read_metrics
from fastvim_jax.training.checkpoints import Checkpoints
from fastvim_jax.training.clock import Clock
from fastvim_jax.training.corrupt import count_corrupt
from fastvim_jax.training.evaluators import Evaluation, Evaluator
from fastvim_jax.training.loop import begin_or_resume, run_loop
from fastvim_jax.training.runs import OpenRun, TrainCall, open_run
from fastvim_jax.training.steps import (
    Loss,
    TrainState,
    init_state,
    make_train_step,
    state_shapes,
)
from fastvim_jax.training.stopping import StopRequest
from tests.training.compare_runs import assert_same_run
from tests.training.tiny import tiny_config

CONFIG = tiny_config(epochs=3, checkpoint_every_steps=2, log_every_steps=3, accumulate=2)
STEPS = 4  # an epoch


class Centred(nnx.Module):
    """Predicts y from x less the running mean of x."""

    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.ones((3,)))
        self.mean = nnx.BatchStat(jnp.zeros((3,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.mean[...] = 0.5 * self.mean[...] + 0.5 * x.mean(0)
        return (x - self.mean[...]) @ self.kernel[...]


class Numbers:
    """Batches drawn from their index."""

    steps_per_epoch = STEPS

    def __init__(self) -> None:
        self.corrupt: set[int] = set()
        self.index = 0

    def __iter__(self) -> Numbers:
        return self

    def __next__(self) -> dict[str, Any]:
        rng = np.random.default_rng(self.index)
        self.index += 1
        x = rng.normal(size=(4, 3)).astype(np.float32)
        return {"x": x, "y": x @ np.array([1, 2, 3], np.float32)}

    def seconds_per_batch(self) -> float | None:
        return None

    def get_state(self) -> dict[str, Any]:
        return {"index": self.index}

    def set_state(self, state: Any) -> None:
        self.index = state["index"]


def run(folder, *, stop_at: int | None = None):
    """Train in `folder` as a trainer does; with `stop_at`, ask it to stop after this step."""
    graphdef, params, statistics = nnx.split(Centred(), nnx.Param, ...)
    optimizer = optax.adam(0.1)
    mesh = make_mesh()

    def begin() -> TrainState:
        return init_state(params, optimizer, model_state=statistics)

    def loss_of(params: Any, batch: Any, drawn: Any, model_state: Any) -> Loss:
        model = nnx.merge(graphdef, params, model_state)
        error = model(batch["x"]) - batch["y"] + drawn
        metrics = {"largest": jnp.abs(error).max()}
        return Loss((error**2).mean(), metrics, nnx.state(model, nnx.BatchStat))

    def draw(params: Any, key: jax.Array, batch: Any) -> jax.Array:
        return 0.1 * jax.random.normal(key, (len(batch["y"]),))

    with StopRequest() as stop, ExitStack() as opened:
        call = TrainCall(folder, False, None, None, opened, time.perf_counter(), stop)
        opened_run = open_run(call, CONFIG)
        batches, shapes = Numbers(), state_shapes(mesh, begin)
        state, records = begin_or_resume(begin, shapes, opened_run, batches)
        train_step = on_mesh(
            mesh, make_train_step(loss_of, optimizer, draw=draw, ema_decay=0.9, accumulate=2)
        )

        def step(state: TrainState, batch: Any, *, norms: bool) -> Any:
            if stop_at == batches.index:
                opened_run.stop.ask("the test")
            return train_step(state, batch, norms=norms)

        def norm(state: TrainState, at: int) -> Evaluation:
            return Evaluation({"raw_norm": float(optax.tree.norm(state.params))})

        def mean(state: TrainState, at: int) -> Evaluation:
            return Evaluation({"mean": float(jax.tree.leaves(state.model_state)[0][0])}, folder)

        return run_loop(
            state,
            step,
            batches,
            config=CONFIG,
            run=opened_run,
            records=records,
            evaluators=[Evaluator("eval", norm), Evaluator("mean", mean, every_epochs=2)],
            headline=Headline("norm", label="norm", title="Norm", percent=False),
            learning_rate=lambda step: 0.1,
            clock=Clock(4),
        )


@pytest.mark.drawn("trainings", one_in=6)
def test_a_task_of_ones_own_trains_logs_and_resumes(tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    result = run(whole)
    assert result.step == 3 * STEPS
    assert result.headline == f"raw norm {result.metrics['raw_norm']:.4f}"
    assert [r["step"] for r in read_metrics(whole, "eval")] == [4, 8, 12]
    means = read_metrics(whole, "mean")
    assert [r["step"] for r in means] == [8, 12] and means[0]["mean"] != means[1]["mean"]
    lines = read_metrics(whole, "train")
    assert lines[0]["largest"] > lines[-1]["largest"] > 0 and lines[0]["loss"] > lines[-1]["loss"]
    # The running mean of two parts a step, by hand.
    expected, batches = np.zeros(3), Numbers()
    for _ in range(3 * STEPS):
        x = next(batches)["x"]
        for part in (x[0::2], x[1::2]):
            expected = 0.5 * expected + 0.5 * part.mean(0)
    assert means[-1]["mean"] == pytest.approx(expected[0], rel=1e-5)

    with pytest.raises(Stopped, match="stopped after step 7 of 12"):
        run(halves, stop_at=7)
    assert run(halves).metrics == result.metrics
    assert_same_run(halves, whole)
    shapes = jax.eval_shape(lambda: nnx.state(Centred(), nnx.BatchStat))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )
    for folder in (whole, halves):
        with Checkpoints(folder / "checkpoints", read_only=True) as store:
            (kept,) = jax.tree.leaves(store.restore_model_state(shapes))
            np.testing.assert_allclose(kept, expected, rtol=1e-5)


@pytest.mark.drawn("trainings", one_in=6)
def test_norms_are_measured_where_they_are_due(tmp_path, monkeypatch):
    """Train as on a GPU, where the first step, the log, checkpoints and ends of epochs measure all norms."""
    said: list[str] = []
    monkeypatch.setattr(loop.RunLog, "say", lambda log, text: said.append(text))
    monkeypatch.setattr(loop, "describe_shared_memory", lambda: "Data workers hold up to 8 MiB.")
    run(tmp_path / "always")
    assert "Data workers hold up to 8 MiB." in said
    monkeypatch.undo()
    measured = []

    def due_alone(due: bool) -> bool:
        measured.append(due)
        return due

    monkeypatch.setattr(loop, "measures_norms", due_alone)
    run(tmp_path / "due")
    steps = range(1, 3 * STEPS + 1)
    assert measured == [step == 1 or step % 2 == 0 or step % 3 == 0 for step in steps]
    logs = [read_metrics(tmp_path / name) for name in ("always", "due")]
    for always, due in zip(*logs, strict=True):
        assert always.keys() | {"compile_seconds"} == due.keys() | {"compile_seconds"}
        same = ["loss", "grad_norm", "raw_norm", *(key for key in always if "/" in key)]
        same = [name for name in same if name in always]
        assert [always[name] for name in same] == pytest.approx([due[n] for n in same], rel=1e-5)
    with pytest.raises(Stopped, match="stopped after step 7 of 12"):
        run(tmp_path / "halves", stop_at=7)
    run(tmp_path / "halves")
    assert_same_run(tmp_path / "halves", tmp_path / "due")


def test_corrupt_records_of_all_processes_count(tmp_path, monkeypatch):
    """Stop at the first line of the log if the processes together met too many, though each met few enough."""
    monkeypatch.setattr("fastvim_jax.training.corrupt.all_gather_set", lambda own: {*own, 5})
    data = SimpleNamespace(max_corrupt=1)
    assert count_corrupt([5], data) == 1 and count_corrupt([3], None) == 2
    with pytest.raises(DecodeError, match="met 2 undecodable records; data.max_corrupt allows 1"):
        count_corrupt([3], data)
    with pytest.raises(DecodeError, match="met 1 undecodable records; data.max_corrupt allows 0"):
        run(tmp_path)
    assert not read_metrics(tmp_path, "train")


def test_evaluators_are_due_at_their_own_intervals():
    last, second = (Evaluator("x", lambda *_: Evaluation({}), every_epochs=n) for n in (0, 2))
    assert [s for s in range(1, 11) if last.due(s, 2, 10)] == [10]
    assert [s for s in range(1, 11) if second.due(s, 2, 10)] == [4, 8, 10]


@pytest.mark.parametrize("meta", [{}, {"data": {}}])
def test_a_position_that_cannot_be_used_is_damage(tmp_path, meta):
    """Name the damage: without its record of checksums, a checkpoint's `meta` is used unchecked."""
    state = TrainState(jnp.asarray(1, jnp.int32), {"w": jnp.ones(2)}, {"m": jnp.ones(2)}, None)
    opened = object.__new__(OpenRun)
    with Checkpoints(tmp_path) as checkpoints:
        object.__setattr__(opened, "checkpoints", checkpoints)
        checkpoints.save(state, {"window": [], **meta})
        checkpoints.wait()
        with pytest.raises(
            UserError, match="1 is damaged: its position in the data cannot be used"
        ):
            begin_or_resume(lambda: state, state, opened, Numbers())

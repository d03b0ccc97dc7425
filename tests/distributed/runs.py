"""Run as a program: whole runs of the trainer, in the folder given, on any mesh of one or several processes.

    python tests/distributed/runs.py FOLDER JOB ...

A job is NAME:DATAxFSDP to train to the end, NAME:DATAxFSDP:STEP to break off after a step; NAME=OTHER copies a run.
NAME:score evaluates a run, on all devices, into NAME/scores.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from fastvim_jax.distributed import (
    MeshConfig,
    all_gather_set,
    barrier,
    initialize_distributed,
    is_first_process,
    make_mesh,
    on_any_process,
    on_first_process,
    replicated,
    require_same,
    sharding,
    share_folder,
)
from fastvim_jax.errors import UserError
from fastvim_jax.training import TrainConfig, train
from fastvim_jax.training.classification.run_scores import score_run
from fastvim_jax.training.course import require_same_weights
from fastvim_jax.training.metrics import RunLog
from fastvim_jax.training.steps import TrainState, TrainStep
from tests.training.tiny import STEPS_PER_EPOCH, tiny_config, tiny_model

sharding.SMALLEST = 8  # So that nearly everything of a tiny model is spread.


def config(mesh: MeshConfig) -> TrainConfig:
    model = tiny_model(depth=1, dtype="float64", param_dtype="float64")
    made = tiny_config(model=model, log_every_steps=1, checkpoint_every_steps=STEPS_PER_EPOCH)
    return replace(made, mesh=mesh)


def break_off_after(last: int) -> None:
    """Let the next run end without a word after some step."""
    advance, count = RunLog.advance, iter(range(1, 1000))

    def stop(log: RunLog) -> None:
        advance(log)
        if next(count) == last:
            RunLog.advance = advance  # type: ignore[method-assign]
            raise KeyboardInterrupt

    RunLog.advance = stop  # type: ignore[method-assign]


def score(folder: Path) -> None:
    scores = score_run(folder, config(MeshConfig()).data, per_class=True).scores
    if is_first_process():
        as_lists = jax.tree.map(lambda x: x.tolist() if isinstance(x, np.ndarray) else x, scores)
        (folder / "scores.json").write_text(json.dumps(as_lists))


def agree(folder: Path) -> None:
    """Check that processes fail together, count together, and notice what they do not share."""

    def refuse() -> None:
        raise UserError("the folder is full: make room")

    try:
        on_first_process(refuse)
    except UserError as error:
        assert str(error) == "the folder is full: make room"
    else:
        raise AssertionError("only process 0 has failed")
    require_same({"epochs": 3, "milestones": [0.5]})
    try:
        require_same({"epochs": jax.process_index()})
    except UserError as error:
        assert "epochs: 0 there, " in str(error)
    else:
        assert is_first_process()
    require_same_weights({"kernel": np.ones(3)})
    try:
        require_same_weights({"kernel": np.full(3, jax.process_index())})
    except UserError as error:
        assert "weights read: " in str(error)
    else:
        assert is_first_process()
    assert share_folder(folder) and share_folder(None, sure=True)
    alone = jax.process_count() == 1
    assert share_folder(folder / str(jax.process_index()), patience=0.3) == alone
    assert not [*folder.glob("**/.shared-*")]
    for process in range(jax.process_count()):
        assert on_any_process(jax.process_index() == process)
    assert not on_any_process(False)
    assert all_gather_set({jax.process_index(), 7}) == {7, *range(jax.process_count())}
    assert all_gather_set(range(3 * jax.process_index())) == set(range(3 * jax.process_count() - 3))


class Program:
    """Stands for a compiled step, of which process 1 has another one. It runs nothing."""

    def __init__(self, does: str) -> None:
        self.does, self.lowered, self.calls = does, 0, 0

    def lower(self, *arguments: object, **keywords: object) -> Program:
        self.lowered += 1
        return self

    def as_text(self) -> str:
        here = jax.process_index()
        return f"%{here} = {self.does}\nstablehlo.custom_call @kernel({here})"

    def __call__(self, *arguments: object, **keywords: object) -> None:
        self.calls += 1


def compare_programs() -> None:
    """Check that a step is compared before it runs, once for each of its programs."""
    at = jax.jit(lambda: 0, out_shardings=replicated(make_mesh(MeshConfig())))()
    state, batch = TrainState(at, {}, (), None), {"image": np.zeros(3)}
    step = TrainStep(same := Program("stablehlo.all_reduce(a)"), seed=0)
    for _ in range(2):
        step(state, batch, norms=True)
        step(state, batch, norms=False)
    assert (same.lowered, same.calls) == (2, 4)
    step = TrainStep(other := Program(f"stablehlo.all_reduce({jax.process_index()})"), seed=0)
    try:
        step(state, batch, norms=True)
    except UserError as error:
        assert "process 1 made another training step than process 0" in str(error)
        assert other.calls == 0
    else:
        assert is_first_process()


def main(folder: str, *jobs: str) -> None:
    jax.config.update("jax_enable_x64", True)
    initialize_distributed()
    agree(Path(folder))
    if jax.process_count() > 1:
        compare_programs()
    for job in jobs:
        name, mesh, *stop = job.split(":")
        name, _, copied = name.partition("=")
        if copied and is_first_process():
            shutil.copytree(Path(folder, copied), Path(folder, name))
        barrier("copied")
        if mesh == "score":
            score(Path(folder, name))
            continue
        data, fsdp = map(int, mesh.split("x"))
        if stop:
            break_off_after(int(stop[0]))
        try:
            train(config(MeshConfig(data, fsdp)), Path(folder, name), progress=False)
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Which checkpoints are kept, and which weights a run is used by, as its log says."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastvim_jax.errors import UserError
from fastvim_jax.training import load_run, train
from fastvim_jax.training.checkpoints import _Preservation
from fastvim_jax.training.choice import best_step, better_weights
from tests.training.tiny import STEPS_PER_EPOCH, tiny_config

CONFIG = tiny_config()


@pytest.fixture
def folder(tmp_path):
    scores = {10: (0.5, 0.2), 20: (0.9, 0.3), 30: (0.6, 0.7), 40: (0.6, 0.9)}
    lines = [
        {"kind": "eval", "step": step, "raw_top1": raw, "ema_top1": ema}
        for step, (raw, ema) in scores.items()
    ]
    lines.append({"kind": "eval", "step": 50, "raw_top1": float("nan")})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_average_is_used_once_it_is_ahead(folder):
    assert [better_weights(folder, CONFIG, s) for s in (10, 20, 30)] == ["raw", "raw", "ema"]
    assert better_weights(folder, CONFIG, 35) == "ema"  # not evaluated
    assert better_weights(folder, dataclasses.replace(CONFIG, ema_decay=None), 30) == "raw"


def test_the_best_step_is_that_of_the_best_score_of_any_weights(folder):
    assert best_step(folder, CONFIG, [10, 20, 30, 40, 50]) == 40  # equal to 20: the later
    assert best_step(folder, CONFIG, [10, 20, 30]) == 20
    assert best_step(folder, CONFIG, [10, 50]) == 10
    assert best_step(folder, CONFIG, [11, 50]) is None


def test_the_latest_the_best_and_every_nth_are_kept():
    @dataclasses.dataclass
    class Info:
        step: int

    steps = [3, 6, 9, 12, 15, 18]

    def kept(*options):
        policy = _Preservation(*options)
        keep = policy.should_preserve([Info(step) for step in steps], context=None)
        return [step for step, kept in zip(steps, keep, strict=True) if kept]

    assert kept(2, None, None) == [15, 18]
    assert kept(1, 6, lambda given: given[2]) == [6, 9, 12, 18]
    assert kept(9, None, lambda given: None) == steps


@pytest.mark.drawn("commands", one_in=6)
def test_a_run_keeps_its_best_checkpoint_and_is_used_by_it(tmp_path):
    """Keep the best checkpoint beside the last: a rate that grows ruins the head, so an early one may be the best."""
    optimizer = dataclasses.replace(
        CONFIG.optimizer, learning_rate=1e-2, final_learning_rate=0.5, warmup_epochs=0.0
    )
    config = tiny_config(
        epochs=3,
        keep_best=True,
        keep_checkpoints=1,
        keep_every_steps=None,
        checkpoint_every_steps=1000,
        optimizer=optimizer,
        ema_decay=None,
    )
    run = tmp_path / "run"
    train(config, run, progress=False)
    kept = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    best = best_step(run, config, [STEPS_PER_EPOCH * n for n in (1, 2, 3)])
    last = 3 * STEPS_PER_EPOCH
    # If the last one is the best, the one that was the best until then was kept when the last was saved.
    assert {best, last} <= set(kept)
    assert len(kept) == 2
    assert load_run(run, step="best").step == best
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="was evaluated: name a step"):
        load_run(run, step="best")

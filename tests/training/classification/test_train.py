"""The trainer on the digits: what a run leaves behind, how it resumes, and when it refuses."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import make_eval_iterator
from fastvim_jax.errors import UserError
from fastvim_jax.models.parameters import named_parameters
from fastvim_jax.training import (
    CheckpointError,
    NonFiniteError,
    evaluate,
    load_run,
    read_metrics,
    run_folder,
    train,
)
from fastvim_jax.training.checkpoints import Checkpoints
from fastvim_jax.training.classification import train as trainer
from fastvim_jax.training.metrics import RunLog
from fastvim_jax.training.steps import augment_key
from tests.training.compare_runs import assert_same_run
from tests.training.tiny import EVAL_IMAGES, STEPS_PER_EPOCH, tiny_config, tiny_model

CONFIG = tiny_config()
TOTAL = 2 * STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return an uninterrupted run and what `train` returned."""
    folder = tmp_path_factory.mktemp("runs") / "finished run"
    return folder, train(CONFIG, folder, progress=False)


def test_the_run_folder_holds_everything(finished):
    folder, result = finished
    assert (result.run_dir, result.step) == (folder, TOTAL)
    assert json.loads((folder / "classes.json").read_text()) == [str(i) for i in range(10)]
    (start,) = json.loads((folder / "environment.json").read_text())["starts"]
    assert start["versions"]["jax"] == jax.__version__
    assert start["device"] == {"kind": jax.devices()[0].device_kind, "count": len(jax.devices())}
    assert {"started", "python", "git"} <= set(start)
    assert list((folder / "tensorboard").iterdir()) and (folder / "summary.png").is_file()
    assert Checkpoints(folder / "checkpoints", read_only=True).steps() == [16, 20, 22]


def test_the_log(finished):
    folder, result = finished
    lines = read_metrics(folder, "train")
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18, 21, 22]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[1]["learning_rate"] == pytest.approx(2e-3)
    assert lines[-1]["epoch"] == 2.0
    for line in lines:
        assert all(0 <= line[share] <= 1 for share in ("data_wait", "dispatch", "device_wait"))
        assert line["images_per_second"] > 0 and line["param_norm"] > line["grad_norm"] > 0
    assert "first_step_seconds" in lines[0] and "checkpoint_seconds" in lines[-2]
    assert "mfu" not in lines[0], "the peak of a CPU is not known"
    norms = read_metrics(folder, "norms")
    assert [line["step"] for line in norms] == [STEPS_PER_EPOCH, TOTAL]
    own = [value for name, value in norms[-1].items() if name.startswith("grad/")]
    assert math.hypot(*own) < 10 * lines[-1]["grad_norm"] and norms[-1]["update/head.bias"] > 0
    assert {"param/blocks.0.mixer.in_proj.kernel", "param/pos_embed"} <= norms[0].keys()
    scores = read_metrics(folder, "eval")
    assert [line["step"] for line in scores] == [STEPS_PER_EPOCH, TOTAL]
    assert scores[-1] == result.metrics and scores[-1]["count"] == EVAL_IMAGES


@pytest.mark.parametrize("weights", ["raw", "ema", None])
def test_a_loaded_run_scores_what_the_log_says(finished, weights):
    folder, result = finished
    run = load_run(folder, weights=weights)
    best = max(("ema", "raw"), key=lambda name: result.metrics[f"{name}_top1"])
    assert (run.step, run.weights) == (TOTAL, weights or best)
    # The decoder that "auto" found is stored, so that the run goes on with it elsewhere.
    data = dataclasses.replace(CONFIG.data, decoder=run.config.data.decoder)
    assert run.config == dataclasses.replace(CONFIG, data=data)
    assert run.class_names == tuple(str(i) for i in range(10))
    scores = evaluate(run.model, make_eval_iterator(CONFIG.data, batch_size=7))
    assert scores["count"] == EVAL_IMAGES
    for key in ("top1", "top5"):
        assert scores[key] == result.metrics[f"{run.weights}_{key}"]
    assert scores["loss"] == pytest.approx(result.metrics[f"{run.weights}_loss"], rel=1e-5)


def test_raw_and_average_differ_and_steps_can_be_chosen(finished):
    folder, _ = finished
    heads = [
        np.asarray(load_run(folder, weights=weights, step=step).model.head.kernel[...])
        for weights, step in (("raw", None), ("ema", None), ("raw", 20))
    ]
    for i, j in ((0, 1), (0, 2)):
        assert np.abs(heads[i] - heads[j]).max() > 1e-5


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Return a run stopped after step 7, past the checkpoint of step 4 and within a window of the log."""
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        advance, count = RunLog.advance, iter(range(1, TOTAL + 1))

        def stop(log):
            advance(log)
            if next(count) == 7:
                raise KeyboardInterrupt

        patch.setattr(RunLog, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            train(CONFIG, folder, progress=False)
    assert [line["step"] for line in read_metrics(folder)] == [3, 6]
    return folder


def test_a_resumed_run_equals_an_uninterrupted_one(finished, interrupted):
    uninterrupted, _ = finished
    train(CONFIG, interrupted, progress=False)
    assert_same_run(interrupted, uninterrupted)
    starts = json.loads((interrupted / "environment.json").read_text())["starts"]
    assert len(starts) == 2


def test_a_finished_run_is_not_trained_again(finished):
    folder, result = finished
    before = (folder / "metrics.jsonl").read_text()
    again = train(dataclasses.replace(CONFIG, keep_checkpoints=2), folder, progress=False)
    assert again.metrics == result.metrics
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.drawn("trainings", one_in=6)
@pytest.mark.parametrize("left", [None, b"", b"{\n\xff\n"])
def test_a_finished_run_without_its_log_is_evaluated_again(finished, tmp_path, caplog, left):
    folder, result = finished
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (run / "metrics.jsonl").unlink()
    if left is not None:
        (run / "metrics.jsonl").write_bytes(left)
    again = train(CONFIG, run, progress=False)
    assert again.metrics["raw_top1"] == result.metrics["raw_top1"]
    assert f"holds nothing of steps 1 to {TOTAL}" in caplog.text
    (line,) = read_metrics(run, "eval")
    assert line["step"] == TOTAL


def test_another_run_in_the_folder_is_refused_by_field(finished):
    folder, _ = finished
    other = dataclasses.replace(
        CONFIG, seed=5, optimizer=dataclasses.replace(CONFIG.optimizer, eps=1e-7)
    )
    with pytest.raises(UserError) as caught:
        train(other, folder, progress=False)
    assert "optimizer.eps: 1e-08 there, 1e-07 now" in str(caught.value)
    assert "seed: 0 there, 5 now" in str(caught.value)
    assert f"begin a new run from its weights, in another folder: --init {folder}" in str(
        caught.value
    )


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty and holds no config.json"):
        train(CONFIG, tmp_path, progress=False)
    with pytest.raises(UserError, match="is no run folder: it has no config.json"):
        load_run(tmp_path)


def test_a_wrong_number_of_classes_is_refused_before_any_file_is_written(tmp_path):
    config = tiny_config(model=tiny_model(num_classes=11))
    with pytest.raises(UserError, match="num_classes is 11.*has 10 classes.*num_classes=10"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def copied(finished, tmp_path):
    folder, _ = finished
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_truncated_checkpoint_is_refused_and_the_previous_one_works(copied):
    for item in ("params", "ema"):  # Only what is read is checked.
        files = [p for p in (copied / "checkpoints" / "22" / item).rglob("*") if p.is_file()]
        largest = max(files, key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100])
    for use in (lambda: load_run(copied), lambda: train(CONFIG, copied, progress=False)):
        with pytest.raises(CheckpointError, match="22 is damaged.*The previous one is step 20"):
            use()
    assert load_run(copied, step=20).step == 20


def test_a_checkpoint_of_another_model_is_refused(copied):
    values = json.loads((copied / "config.json").read_text())
    values["model"]["embed_dim"] = 16
    (copied / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="(?s)is of another model.*mixer.backward.A_log"):
        load_run(copied)


def test_weights_that_were_not_kept_cannot_be_asked_for(finished):
    folder, _ = finished
    with pytest.raises(UserError, match="weights='best': use 'raw' or 'ema'"):
        load_run(folder, weights="best")


@pytest.mark.parametrize("choice", ["raw", "ema"])
def test_trained_weights_in_the_place_of_the_average_are_named(
    finished, choice, monkeypatch, caplog
):
    """Say so for every command that takes them: only `predict` did."""
    folder, _ = finished
    monkeypatch.setattr(run_folder, "better_weights", lambda *_: choice)
    assert load_run(folder).weights == choice
    assert ("the trained weights of step 22 are taken" in caplog.text) == (choice == "raw")
    caplog.clear()
    assert load_run(folder, weights="raw").weights == "raw" and not caplog.text


@pytest.mark.drawn("trainings", one_in=6)
def test_a_broken_batch_stops_the_run(tmp_path, monkeypatch):
    """Stop at NaN in the images of step 6: the checkpoint of step 4 stays the last, and is named."""
    make = trainer.make_augment

    def poisoned(*args, **kwargs):
        augment = make(*args, **kwargs)

        def poison(key, batch):
            batch = augment(key, batch)
            fault = jax.random.key_data(augment_key(CONFIG.seed, jnp.asarray(5)))
            here = (jax.random.key_data(key) == fault).all()
            return {**batch, "image": jnp.where(here, jnp.nan, batch["image"])}

        return poison

    monkeypatch.setattr(trainer, "make_augment", poisoned)
    with pytest.raises(NonFiniteError) as caught:
        train(CONFIG, tmp_path / "run", progress=False)
    message = str(caught.value)
    assert caught.value.step == 6 and "stopped at step 6" in message
    assert f"step 4 in {tmp_path / 'run' / 'checkpoints' / '4'}" in message
    assert "the batch itself holds NaN or infinite pixels" in message
    run = load_run(tmp_path / "run", weights="raw")
    assert run.step == 4
    flat = named_parameters(jax.tree.map(np.asarray, trainer.nnx.split(run.model)[1]))
    assert all(np.isfinite(value).all() for value in flat.values())


@pytest.mark.drawn("trainings", one_in=6)
def test_what_decides_no_weight_may_change_when_a_run_goes_on(finished, capsys):
    folder, result = finished
    free = dataclasses.replace(
        CONFIG,
        model=tiny_model(blocks="scan", remat="block"),
        data=dataclasses.replace(CONFIG.data, max_corrupt=3, eval_batch_size=50),
        log_every_steps=7,
        checkpoint_every_steps=5,
        evaluate_every_epochs=2,
    )
    try:
        assert train(free, folder).metrics == result.metrics
        assert "the average (ema) will still hold 10% of the initial" in capsys.readouterr().err
    finally:
        train(CONFIG, folder, progress=False)  # for the tests that follow


def test_splits_of_other_classes_are_refused(tmp_path, rng):
    for folder in ("one/cat", "one/dog", "one/fish", "two/dog", "two/fish"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    data = dataclasses.replace(
        CONFIG.data,
        source="image_folder",
        path=str(tmp_path),
        train_split="one",
        eval_split="two",
        batch_size=4,
    )
    config = dataclasses.replace(CONFIG, data=data, model=tiny_model(num_classes=3))
    with pytest.raises(UserError, match=r"only in the first: cat.*data\.class_list"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()

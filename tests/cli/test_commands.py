"""Every command does what it says, on a run trained by the command itself."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.analysis import coverage, model_cost
from fastvim_jax.data import make_eval_iterator, open_source
from fastvim_jax.inference.predict import predict_batches
from fastvim_jax.models import list_models, model_config
from fastvim_jax.training import (
    RunResult,
    TrainConfig,
    evaluate,
    load_experiment,
    load_run,
    read_metrics,
)
from tests.cli.conftest import Cli
from tests.support import read_table
from tests.training.tiny import tiny_config


def test_models_lists_what_they_cost(fastvim: Cli) -> None:
    status, out, _ = fastvim("models", "fastvim_[ts]*")
    assert status == 0
    rows = [line.split() for line in out.splitlines() if line.startswith("fastvim_")]
    assert [row[0] for row in rows] == ["fastvim_tiny_patch16_224", "fastvim_small_patch16_224"]
    assert rows[0][1:] == ["7,166,056", "1.14", "14", "4"]
    status, out, _ = fastvim(
        "models", "*vim_tiny_patch16_224", "--image-size", "32", "64", "--json"
    )
    costs = json.loads(out)
    assert status == 0
    assert {"vim_tiny_patch16_224", "fastvim_tiny_patch16_224"} <= set(costs)
    assert all("vim_tiny" in name for name in costs)
    assert costs["vim_tiny_patch16_224"]["scan_steps"] == [9]
    assert costs["fastvim_tiny_patch16_224"]["scan_steps"] == [2, 4]
    expected = model_cost(model_config("vim_tiny_patch16_224"), (32, 64))
    assert costs["vim_tiny_patch16_224"]["gmacs"] == expected.gmacs


def test_models_lists_where_the_fused_kernels_run(
    fastvim: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Print what `analysis.coverage` finds; tests/analysis/test_coverage.py compares that with the models."""
    found = coverage.Coverage((32, 48, 64), {"lines are too short": (32,)})
    covered = {"fastvim_tiny_patch16_224": {"f32": found, "bf16": found}}
    monkeypatch.setattr(coverage, "preset_coverage", lambda names: covered if names else {})
    status, out, _ = fastvim("models", "fastvim_tiny*", "--gpu")
    assert status == 0
    rows = [line.split(maxsplit=5) for line in out.splitlines() if line.startswith("fastvim_")]
    reason = "lines are too short (32 px)"
    expected = [
        ["fastvim_tiny_patch16_224", kind, "2", "of", "3", reason] for kind in ("f32", "bf16")
    ]
    assert rows == expected
    status, out, _ = fastvim("models", "fastvim_tiny*", "--gpu", "--json")
    fallbacks = json.loads(out)["fastvim_tiny_patch16_224"]["f32"]["fallbacks"]
    assert status == 0 and fallbacks == {"lines are too short": [32]}
    status, _, said = fastvim("models", "--gpu", "--image-size", "32")
    assert status == 2 and "leave out --image-size" in said
    monkeypatch.setattr(coverage, "preset_coverage", lambda names: {})
    status, _, said = fastvim("models", "vit_*", "--gpu")
    assert status == 2 and "none of these models has mixers" in said


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.parametrize("name", list_models())
def test_every_model_has_a_cost(name: str) -> None:
    cost = model_cost(model_config(name))
    assert cost.parameters > 5e6 and cost.gmacs > 0.4


def test_train_wrote_its_run(run_dir: Path) -> None:
    assert [r["epoch"] for r in read_metrics(run_dir, "eval")] == [1, 2]
    config = load_run(run_dir).config
    data = dataclasses.replace(config.data, decoder="auto")  # A run keeps the decoder it found.
    config = dataclasses.replace(config, data=data, checkpoint_every_steps=4)
    assert config == tiny_config(), "a program of its own is compiled for this run"
    assert json.loads((run_dir / "classes.json").read_text()) == [str(i) for i in range(10)]


def test_train_takes_typed_overrides(
    fastvim: Cli, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check what the trainer is called with. A run of another model would be one more program to compile."""
    calls = []

    def train(config: TrainConfig, folder: Path, **options: object) -> RunResult:
        calls.append((config, folder, options["progress"]))
        return RunResult(folder, 3, {}, 0.0)

    monkeypatch.setattr("fastvim_jax.training.train", train)
    folder = tmp_path / "mine"
    status, out, err = fastvim(
        "train", experiment, "--run-dir", folder, "--no-progress", "--epochs", "1",
        "--model.embed-dim", "12", "--data.batch-size", "479", "--ema-decay", "None",
    )  # fmt: skip
    assert status == 0, err
    config = load_experiment(str(experiment))
    changed = dataclasses.replace(
        config,
        epochs=1,
        ema_decay=None,
        model=dataclasses.replace(config.model, embed_dim=12),
        data=dataclasses.replace(config.data, batch_size=479),
    )
    assert calls == [(changed, folder, False)]
    assert str(folder) in out.splitlines()[-1] and "Finished at step 3" in out


def test_training_again_goes_on_where_it_stopped(
    fastvim: Cli, experiment: Path, run_dir: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    before = read_metrics(copy)
    status, out, _ = fastvim("train", experiment, "--run-dir", copy, "--no-progress")
    assert status == 0 and "Finished at step 22" in out
    assert read_metrics(copy) == before


def test_train_help_lists_the_experiments_and_the_fields(fastvim: Cli, experiment: Path) -> None:
    status, out, _ = fastvim("train", "--help")
    assert status == 0 and "digits/fastvim_digits" in out
    status, out, _ = fastvim("train", experiment, "--help")
    assert status == 0
    flat = " ".join(out.replace("│", " ").split())
    for piece in ("A tiny FastVim on the digits", "--data.batch-size INT", "--model.pool-axes",
                  "--optimizer.learning-rate FLOAT", "(default: 0.9)", "runs/tiny digits"):  # fmt: skip
        assert piece in flat, piece


@pytest.mark.drawn("commands", one_in=6)
def test_eval_counts_every_held_out_image(fastvim: Cli, run_dir: Path) -> None:
    status, out, _ = fastvim("eval", run_dir, "--json", "--batch-size", "100")
    report = json.loads(out)
    assert status == 0 and report["step"] == 22 and report["split"] == "test"
    last = read_metrics(run_dir, "eval")[-1]
    for weights in ("raw", "ema"):
        scores = report["scores"][weights]
        assert scores["count"] == 360
        assert scores["top1"] == last[f"{weights}_top1"]
        run = load_run(run_dir, weights=weights)
        assert scores["top1"] == evaluate(run.model, make_eval_iterator(run.config.data))["top1"]
    status, out, _ = fastvim("eval", run_dir, "--weights", "raw", "--split", "train")
    assert status == 0 and "1437 images of digits train" in out
    assert re.search(r"^raw +\d+\.\d\d%", out, re.M) and not re.search("^ema", out, re.M)
    status, out, _ = fastvim("eval", run_dir, "--step", "11", "--json")
    assert status == 0 and json.loads(out)["step"] == 11


@pytest.mark.drawn("commands", one_in=6)
def test_eval_by_class(fastvim: Cli, run_dir: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new folder" / "confusion.png"
    status, out, _ = fastvim("eval", run_dir, "--per-class", "--json", "--confusion", picture)
    report = json.loads(out)
    assert status == 0
    labels = [open_source("digits", "test")[i].target for i in range(360)]
    for scores in report["scores"].values():
        assert [row["class"] for row in scores["classes"]] == list("0123456789")
        assert [row["count"] for row in scores["classes"]] == np.bincount(labels).tolist()
        right = sum(row["count"] * row["top1"] for row in scores["classes"])
        assert right / 360 == pytest.approx(scores["top1"])
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG" and min(drawn.size) > 400
    status, out, _ = fastvim("eval", run_dir, "--per-class", "--weights", "raw")
    share = report["scores"]["raw"]["classes"][3]["top1"]
    assert status == 0 and re.search(rf"^3 +{labels.count(3)} +{share:.2%}$", out, re.M)


@pytest.mark.drawn("commands", one_in=6)
def test_eval_on_other_data(fastvim: Cli, run_dir: Path, tmp_path: Path) -> None:
    """Evaluate a run on the first 60 held-out digits as files of any size: greyscale, 16 bits and with colours."""
    source = open_source("digits", "test")
    for i in range(60):
        folder = tmp_path / "held out" / str(source[i].target)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(source[i].image)
        if i % 3 == 1:
            image = image.convert("RGB")
        if i % 3 == 2:
            image = Image.fromarray(source[i].image.astype(np.uint16) * 257)
        image.save(folder / f"{i:03}.png")
    data = ("--data.source", "image_folder", "--data.path", tmp_path, "--split", "held out")
    status, out, err = fastvim("eval", run_dir, *data, "--json", "--batch-size", "7")
    assert (status, err) == (0, "")
    ours = json.loads(out)
    status, out, _ = fastvim("eval", run_dir, "--split", "test[:60]", "--json")
    assert status == 0
    for weights, expected in json.loads(out)["scores"].items():
        assert ours["scores"][weights] == pytest.approx(expected, rel=1e-5)
        assert expected["count"] == 60
    # Classes by another name may be others; another number of them cannot be right.
    (tmp_path / "held out" / "9").rename(tmp_path / "held out" / "nine")
    status, out, err = fastvim("eval", run_dir, *data)
    assert status == 0 and "class 9 is '9' in the model, but 'nine' in the data" in err
    (tmp_path / "held out" / "nine").rename(tmp_path / "held out" / "9")
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join("9123456780"))
    status, _, err = fastvim("eval", run_dir, *data, "--data.class-list", listed)
    assert status == 1 and "class 0 is '0' in the model, but '9' in the data. List the" in err
    shutil.rmtree(tmp_path / "held out" / "9")
    status, _, err = fastvim("eval", run_dir, *data)
    assert status == 1 and "The data have 9 classes, the model 10" in err


def test_eval_help_lists_the_data_of_the_run(fastvim: Cli, run_dir: Path) -> None:
    status, out, _ = fastvim("eval", run_dir, "--help")
    flat = " ".join(out.replace("│", " ").split())
    assert status == 0 and "--data.path STR" in flat and "(default: digits)" in flat
    status, out, _ = fastvim("eval", "--help")
    assert status == 0 and "--per-class" in out and "--data.path STR" not in out


@pytest.mark.drawn("commands", one_in=6)
def test_predict_computes_in_the_dtype_that_is_asked_for(run_dir, digit_files, fastvim):
    def probabilities(*options):
        call = ("predict", run_dir, *digit_files, "--json", "--top-k", "10")
        status, out, _ = fastvim(*call, *options)
        assert status == 0
        ranked = [sorted(e["predictions"], key=lambda p: p["label"]) for e in json.loads(out)]
        return np.array([[p["probability"] for p in each] for each in ranked])

    plain, wide, narrow = (
        probabilities(*options) for options in ((), ("--dtype", "float32"), ("--dtype", "bfloat16"))
    )
    np.testing.assert_array_equal(plain, wide)
    assert 0 < np.abs(narrow - wide).max() < 0.05


@pytest.mark.drawn("commands", one_in=6)
def test_predict_ranks_the_classes(
    fastvim: Cli, run_dir: Path, digit_files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = load_run(run_dir)
    assert ("the trained weights of step 22 are taken" in caplog.text) == (run.weights == "raw")
    probabilities, _ = predict_batches(run.model, make_eval_iterator(run.config.data))
    status, out, _ = fastvim("predict", run_dir, *digit_files, "--json", "--top-k", "3")
    assert status == 0
    report = json.loads(out)
    assert [entry["file"] for entry in report] == [str(file) for file in digit_files]
    for entry, expected in zip(report, probabilities, strict=False):
        found = entry["predictions"]
        assert [p["label"] for p in found] == np.argsort(-expected)[:3].tolist()
        assert [p["class"] for p in found] == [str(p["label"]) for p in found]
        np.testing.assert_allclose([p["probability"] for p in found], -np.sort(-expected)[:3], 1e-4)
    status, out, _ = fastvim("predict", run_dir, digit_files[0])
    lines = out.splitlines()
    assert status == 0 and lines[0] == str(digit_files[0]) and len(lines) == 6
    assert lines[1].split()[1] == report[0]["predictions"][0]["class"]


@pytest.mark.drawn("commands", one_in=6)
def test_predict_takes_images_of_any_kind(fastvim: Cli, run_dir: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide.jpg"
    Image.new("CMYK", (300, 40), (10, 200, 30, 0)).save(wide)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((50, 20), 40_000, np.uint16)).save(deep)
    status, out, _ = fastvim("predict", run_dir, wide, deep, "--json", "--batch-size", "1")
    assert status == 0 and len(json.loads(out)) == 2


@pytest.mark.drawn("commands", one_in=6)
def test_predict_reports_a_bad_file_and_classifies_the_others(
    fastvim: Cli, run_dir: Path, digit_files: list[Path], tmp_path: Path
) -> None:
    text = tmp_path / "notes.jpg"
    text.write_text("no image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(digit_files[2].read_bytes()[:50])
    absent = tmp_path / "absent.png"
    files = [digit_files[0], text, cut, digit_files[1], absent]
    status, out, err = fastvim("predict", run_dir, *files, "--json", "--batch-size", "2")
    assert status == 1
    report = json.loads(out)
    assert ["predictions" in entry for entry in report] == [True, False, False, True, False]
    clean = json.loads(
        fastvim("predict", run_dir, *digit_files[:2], "--json", "--batch-size", "2")[1]
    )
    for bad, good in ((report[0], clean[0]), (report[3], clean[1])):
        assert [p["label"] for p in bad["predictions"]] == [p["label"] for p in good["predictions"]]
    assert len([line for line in err.splitlines() if "by the trained weights" not in line]) == 3
    for file, reason in ((text, "not an image"), (cut, "damaged"), (absent, "No such file")):
        assert any(str(file) in line and reason in line for line in err.splitlines())
    status, out, _ = fastvim("predict", run_dir, *files)
    assert status == 1 and str(digit_files[1]) in out and "Traceback" not in out


def names_in(out: Path) -> list[str]:
    if out.suffix == ".jsonl":
        return [json.loads(line)["file"] for line in out.read_text().splitlines()]
    with out.open(newline="") as file:
        return [row[0] for row in list(csv.reader(file))[1:]]


@pytest.mark.drawn("commands", one_in=6)
def test_predict_and_embed_go_on_where_they_stopped(
    fastvim: Cli, run_dir: Path, digit_files: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    # This name is not UTF-8.
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    shutil.copy(digit_files[0], odd)
    digit_files = [odd, *digit_files[1:]]
    for command, kind in (("predict", "csv"), ("embed", "csv"), ("embed", "jsonl")):
        whole, out = tmp_path / f"{command} whole.{kind}", tmp_path / f"{command}.{kind}"
        common = [command, run_dir, "--batch-size", "4"]
        assert fastvim(*common, *digit_files, "--out", whole)[0] == 0
        assert fastvim(*common, digit_files[0], "--out", out)[0] == 0
        first = out.read_bytes()
        out.write_bytes(first[:-3])  # A crash in the middle of the last line.
        extra = ["--plot", tmp_path / "plot.png"] if command == "embed" else []
        status, printed, error = fastvim(*common, *digit_files, bad, "--out", out, *extra)
        assert status == 1 and str(bad) in error and "4 files" in printed
        again = fastvim(*common, *digit_files, "--out", out)
        assert again[0] == 0 and "3 files (3 were there)" in again[1]
        assert names_in(out) == [
            *names_in(whole),
            *([str(bad)] if kind == "jsonl" or command == "predict" else []),
        ]
        assert not extra or (tmp_path / "plot.png").exists()
    assert names_in(whole)[0] == f"{tmp_path}/\\xff.png"
    table = tmp_path / "features.parquet"
    assert fastvim("embed", run_dir, *digit_files, "--out", table)[0] == 0
    parquet, text = read_table(table), read_table(tmp_path / "embed whole.csv")
    assert parquet.column_names == ["Metadata_file", *(f"feature_{i:04}" for i in range(8))]
    assert text.column_names == parquet.column_names and text.num_rows == parquet.num_rows > 0
    assert text["Metadata_file"].to_pylist() == parquet["Metadata_file"].to_pylist()
    for name in parquet.column_names[1:]:
        np.testing.assert_allclose(text[name], parquet[name], rtol=1e-4, atol=1e-5)
    status, _, error = fastvim("embed", run_dir, *digit_files, "--out", table)
    assert status != 0 and "Parquet files cannot be added to" in error


@pytest.mark.drawn("commands", one_in=6)
def test_predict_needs_only_the_run_folder(
    fastvim: Cli, run_dir: Path, digit_files: list[Path], tmp_path: Path
) -> None:
    moved = shutil.copytree(run_dir, tmp_path / "elsewhere")
    expected = fastvim("predict", run_dir, *digit_files)
    assert fastvim("predict", moved, *digit_files) == expected


@pytest.mark.drawn("commands", one_in=6)
def test_quickstart_report_draws_the_run(fastvim: Cli, run_dir: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new folder" / "report.png"
    status, out, _ = fastvim("quickstart-report", run_dir, "--picture", picture)
    assert status == 0
    run = load_run(run_dir)
    top1 = evaluate(run.model, make_eval_iterator(run.config.data))["top1"]
    assert f"accuracy {top1:.2%}" in out and f"{round(360 * top1)} of 360" in out
    last = out.splitlines()[-1]
    assert str(picture) in last and f"eval {run_dir}`" in last
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert min(pixels.shape[:2]) > 600 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    status, _, err = fastvim("quickstart-report", run_dir, "--at-least", f"{top1 + 0.001}")
    assert status == 1 and "is below" in err

"""`fastvim bench`: every bench runs on this machine, prints a table and keeps its rows."""

from __future__ import annotations

import json
import math
import os
import threading

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from fastvim_jax.bench import record
from fastvim_jax.cli.bench import BENCHES, _no_compilation_cache
from tests.cli.conftest import Cli

CIRCUMSTANCES = {"device", "platform", "jax", "jaxlib", "flax", "commit", "date", "command"}
COSTS = {
    "trace_seconds", "compile_seconds", "temporary_bytes", "argument_bytes", "output_bytes", "peak_bytes"
}  # fmt: skip
TIMES = {
    "method", "median", "fastest", "slowest", "warm", "span", "calls", "input_sets", "kernels"
}  # fmt: skip
MODEL = {"model", "pixels", "batch", "precision", "dtype", "blocks", "images_per_s", "ms"}


def bench(fastvim, tmp_path, *arguments):
    """Run a benchmark, check its record for what every record must hold, and return its rows."""
    file = tmp_path / "rows" / "rows.json"
    status, out, err = fastvim("bench", *arguments, "--json", file)
    assert status == 0, out + err
    assert out.startswith("device: cpu")
    record = json.loads(file.read_text())
    assert record["bench"] == arguments[0] and record["complete"] is True
    assert set(record["circumstances"]) == CIRCUMSTANCES
    assert record["circumstances"]["command"].startswith(f"fastvim bench {arguments[0]} --")
    rows = [r for r in record["rows"] if "skipped" not in r]
    for row in rows:
        assert row["correct"] and row["quiet"], row
        for key in ("median", "ms", "fastest", "compile_seconds"):
            assert row.get(key, 1) > 0 and math.isfinite(row.get(key, 1))
    return rows, record, out


def test_a_bench_leaves_the_compilation_cache_alone(tmp_path):
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def entries_after(factor):
        jax.jit(lambda x: x * factor)(jnp.ones(3)).block_until_ready()
        return len(list(tmp_path.glob("*-cache")))

    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        first = entries_after(2.5)
        with _no_compilation_cache():
            during = entries_after(3.5)
        assert 0 < first == during < entries_after(4.5)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.drawn("benchmarks")
def test_scan(fastvim: Cli, tmp_path):
    plot = tmp_path / "plot.png"
    rows, record, out = bench(
        fastvim, tmp_path, "scan", "--lengths", 3, "--batches", 2, "--channels", 4, "--states", 2,
        "--dtypes", "float32", "--plot", plot,
    )  # fmt: skip
    assert [(r["implementation"], r["gradient"]) for r in rows] == [
        ("xla_associative", False), ("xla_sequential", False),
        ("xla_associative", True), ("xla_sequential", True),
    ]  # fmt: skip
    named = {"shape", "states", "dtype", "gradient", "implementation", "error", "dependent_steps"}
    for row in rows:
        assert set(row) >= named | COSTS | TIMES | {"GB_per_s", "GFLOP_per_s"}
        assert row["shape"] == [2, 3, 4] and row["fastest"] <= row["median"] <= row["slowest"]
    assert {r["implementation"] for r in record["rows"]} >= {"pallas", "mamba_ssm"}
    assert "skipped: pallas: there" in out and "Steps one after another" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.drawn("benchmarks")
def test_both_directions_of_a_scan(fastvim: Cli, tmp_path):
    file = tmp_path / "pair.json"
    code, out, _ = fastvim(
        "bench", "scan", "--pair", "--lengths", 3, "--batches", 2, "--channels", 4, "--states", 2,
        "--dtypes", "float32", "--directions", "both", "--json", file,
    )  # fmt: skip
    assert code == 0 and "at once" in out
    record = json.loads(file.read_text())
    assert record["bench"] == "pair"
    assert [(r["scans"], r["gradient"]) for r in record["rows"]] == [
        ("one by one", True), ("at once", True)
    ]  # fmt: skip
    assert all(r["correct"] and r["median"] > 0 for r in record["rows"])


@pytest.mark.drawn("benchmarks")
def test_mixer(fastvim: Cli, tmp_path):
    common = ["mixer", "--pixels", 16, "--batch", 2, "--width", 8]
    rows, *_ = bench(fastvim, tmp_path, *common, "--parts", "stages", "--directions", "forward")
    parts = [(r["model"], r["part"]) for r in rows]
    stages = ["pool", "projection", "scan", "repeat", "skip", "total"]
    assert [part for model, part in parts if model == "fastvim"] == stages
    assert [part for model, part in parts if model == "vim"] == [
        "projection",
        "scan",
        "skip",
        "total",
    ]
    (row,), *_ = bench(
        fastvim, tmp_path, *common, "--parts", "core", "--directions", "both", "--dtypes", "bfloat16"
    )  # fmt: skip
    assert row["part"] == "core" and row["gradient"] and row["checked_images"] is None
    assert 0 < row["gradient_error"] < 0.02 and 0 < row["parameters_gradient_error"] < 0.02
    for measured in [*rows, row]:
        assert set(measured) >= {"pixels", "batch", "width", "dtype", "error"} | COSTS | TIMES


@pytest.mark.drawn("benchmarks")
def test_model(fastvim: Cli, tmp_path):
    rows, *_ = bench(
        fastvim, tmp_path, "model", "--models", "fastvim_tiny_patch16_224", "vit_tiny_patch16_224",
        "--pixels", 32, "--depth", 1, "--batches", 1,
    )  # fmt: skip
    assert [r["model"].split("_")[0] for r in rows] == ["fastvim", "vit"]
    for row in rows:
        assert set(row) >= MODEL | {"error", "TFLOP_per_s"} | COSTS | TIMES
        assert row["precision"] == "bf16" and 1e-5 < row["error"] < 0.03
        assert row["images_per_s"] == pytest.approx(1e3 / row["ms"])


@pytest.mark.drawn("benchmarks")
def test_train(fastvim: Cli, tmp_path):
    sizes = ("--pixels", 32, "--depth", 1)
    (row,), *_ = bench(fastvim, tmp_path, "train", *sizes, "--remat", "dots")
    assert set(row) >= MODEL | COSTS | {"first_loss", "loss_error", "gradient_error"}
    assert row["remat"] == "dots"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "--channels", 0], "--channels must be positive, got 0."),
        (["scan", "--lengths", 7, -1], "--lengths must be positive, got 7 -1."),
        (["scan", "--batches", 2], "without --lengths, the bench does not use --batches."),
        (["scan", "--pair", "--plot", "x.png"], "--pair does not use --plot."),
        (["scan", "--pair", "--channels", 8], "--pair without --lengths does not use --channels."),
        (["scan", "--tune", "--dtypes", "float32"], "--tune does not use --dtypes."),
        (["scan", "--pair", "--tune"], "choose one of --pair and --tune."),
        (["scan", "--tuned-file", "x.json"], "--tuned-file is for --tune."),
        (["scan", "--plot", "x.xyz"], "must end in one of .png"),
        (["scan", "--dtypes"], "--dtypes needs at least one value."),
        (["mixer", "--batch", 0], "--batch must be positive"),
        (["mixer", "--pixels", 30], "--pixels must be multiples of 16"),
        (["model", "--batches", 0], "--batches must be positive"),
        (["train", "--largest-batch", "--compile-only"], "choose one of --largest-batch and"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_measured(
    fastvim: Cli, arguments, message
):
    status, out, err = fastvim("bench", *arguments)
    assert status == 2 and message in err and "device:" not in out


@pytest.mark.parametrize("place", ["folder", "file/rows.json"])
def test_a_file_that_cannot_be_written_is_named_before_anything_is_measured(
    fastvim: Cli, tmp_path, place
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    common = ["--lengths", 3, "--batches", 1, "--channels", 2, "--states", 1]
    status, out, err = fastvim("bench", "scan", *common, "--json", tmp_path / place)
    assert status == 1 and "cannot be written" in err and "device:" not in out


def test_a_record_outlives_a_run_that_measures_nothing(tmp_path, monkeypatch):
    """Keep the earlier record, and keep a link a link. A path that is not a regular file is written directly."""
    kept, link = tmp_path / "kept.json", tmp_path / "link.json"
    kept.write_text("old")
    link.symlink_to(kept)

    def failing():
        raise RuntimeError("too large")
        yield

    with pytest.raises(RuntimeError, match="too large"):
        record.show("scan", failing(), (), command="c", file=link)
    assert kept.read_text() == "old" and {p.name for p in tmp_path.iterdir()} == {
        "kept.json",
        "link.json",
    }
    record.show("scan", iter([{"median": 1.0}]), (), command="c", file=link)
    assert link.is_symlink() and json.loads(kept.read_text())["rows"] == [{"median": 1.0}]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=pipe.read_text)
    reader.start()
    record.show("scan", iter([]), (), command="c", file=pipe)
    reader.join(timeout=60)
    assert pipe.is_fifo()


def test_nothing_measured_is_no_success(fastvim: Cli):
    common = ["--lengths", 3, "--batches", 1, "--channels", 2, "--states", 1]
    status, out, err = fastvim("bench", "scan", *common, "--implementations", "mamba_ssm")
    assert status == 1 and "skipped" in out and "none of these measurements can run here" in err


@pytest.mark.parametrize("name", BENCHES)
def test_help(fastvim: Cli, name):
    status, out, _ = fastvim("bench", name, "--help")
    assert status == 0 and f"fastvim bench {name}" in out and "(default: None)" not in out
    assert name in fastvim("bench", "--help")[1]


def test_wrong_usage(fastvim: Cli):
    for arguments, message in (
        (["sacn"], "Did you mean 'scan'?"),
        (["scan", "--lengths", 3, 4, "--batches", 1], "1 batches for 2 lengths"),
        (["scan", "--lengths", 0], "must be positive"),
        (["model", "--models", "fastvim_tinny"], "unknown model 'fastvim_tinny'"),
        (["train", "--largest-batch", "--compile-only"], "choose one"),
        (["model", "--precisions", "f16"], "f16"),
    ):
        status, out, err = fastvim("bench", *arguments)
        assert status == 2 and message in out + err, (arguments, out, err)
    assert fastvim("bench")[0] == 2


def test_a_wrong_or_failed_row_shows_and_counts(capsys, tmp_path):
    columns = (("name", 4, lambda r: r["name"]), ("ms", 4, lambda r: f"{r['ms']:.1f}"))
    good, wrong = {"name": "a", "ms": 1.0}, {"name": "b", "ms": 2.0, "correct": False}
    failed = {"name": "c", "failed": "ValueError: no"}
    skipped = {"name": "d", "size": 8, "skipped": "not here"}
    rows = record.show("x", iter([good, wrong, failed, skipped]), columns, command="c")
    out = capsys.readouterr().out.splitlines()
    assert out[1:] == [
        "name  ms", "a     1.0", "b     2.0  WRONG RESULT", "failed: c: ValueError: no",
        "skipped: d, size 8: not here",
    ]  # fmt: skip
    assert record.sound([good, skipped])
    assert not record.sound([wrong]) and not record.sound(rows[2:3])

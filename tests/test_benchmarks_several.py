"""The programs that time steps on several GPUs: workers in turn, failures, and the table of the record."""

from __future__ import annotations

import importlib
import json
import os
import time

import pytest
from flax import nnx

from fastvim_jax.models import build_model
from fastvim_jax.models.parameters import count_parameters
from tests.support import ROOT
from tests.training.tiny import tiny_model

WORKER = """
import json, sys
row = json.loads(sys.argv[2])
if row["model"] == "dies":
    sys.exit(1)
def answer(**values):
    print(json.dumps(values), flush=True)
answer(ready={
    "peak_bytes": 1, "circumstances": {"device": "test"}, "remat": "none", "state_bytes_in_use": row["held"],
    "peak_bytes_in_use": [2e9],
})
for line in sys.stdin:
    if line.strip() == "time":
        if row["model"] == "ends":
            sys.exit(1)
        answer(time={"ms": [row["speed"], row["speed"] + 1, row["speed"] + 2], "queued_ms": 0.5})
    else:
        answer(profile={"overlap": {"GPU": {"computing": 9.0, "only_collectives": 0.25, "idle": 0.75}}})
"""


@pytest.fixture
def programs(monkeypatch):
    """Import a program of benchmarks/ as its scripts do, from their own folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_programs_are_timed_in_rounds_and_failures_stop_only_their_own(
    programs, monkeypatch, tmp_path, capsys
):
    several, scaling = programs("several_gpus"), programs("scaling")
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(several, "__file__", str(tmp_path / "worker.py"))
    kind = {"batch": 128, "blocks": "unroll", "gpus": "0"}
    plan = [
        {"model": "fastvim_small_x", "mesh": "one", "speed": 10.0, "held": 400e6, **kind},
        {"model": "fastvim_small_x", "mesh": "data 2", "speed": 11.0, "held": 404e6, **kind},
        {"model": "dies", "mesh": "one", **kind},
        {"model": "ends", "mesh": "one", "held": 1.0, **kind},
        {"model": "fastvim_small_x", "mesh": "one", "speed": 12.0, "held": 1.0, "after": 0, **kind},
        {"model": "waits", "mesh": "one", "after": 2, **kind},
    ]
    monkeypatch.setitem(several.PLANS, "test", plan)
    several.Bench("test", tmp_path / "out" / "record.json", 30).run()
    rows = json.loads((tmp_path / "out" / "record.json").read_text())["rows"]
    assert [row.get("failed") for row in rows[2:4]] == [
        "ended before it was ready",
        "ended during time",
    ]
    assert "ms" not in rows[5]
    assert [len(row.get("times_ms", ())) for row in rows] == [3, 3, 0, 0, 1, 0]
    assert rows[0]["ms"] == 11.0 and len(rows[0]["together_ms"]) == len(rows[4]["together_ms"]) == 1
    assert "ready" in capsys.readouterr().out
    table = scaling.several_table(rows).splitlines()
    assert len(table) == 4
    assert "| one | 11.00 | 11,636 | – | 9.00 | 0.25 | 0.75 | – | 400 | 2.0 |" in table[2]
    assert (
        "| data 2 | 12.00 | 10,667 | **0.917** | 9.00 | 0.25 | 0.75 | – | 404 (1.01) |" in table[3]
    )


NVIDIA_SMI = """#!/usr/bin/env bash
echo "0, 1950, 690.5"; echo "1, 1900, [N/A]"; echo "1, 1910, 671.0"; echo "0, 1960, 700.5"; exec sleep 60
"""


def test_clocks_are_means_of_each_gpu(programs, monkeypatch, tmp_path):
    """Leave out what the driver does not know."""
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    clocks = programs("clocks").Clocks()
    end = time.monotonic() + 20
    while len(clocks._seen) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    clocks.end()
    assert not clocks._listener.is_alive()
    assert clocks.since(0.0) == {
        "0": {"mhz": 1955, "watts": 696}, "1": {"mhz": 1910, "watts": 671},
    }  # fmt: skip
    assert clocks.since(time.monotonic()) == {}
    seen = [{"0": {"mhz": 1000}, "1": {"mhz": 900}}, {"0": {"mhz": 2100}, "1": {"mhz": 950}}]
    clock = programs("scaling")._clocks
    assert clock({"gpus": "0,1", "times_clocks": seen}) == "1,550, 925"
    assert clock({"gpus": "1", "times_clocks": seen}) == "925"
    assert clock({"gpus": "0", "times_clocks": [*seen, {}]}) == clock({}) == "–"


def test_the_page_shows_the_records(programs):
    scaling = programs("scaling")
    page = scaling.PAGE.read_text()
    assert scaling.updated(page) == page
    timed = [row["mesh"] for row in scaling.several_rows("scaling") if "ms" in row]
    assert timed.count("one") == 2
    with pytest.raises(ValueError, match="begin two"):
        scaling.updated(page.replace("begin two", "begin"))


def test_a_table_lists_one_gpu_before_several(programs):
    row = {
        "batch": 128, "blocks": "scan", "remat": "none", "peak_bytes_in_use": [1e9],
        "images_per_s_of_a_device": 1.0, "state_bytes_in_use": 1e6,
    }  # fmt: skip
    rows = [
        row | {"model": "fastvim_base_x", "mesh": "fsdp 2", "ms": 2.0},
        row | {"model": "fastvim_small_x", "mesh": "one", "ms": 3.0},
        row | {"model": "fastvim_base_x", "mesh": "one", "ms": 1.0, "batch": 64},
        row | {"model": "fastvim_base_x", "mesh": "one", "ms": 1.0},
    ]
    lines = programs("scaling").several_table(rows).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [(c[0][:9], c[1], c[2], c[5]) for c in cells] == [
        ("FastVim-B", "128", "one", "–"),
        ("FastVim-B", "128", "fsdp 2", "**0.500**"),
        ("FastVim-S", "128", "one", "–"),
        ("FastVim-B", "64", "one", "–"),
    ]


TRAINS = """
import json, os, pathlib, signal, sys, time
arguments = sys.argv[1:]
assert arguments[arguments.index("--data.workers") + 1] == "40"
assert set(os.environ["CUDA_VISIBLE_DEVICES"].split(",")) <= {"0", "1", "2"}
folder = pathlib.Path(os.environ["RUN"])
folder.mkdir(parents=True, exist_ok=True)
count, process = (int(arguments[arguments.index(f"--{name}") + 1]) for name in ("processes", "process"))
here = pathlib.Path(os.environ["PID_FILE"])
here.write_text(str(os.getpid()))
def note(*_):
    (folder / "stop").touch()
signal.signal(15, note)
def others():
    for i in range(count):
        file = here.with_name(here.name.rpartition("_")[0] + f"_{i}.pid")
        yield file.is_file() and pathlib.Path(f"/proc/{file.read_text() or 0}").exists()
while not all(others()):
    time.sleep(0.01)
log = folder / "metrics.jsonl"
lost = folder / "lost"
# Where a signal is to come, training does not end before it, however slow the machine is.
held = {"moved": count != 2, "killed": not lost.exists()}.get(folder.name, False)
while True:
    steps = log.read_text().splitlines() if log.exists() else []
    step = 8 * (len(steps) + 1)
    if step > 256:
        sys.exit(0)
    if not all(others()):
        print("lost another process of this run")
        lost.touch()
        sys.exit(75)
    if (folder / "stop").exists():
        time.sleep(0.2)
        (folder / "stop").unlink(missing_ok=True)
        sys.exit(75)
    if process == 0 and not (held and step > 240):
        with log.open("a") as file:
            print(json.dumps({"kind": "train", "step": step, "loss": 1 / step}), file=file)
    time.sleep(0.03)
"""


def test_stopped_and_killed_runs_go_on_with_other_numbers_of_processes(
    programs, monkeypatch, tmp_path
):
    elastic = programs("elastic")
    monkeypatch.setattr(elastic, "WRAPPER", TRAINS.replace("{", "{{").replace("}", "}}"))
    monkeypatch.setattr(
        "sys.argv", ["elastic", "--out", str(tmp_path), "--processes", "3", "1", "2"]
    )
    monkeypatch.setenv("FASTVIM_DATA_DIR", "/data")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert elastic.main() == 0
    record = json.loads((tmp_path / "elastic.json").read_text())
    assert [s["statuses"] for s in record["runs"]["moved"]] == [[75] * 3, [75], [0, 0]]
    first, second = record["runs"]["killed"]
    assert first["to"] == 1 and first["statuses"][0] == first["statuses"][2] == 75
    assert "lost another process" in first["said"][0][-1]
    assert second["statuses"] == [0, 0, 0]
    for compared in record["against_whole"].values():
        assert compared["lines"] == compared["equal"] == 32


def test_a_checkpoint_is_timed_with_all_its_bytes(programs, tmp_path):
    """Random numbers are not compressed away: weights, two moments and average take 4 bytes each."""
    checkpoint = programs("checkpoint")
    model = build_model(tiny_model(embed_dim=128), rngs=0)
    row = checkpoint.measure(checkpoint.state_of(model), tmp_path, saves=1)
    numbers = count_parameters(nnx.state(model))
    assert 14 * numbers < row["bytes"] < 18 * numbers
    assert 0 < row["held_ms"] <= row["written_ms"] and not list(tmp_path.iterdir())

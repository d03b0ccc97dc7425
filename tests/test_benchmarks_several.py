"""The programs that time steps on several GPUs: workers in turn, failures, and the table of the record."""

from __future__ import annotations

import importlib
import json

import pytest

from tests.support import ROOT

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
    assert "| one | 11.00 | 11,636 | – | 9.00 | 0.25 | 0.75 | 400 | 2.0 |" in table[2]
    assert "| data 2 | 12.00 | 10,667 | **0.917** | 9.00 | 0.25 | 0.75 | 404 (1.01) |" in table[3]

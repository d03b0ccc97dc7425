"""The benchmark runs, checks what it times, and counts steps."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest

from pallas_kernels.selective_scan import arg_specs, bench
from pallas_kernels.selective_scan.arg_specs import ScanSpec


def test_command_writes_a_row_per_implementation(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.SHAPES, "small", (ScanSpec(1, 3, 2, states=2),))
    file = tmp_path / "rows.json"
    bench.main(["--shapes", "small", "--repeats", "2", "--seconds", "0.001", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(r["implementation"], r["gradient"]) for r in rows] == [
        ("xla_associative", False), ("xla_sequential", False),
        ("xla_associative", True), ("xla_sequential", True),
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["fastest"] <= row["median"] <= row["slowest"]
        assert row["error"] < 5e-5
    assert "xla_sequential" in capsys.readouterr().out


def test_worst_error_sees_one_wrong_entry():
    right = {"a": jnp.arange(4.0), "b": jnp.ones(3)}
    wrong = right | {"b": right["b"].at[1].add(1e-3)}
    assert bench.worst_error(right, right) == 0
    assert bench.worst_error(wrong, right) == pytest.approx(1e-3, rel=1e-3)


def test_steps():
    long = ScanSpec(1, 1024, 4)
    assert bench.dependent_steps("xla_sequential", long) == 1024
    assert bench.dependent_steps("xla_associative", long) == 19
    short, *_ = arg_specs.TARGETS
    assert bench.dependent_steps("xla_associative", short) == 7

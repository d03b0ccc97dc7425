"""The scan's benchmark: what it measures, what it counts, and that it would see a wrong result."""

from __future__ import annotations

import jax
import pytest

from pallas_kernels import gpu, timing
from pallas_kernels.selective_scan import arg_specs, bench
from pallas_kernels.selective_scan.arg_specs import ScanSpec

TINY = ScanSpec(1, 3, 2, states=2, D=False)


def test_what_cannot_run_is_skipped_once(monkeypatch):
    monkeypatch.setattr(bench.mamba_ssm, "missing", lambda: "it is not installed")
    monkeypatch.setattr(gpu, "kernels_missing", lambda: "there is no GPU")
    cases = bench.cases([TINY, TINY], implementations=("pallas", "xla_sequential", "mamba_ssm"))
    assert [name for name, _ in cases[:2]] == [
        {"implementation": "pallas"}, {"implementation": "mamba_ssm"}
    ]  # fmt: skip
    skipped = list(timing.run(cases[:2]))
    assert [r["skipped"] for r in skipped] == ["there is no GPU", "it is not installed"]
    # bfloat16 is for kernels
    assert {n["dtype"] for n, _ in cases[2:]} == {"float32"} and len(cases) == 2 + 2 * 2


@pytest.mark.drawn("more of the kernels", one_in=6)
def test_a_wrong_result_is_seen(monkeypatch):
    def wrong(*args, implementation, **options):
        y = right(*args, implementation=implementation, **options)
        return y if implementation == "reference" else y * 1.001

    right = bench.selective_scan
    monkeypatch.setattr(bench, "selective_scan", wrong)
    bench._expected.cache_clear()
    cases = bench.cases([TINY], implementations=("xla_sequential",), dtypes=("float32",))
    rows = list(timing.run(cases))
    assert [r["correct"] for r in rows] == [False, False], rows
    assert rows[0]["error"] == pytest.approx(1e-3, rel=1e-2)


def test_work_and_floors(monkeypatch):
    monkeypatch.setattr(timing, "ceilings", lambda: timing.Ceilings(3e12, 3.7e12, 59e12))
    spec = ScanSpec(128, 196, 384)
    row = bench.rates(spec, "float32", False, 0.1)
    elements = 128 * 196 * 384
    assert row["GB_per_s"] == pytest.approx(3 * 4 * elements / 1e-4 / 1e9)
    assert row["floor_memory_ms"] == pytest.approx(0.0385, rel=0.01)
    assert row["floor_exponentials_ms"] == pytest.approx(0.0417, rel=0.01)
    assert bench.rates(spec, "bfloat16", False, 0.1)["GB_per_s"] == row["GB_per_s"] / 2


def test_steps():
    long = ScanSpec(1, 1024, 4)
    assert bench.dependent_steps("xla_sequential", long) == 1024
    assert bench.dependent_steps("xla_associative", long) == 19
    short, *_ = arg_specs.TARGETS
    assert bench.dependent_steps("xla_associative", short) == 7
    assert bench.dependent_steps("mamba_ssm", long) is None


@pytest.mark.skipif(jax.__version_info__ < gpu.OLDEST_JAX, reason="the kernels need a newer JAX")
def test_steps_of_the_kernels():
    *_, long = arg_specs.TARGETS
    assert bench.dependent_steps("pallas", arg_specs.TARGETS[0]) == 14
    assert bench.dependent_steps("pallas", long) < long.length / 2  # its time is split


def test_sequences_are_about_equally_much_work():
    tokens = [
        s.batch * s.length for s in (arg_specs.of_length(n, 28672, 384) for n in arg_specs.LENGTHS)
    ]
    assert max(tokens) <= 1.5 * min(tokens)

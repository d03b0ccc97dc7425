"""Tuned blocks: what is tried, what is kept, and that the kernels take it."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from pallas_kernels import gpu, timing
from pallas_kernels.selective_scan import bench, tune, tuned
from pallas_kernels.selective_scan.arg_specs import TARGETS, ScanSpec
from pallas_kernels.selective_scan.tuned import Blocks
from pallas_kernels.selective_scan.types import ScanInputs
from tests.pallas_kernels.mosaic_support import abstract_h100, needs_mosaic

pytestmark = needs_mosaic
LONG = TARGETS[-1]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("spec", [*TARGETS, ScanSpec(2, 7, 64)])
def test_candidates_begin_with_the_rule(spec, gradient):
    found = tune.candidates(spec, gradient)
    assert found[0] == tune.rule(spec, gradient) and len(found) == len(set(found)) >= 2
    for blocks in found:
        assert spec.channels % blocks.channels == 0 or blocks.channels == 32
        assert (
            blocks.splits == 1
            or 2 * blocks.splits * blocks.chunk <= spec.length
            or blocks == found[0]
        )


def test_forced_blocks_are_taken_and_given_back():
    before = tune.rule(LONG, True)
    with tuned.forced(Blocks(8, 64, 5)):
        assert taken(False) == taken(True) == Blocks(8, 64, 5)
        assert tune.rule(LONG, True) == before
    assert taken(True) == before


def taken(gradient):
    cut = bench.kernel_plan(LONG, gradient)
    return Blocks(cut.chunk, cut.channels, cut.splits)


def rows(*entries):
    return [
        {"shape": [LONG.batch, LONG.length, LONG.channels], "states": LONG.states, "gradient": True,
         **dict(zip(("chunk", "channels", "splits", "median", "rule", "correct"), e, strict=True))}
        for e in entries
    ]  # fmt: skip


def test_what_is_kept_is_found_on_that_device_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned._table.cache_clear()
    file = tuned.file_of("NVIDIA H100 80GB HBM3")
    assert file.name == "nvidia_h100_80gb_hbm3.json"
    faster = rows(
        (8, 64, 16, 1.0, True, True), (16, 32, 8, 0.8, False, True), (8, 32, 4, 0.5, False, False)
    )
    assert tune.keep(faster, file, "c") == ["b2_l16384_e384_n16_gradient"]
    monkeypatch.setattr(gpu, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    assert taken(True) == Blocks(16, 32, 8) != tune.rule(LONG, True)
    assert taken(False) == tune.rule(LONG, False)
    monkeypatch.setattr(gpu, "device_kind", lambda: "NVIDIA H200")
    assert taken(True) == tune.rule(LONG, True)
    # Noise is not kept, and takes an older entry away.
    assert (
        tune.keep(rows((8, 64, 16, 1.0, True, True), (16, 32, 8, 0.98, False, True)), file, "c")
        == []
    )
    assert json.loads(file.read_text())["blocks"] == {}
    tuned._table.cache_clear()


def test_both_directions_never_take_blocks_of_one(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "_table", lambda kind: pytest.fail("looked up"))
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, "float32")  # noqa: E731
    steps, coefficients = shape(4, 14, 32), shape(4, 14, 1, 8)
    pair = ScanInputs(steps, steps, shape(2, 32, 8), coefficients, coefficients, None, None, None)
    assert tuned.find(pair, True) is None


def test_the_device_traced_for_counts():
    with abstract_h100():
        assert gpu.device_kind() == "NVIDIA H100 80GB HBM3"
    assert gpu.device_kind() == jax.local_devices()[0].device_kind


def test_what_is_committed_can_be_read():
    files = list(tuned.FOLDER.glob("*.json"))
    if not files:
        pytest.skip("no blocks are committed")
    for file in files:
        record = json.loads(file.read_text())
        assert file == tuned.file_of(record["circumstances"]["device"])
        for name, blocks in record["blocks"].items():
            assert name.startswith("b") and set(Blocks._fields) <= set(blocks)


def test_without_kernels_there_is_nothing_to_tune(monkeypatch):
    monkeypatch.setattr(gpu, "kernels_missing", lambda: "there is no GPU")
    with pytest.raises(NotImplementedError, match="nothing to tune: there is no GPU"):
        tune.cases([LONG])


@pytest.mark.drawn("more of the kernels", one_in=6)
def test_the_tuner_measures_every_candidate(monkeypatch):
    """Measure every candidate, with the sequential scan in place of the kernels."""
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    spec = ScanSpec(1, 9, 4, states=2, D=False)
    monkeypatch.setattr(tune, "candidates", lambda *_: [tune.rule(spec, False), Blocks(8, 32, 1)])
    seen = []

    def checked(spec, dtype, gradient, implementation):
        seen.append((implementation, tuned._forced[-1]))
        return right(spec, dtype, gradient, "xla_sequential")

    right = bench.checked
    monkeypatch.setattr(bench, "checked", checked)
    found = list(timing.run(tune.cases([spec], [False])))
    assert seen == [("pallas", b) for b in tune.candidates()], [
        r.get("failed", r.get("skipped")) for r in found
    ]
    assert [r["rule"] for r in found] == [True, False] and all(r["correct"] for r in found), found
    assert np.isfinite([r["median"] for r in found]).all()

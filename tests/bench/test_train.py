"""The benchmark of training steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from fastvim_jax.bench import train as benchmark
from fastvim_jax.bench.overlap import gaps, overlap
from fastvim_jax.errors import UserError
from pallas_kernels import timing
from tests.support import ROOT

SMALL = {"patch_size": 4, "embed_dim": 8, "num_classes": 3, "blocks": "scan"}
SETTING = ("fastvim_tiny_patch16_224", 8, 4, "bf16")


def rows(cases):
    return list(timing.run(cases))


@pytest.mark.drawn("benchmarks")
def test_the_scanned_program_does_not_grow_with_depth():
    shallow, deep = (
        rows(benchmark.compile_cases([SETTING], **SMALL, depth=depth))[0] for depth in (4, 8)
    )
    assert shallow["trace_seconds"] > 0 and shallow["compile_seconds"] > 0
    assert deep["lines"] < 1.1 * shallow["lines"]


@pytest.mark.drawn("benchmarks")
def test_steps_are_timed_and_their_gradients_compared_with_float32(monkeypatch):
    compared = []

    def note(moment, gradient, **how):
        compared.append((moment, gradient))
        return error(moment, gradient, **how)

    error = timing.relative_error
    monkeypatch.setattr(timing, "relative_error", note)
    (row,) = rows(benchmark.step_cases([SETTING], **SMALL, depth=1))
    assert row["correct"] and 0 < row["gradient_error"] < 0.1, row
    assert row["images_per_s"] == pytest.approx(4 / row["ms"] * 1e3)
    assert 0 < row["last_loss"] < 2 and 0 <= row["loss_error"] < 1e-2
    ((gradient, expected),) = compared
    wrong = jax.tree.map(lambda x: 1.2 * x, gradient)
    assert error(wrong, expected, together=True) > benchmark.GRADIENT_TOLERANCES["bf16"]
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 1e-3


@pytest.mark.drawn("benchmarks")
def test_the_recipes_step_is_compared_with_the_same_draws():
    (row,) = rows(benchmark.step_cases([(*SETTING[:3], "f32")], recipe=True, **SMALL, depth=2))
    assert row["recipe"] and row["correct"], str(row)
    assert row["gradient_error"] < 1e-4 and row["last_loss"] > 0


@pytest.mark.drawn("benchmarks")
@pytest.mark.slow
def test_masked_pretraining_is_compared_with_the_same_masks():
    setting = ("mae_fastvim_base_patch16_224", 8, 4, "f32")
    small = {name: value for name, value in SMALL.items() if name != "num_classes"}
    narrow = {"decoder_dim": 8, "decoder_depth": 1}
    (row,) = rows(benchmark.step_cases([setting], **small, **narrow, depth=1))
    assert row["correct"], row
    assert row["gradient_error"] < 1e-4 and row["last_loss"] > 0


def test_masked_pretraining_has_no_recipe():
    with pytest.raises(UserError, match="--recipe is classification's"):
        benchmark.step_cases([("mae_vit_base_patch16_224", 8, 4, "f32")], recipe=True)


@pytest.mark.parametrize(("low", "high", "most"), [(16, 512, 300), (1, 8, 1), (2, 8, 1), (4, 8, 9)])
def test_bisection(low, high, most):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= most

    benchmark.bisect(fits, low, high)
    fitting = [batch for batch in tried if batch <= most]
    expected = {300: 288, 1: 1, 9: 8}[most] if low <= most else None
    assert (max(fitting) if fitting else None) == expected
    assert len(tried) == len(set(tried)) <= 8


@pytest.mark.drawn("more of the models", one_in=6)
def test_the_largest_batch_is_the_first_that_fits(monkeypatch):
    settings = [(*SETTING[:2], batch, "f32") for batch in (64, 2)]

    class Device:
        platform = jax.default_backend()

        def memory_stats(self):
            return {"bytes_limit": 10**6}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    (row,) = rows(benchmark.largest_batch_cases(settings, **SMALL, depth=1))
    assert row["largest_batch_of"] == [64, 2]
    assert row["largest_batch"] == 2, row
    assert [t["batch"] for t in row["tried"]] == [64, 2]
    assert row["tried"][0]["peak_bytes"] > 10**6 > row["tried"][1]["peak_bytes"]


def test_a_batch_whose_allocation_fails_is_too_large_and_the_search_goes_on(monkeypatch):
    """Programs count 10 bytes an image, but only 5 images get memory; arrays of a try are freed before the next."""
    live = []

    class Program(timing.Program):
        def __init__(self, config, batch, recipe):
            self.batch = batch
            live.append(sum(not array.is_deleted() for array in drawn))

        def costs(self):
            return {"peak_bytes": 10 * self.batch}

        def __call__(self, state, inputs):
            if self.batch > 5:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nof 10 bytes")
            return state + 1, {"loss": jnp.float32(self.batch)}

    drawn = []

    def draw(*_):
        drawn.append(jnp.zeros(3))
        return drawn[-1]

    monkeypatch.setattr(benchmark, "step_program", Program)
    monkeypatch.setattr(benchmark, "_state", draw)
    monkeypatch.setattr(benchmark, "make_batch", draw)
    settings = [(*SETTING[:2], batch, "f32") for batch in (2, 8)]
    (row,) = rows(benchmark.largest_batch_cases(settings, **SMALL, depth=1))
    assert row.get("largest_batch") == row.get("loss") == 5 and row["correct"], str(row)
    tried = {t["batch"]: (t["fits"], t.get("refused")) for t in row["tried"]}
    refused = (False, "RESOURCE_EXHAUSTED: Out of memory")
    assert tried == {2: (True, None), 8: refused, 5: (True, None), 6: refused}
    assert len(drawn) == 8 and live == [0, 0, 0, 0]

    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel failed")

    monkeypatch.setattr(Program, "__call__", broken)
    (row,) = rows(benchmark.largest_batch_cases(settings, **SMALL, depth=1))
    assert "INTERNAL" in row["failed"]


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(UserError, match="mesh.data=64"):
        benchmark.step_cases([SETTING], data=64)


@pytest.mark.drawn("benchmarks")
@pytest.mark.slow
def test_several_devices_compute_the_gradient_of_one():
    """Compare steps on two devices with one.

    A row states the batch of a device; with fsdp each device holds half of the split state.
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    code = f"""
import json
from fastvim_jax.bench import train
from fastvim_jax.distributed import sharding
from pallas_kernels import timing
from tests.support import ROOT
sharding.SMALLEST = 8
rows = []
for mesh in ({{}}, {{"data": 2}}, {{"fsdp": 2}}):
    cases = train.step_cases([{SETTING!r}], **{SMALL!r}, depth=1, **mesh)
    rows += timing.run(cases)
for row in rows:
    row["devices"] = row["images_per_s"] / row["images_per_s_of_a_device"]
print(json.dumps([[row[name] for name in ("correct", "devices", "state_bytes")] for row in rows]))
"""
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    one, data, fsdp = json.loads(done.stdout.splitlines()[-1])
    assert [row[0] for row in (one, data, fsdp)] == [True, True, True]
    assert [row[1] for row in (one, data, fsdp)] == pytest.approx([1, 2, 2])
    assert one[2] == data[2] and 0.5 * one[2] <= fsdp[2] < 0.7 * one[2]


def test_what_waits_is_told_from_what_computes():
    """Separate waiting from computing in two steps of one GPU.

    It computes from 0 to 4 and from 6 to 8, reduces from 3 to 5, and does nothing from 5 to 6.
    """
    events = [
        ("gemm", 0.0, 3e6),
        ("add", 2e6, 2e6),
        ("ncclDevKernel_AllReduce", 3e6, 2e6),
        ("gemm", 6e6, 2e6),
    ]
    assert overlap({"/device:GPU:0": events}, 2) == {
        "/device:GPU:0": {
            "span": 4.0, "computing": 3.0, "only_collectives": 0.5, "idle": 0.5, "collectives": 1.0,
            "collective_calls": 0.5,
        }
    }  # fmt: skip


def test_gaps_are_named_by_the_kernels_around_them():
    """Find one gap per step of a millisecond, half of it under a collective; 4 µs between kernels do not count."""
    step = [
        ("gemm", 0.0, 3e6),
        ("ncclDevKernel_AllReduce", 2e6, 1.5e6),
        ("add", 4e6, 1e6),
        ("norm", 5.004e6, 1e6),
    ]
    events = [(name, start + at, length) for at in (0.0, 6.004e6) for name, start, length in step]
    found = gaps(events, 2)
    assert found == [
        {"after": "gemm", "before": "add", "ms": 1.0, "count": 1.0, "collective_ms": 0.5}
    ]

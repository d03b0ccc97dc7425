"""Timing: what is made of the profiler's events, the order of measurements, and errors."""

from __future__ import annotations

import fcntl
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import timing


def test_events_are_summed_by_call():
    events = [("b", 30.0, 4e6), ("a", 10.0, 1e6), ("b", 20.0, 2e6), ("a", 25.0, 3e6)]
    time = timing.profiled_time(events, calls=2)
    assert (time.fastest, time.median, time.slowest) == (3, 5, 7)
    assert time.kernels == {"b": 3, "a": 2}
    assert time.span == pytest.approx((30 + 4e6 - 10) / 2e6)


def test_events_that_do_not_divide_by_calls_give_their_mean():
    time = timing.profiled_time([("a", 0.0, 1e6), ("a", 1.0, 1e6), ("b", 2.0, 4e6)], calls=2)
    assert time.fastest == time.median == time.slowest == 3


def test_an_empty_profile_is_an_error():
    with pytest.raises(RuntimeError, match="nothing"):
        timing.profiled_time([], calls=2)


def test_relative_error_sees_one_wrong_entry():
    right = {"a": jnp.arange(4.0), "b": jnp.ones(4)}
    wrong = right | {"b": right["b"].at[1].add(1e-3)}
    assert timing.relative_error(right, right) == 0
    assert timing.relative_error(wrong, right) == pytest.approx(1e-3 / 2, rel=1e-2)
    together = timing.relative_error(wrong, right, together=True)
    assert together == pytest.approx(1e-3 / math.sqrt(18), rel=1e-2)
    assert math.isnan(timing.relative_error(right | {"a": jnp.full(4, jnp.nan)}, right))


def test_a_program_repeated_n_times_depends_on_n():
    measured = timing.Measured(lambda x: x * 2, lambda seed: (jnp.full(3, seed + 1.0),))
    assert measured.result().tolist() == [2, 2, 2]
    assert float(measured.loop(measured.inputs()[0], jnp.int32(5))) == 10
    time = measured.time(seconds=1e-3, repeats=3)
    assert time.method == "loop" and 0 < time.fastest <= time.median <= time.slowest
    costs = measured.program.costs()
    assert costs["argument_bytes"] == 12 and costs["peak_bytes"] >= 24


def test_a_steady_clock_leaves_out_the_first_calls(monkeypatch):
    """Leave out the first calls of a program that is slow at first.

    A GPU's program is, until its kernels are launched as a graph.
    """
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def step(i):
        calls.append(i)
        now[0] += 1e-3 if len(calls) <= 30 else 0.25e-3

    median, fastest, slowest, timed = timing.steady_clock(step, seconds=0.02, repeats=3)
    assert (median, fastest, slowest) == pytest.approx((0.25, 0.25, 0.25))
    assert timed == 3 * 20
    estimate, warm_up = 2 + 2, 2 * 20
    assert len(calls) == estimate + warm_up + timed


def test_programs_that_wait_to_be_timed_hold_no_arrays():
    """Hold no arrays while programs wait: those of many programs would fill the device's memory."""
    before = {id(x) for x in jax.live_arrays()}
    measured = timing.Measured(lambda x: x * 2, lambda seed: (jnp.full(1000, seed + 1.0),))
    assert not [x for x in jax.live_arrays() if id(x) not in before and x.size == 1000]
    measured.time(seconds=1e-3, repeats=3)
    assert not [x for x in jax.live_arrays() if id(x) not in before and x.size == 1000]


def case(log, name, error=None):
    log.append(f"compile {name}")
    if error is not None:
        raise error
    yield None
    log.append(f"time {name}")
    yield {"median": 1.0}


def named(log, **errors):
    return [({"name": n}, case(log, n, errors.get(n))) for n in "abc"]


def test_each_program_is_timed_after_it_compiled(monkeypatch):
    monkeypatch.delenv("FASTVIM_BENCH_LOCK", raising=False)
    log = []
    rows = list(timing.run(named(log, b=ValueError("too\nlong"), c=NotImplementedError("no GPU"))))
    assert log == ["compile a", "time a", "compile b", "compile c"]
    assert rows == [
        {"name": "a", "median": 1.0, "quiet": True},
        {"name": "b", "failed": "ValueError: too"},
        {"name": "c", "skipped": "no GPU"},
    ]


def test_with_a_lock_all_compile_before_any_is_timed(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVIM_BENCH_LOCK", str(tmp_path / "lock"))
    log = []
    rows = list(timing.run(named(log, b=ValueError("x"))))
    assert log == ["compile a", "compile b", "compile c", "time a", "time c"]
    assert [r.get("quiet") for r in rows] == [True, None, True]


def test_who_waits_too_long_says_that_others_were_compiling(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVIM_BENCH_LOCK", str(tmp_path / "lock"))
    monkeypatch.setattr(timing, "PATIENCE", 0.0)
    with open(tmp_path / "lock.compiling", "w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        rows = list(timing.run(named([])))
    assert [r["quiet"] for r in rows] == [False] * 3


def test_circumstances_name_the_commit_of_a_copy(monkeypatch):
    monkeypatch.setenv("FASTVIM_COMMIT", "abc")
    found = timing.circumstances("some command")
    assert found["commit"] == "abc" and found["command"] == "some command"
    assert set(found) == {
        "device", "platform", "jax", "jaxlib", "flax", "commit", "date", "command"
    }  # fmt: skip


def test_circumstances_name_a_gpus_xla_flags(monkeypatch):
    """A CPU's flags are no setting of XLA's compiler: tests emulate devices by them."""
    monkeypatch.setenv("XLA_FLAGS", " --some_flag=1")
    assert "xla_flags" not in timing.circumstances("some command")
    client = SimpleNamespace(platform_version="cuda 1")
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", client=client)
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert timing.circumstances("some command")["xla_flags"] == "--some_flag=1"


def test_cold_and_warm_calls_share_a_trace(monkeypatch):
    """Time cold and warm calls in one trace, as on a GPU. Here a stand-in plays the profiler."""
    asked = []

    def played(step, calls):
        for i in range(calls):
            step(i)
        return [("kernel", 10.0 * i, 4e6 if i < calls // 2 else 1e6) for i in range(calls)]

    monkeypatch.setattr(timing, "_profile", played)
    monkeypatch.setattr(timing, "COLD_BYTES", 30)  # three sets of 12 bytes
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    measured = timing.Measured(lambda x: x + 1, lambda seed: (jnp.full(3, float(seed)),))
    monkeypatch.setattr(
        timing.Program, "__call__", lambda self, x: asked.append(int(x[0])) or self.compiled(x)
    )
    time = measured.time(calls=4)
    assert asked[-8:] == [0, 1, 2, 0, 0, 0, 0, 0]
    assert (time.method, time.median, time.warm, time.input_sets) == ("profiler", 4, 1, 3)

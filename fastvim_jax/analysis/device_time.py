"""Device time of a compiled program, from the profiler, over inputs that no cache holds.

Every call runs on another set of inputs; the sets together are larger than any cache.
"""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib

COLD_BYTES = 256e6


@dataclasses.dataclass(frozen=True)
class DeviceTime:
    """Times in milliseconds a call: kernels' durations summed, over the calls; memory in bytes."""

    median: float
    fastest: float
    slowest: float
    span: float  # first kernel's start to last one's end, divided by the calls: with the gaps between kernels
    warm: float  # the same inputs at every call
    calls: int
    input_sets: int
    compile_seconds: float
    temporary_bytes: int
    argument_bytes: int
    output_bytes: int
    kernels: dict[str, float]  # milliseconds a call by name, the longest first


def measure(
    function: Callable[..., Any],
    make_arguments: Callable[[int], tuple],
    *,
    calls: int = 20,
    max_sets: int = 12,
    kernels: int = 12,
) -> tuple[DeviceTime, Any]:
    """Time `function(*make_arguments(seed))`, jitted; also return its result for seed 0.

    Raises:
        RuntimeError: there is no GPU whose kernels the profiler could see.
    """
    if jax.default_backend() != "gpu":
        raise RuntimeError("device time is read from the profiler of a GPU; there is none")
    shapes = jax.eval_shape(lambda: make_arguments(0))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    count = int(min(max_sets, max(2, -(-COLD_BYTES // size))))
    sets = [make_arguments(seed) for seed in range(count)]
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*sets[0]).compile()
    compile_seconds = time.perf_counter() - start
    result = jax.block_until_ready(compiled(*sets[0]))
    jax.block_until_ready(compiled(*sets[1]))
    events = _profile(lambda: [compiled(*sets[i % count]) for i in range(calls)][-1])
    warm = _profile(lambda: [compiled(*sets[0]) for _ in range(calls)][-1])
    per_call = len(events) // calls
    if len(events) % calls:  # memory copies may overlap or be counted apart: sum over all
        totals = [sum(e[2] for e in events) / calls]
    else:
        events.sort(key=lambda e: e[1])
        totals = [
            sum(e[2] for e in events[i * per_call : (i + 1) * per_call]) for i in range(calls)
        ]
    by_name: dict[str, float] = collections.defaultdict(float)
    for name, _, duration in events:
        by_name[name] += duration / calls / 1e6
    longest = dict(sorted(by_name.items(), key=lambda item: -item[1])[:kernels])
    memory: Any = compiled.memory_analysis()
    span = max(e[1] + e[2] for e in events) - min(e[1] for e in events)
    return DeviceTime(
        median=statistics.median(totals) / 1e6,
        fastest=min(totals) / 1e6,
        slowest=max(totals) / 1e6,
        span=span / calls / 1e6,
        warm=sum(e[2] for e in warm) / calls / 1e6,
        calls=calls,
        input_sets=count,
        compile_seconds=compile_seconds,
        temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        kernels={name: round(value, 5) for name, value in longest.items()},
    ), result


def _profile(run: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """(name, start, duration) in nanoseconds of everything on the GPU's streams."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        return [
            (event.name, event.start_ns, event.duration_ns)
            for plane in data.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]


def wall_time(
    step: Callable[[int], Any], *, warm_up: int = 2, steps: int = 10, repeats: int = 5
) -> tuple[float, float, float]:
    """Median, fastest and slowest seconds a step, of `repeats` runs of `steps` queued steps.

    Processes with the same file in $FASTVIM_BENCH_LOCK time one after another: they may compile side by side.
    """
    times = []
    with open(os.environ.get("FASTVIM_BENCH_LOCK", os.devnull), "w") as lock:
        if "FASTVIM_BENCH_LOCK" in os.environ:
            fcntl.flock(lock, fcntl.LOCK_EX)
        for i in range(warm_up):
            jax.block_until_ready(step(i))
        for _ in range(repeats):
            start = time.perf_counter()
            for i in range(steps):
                last = step(i)
            jax.block_until_ready(last)
            times.append((time.perf_counter() - start) / steps)
    return statistics.median(times), min(times), max(times)


def surroundings(command: str) -> dict[str, str]:
    """What a recorded number must say beside itself: device, versions, commit, date and command."""
    device = jax.devices()[0]
    commit = os.environ.get("FASTVIM_COMMIT", "")  # for a copy of the tree without its history
    if not commit and shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    return {
        "device": device.device_kind,
        "platform": device.client.platform_version.strip(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "commit": commit.strip() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
    }

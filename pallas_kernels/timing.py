"""Measure compiled programs: time, memory, compile time, and the circumstances that a record must name.

On a GPU, a call's time is the sum of its kernels' durations, from the profiler. No cache holds the inputs: every call
reads another set of inputs, and all sets together are larger than any cache. On other devices, one compiled program
repeats the call, each repetition waits for the one before, and the clock measures the whole program.

A measurement is a generator that compiles, yields, times, and yields its row; `run` drives several of them. Programs
that share a machine name the same file in $FASTVIM_BENCH_LOCK. Each program first compiles everything, at the same time
as the others. Then, when nobody compiles, the programs are timed one after the other.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

COLD_BYTES = 256e6  # bytes that calls read before the same inputs are read again
MOST_SETS = 64  # sets of inputs; calls that read less than 4 MB would need more, and find some inputs in the cache
LONG = 20.0  # milliseconds; a longer call is timed by the clock alone, because its launches do not matter
PATIENCE = float(os.environ.get("FASTVIM_BENCH_PATIENCE", "300"))
"""Seconds after which a timing no longer waits for others to finish compiling."""
_started = time.monotonic()

Row = dict[str, Any]
Case = Iterator[Row | None]


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Peak rates of a device: bytes, float32 exponentials and float32 operations per second."""

    bandwidth: float
    exponentials: float
    float32: float


CEILINGS = {
    # 132 processors of 16 exponentials and 128 fused multiply-adds per clock, at 1.755 GHz
    "NVIDIA H100 80GB HBM3": Ceilings(3.0e12, 132 * 16 * 1.755e9, 132 * 256 * 1.755e9)
}


def ceilings() -> Ceilings | None:
    """Return the peak rates of the local device, or None if they are not known."""
    return CEILINGS.get(jax.devices()[0].device_kind)


@dataclasses.dataclass(frozen=True)
class Time:
    """Hold times in milliseconds per call.

    Attributes:
        method: "profiler", "loop" (see the module) or "clock" (around queued calls).
        median, fastest, slowest: over calls, or over programs of many calls.
        warm: median with the same inputs at every call; None if inputs are not rotated.
        span: time from the first kernel's start to the last kernel's end, gaps included, divided by the calls.
        calls, input_sets: number of calls, and of sets of inputs.
        kernels: milliseconds per call by the kernel's name, the longest first.
    """

    method: str
    median: float
    fastest: float
    slowest: float
    warm: float | None = None
    span: float | None = None
    calls: int = 1
    input_sets: int = 1
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)


class Program:
    """Compile a function for the given arguments (arrays or their shapes), and record the time of it.

    `hasty` turns off XLA's autotuning on the device, for programs whose speed does not matter. A function that is
    jitted already keeps its own options, beside `compiler_options`. `keywords` go to every call, `static` ones, which
    choose the program, to the compiler alone. With `pool` (threads), the function is lowered here and compiled there:
    who reads `compiled` waits for it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        donate: Sequence[int] = (),
        hasty: bool = False,
        keywords: Mapping[str, Any] = {},
        static: Mapping[str, Any] = {},
        compiler_options: Mapping[str, Any] | None = None,
        pool: Executor | None = None,
    ):
        start = time.perf_counter()
        jitted: Any = function
        if not hasattr(function, "lower"):
            jitted = jax.jit(function, donate_argnums=tuple(donate))
        lowered = jitted.lower(*arguments, **keywords, **static)
        self.keywords = keywords
        self.trace_seconds = time.perf_counter() - start
        self.lowered = lowered
        quick = {"xla_gpu_autotune_level": 0} if hasty else {}

        def compile_now() -> tuple[Any, float]:
            start = time.perf_counter()
            compiled = lowered.compile({**quick, **(compiler_options or {})} or None)
            return compiled, time.perf_counter() - start

        if pool is not None:
            self._compiled = pool.submit(compile_now)
        else:
            self._compiled = Future()
            self._compiled.set_result(compile_now())

    @property
    def compiled(self) -> Any:
        """The compiled program."""
        return self._compiled.result()[0]

    @property
    def compile_seconds(self) -> float:
        """Seconds that compiling took."""
        return self._compiled.result()[1]

    def __call__(self, *arguments: Any) -> Any:
        return self.compiled(*arguments, **self.keywords)

    def costs(self) -> Row:
        """Return the seconds of tracing and compiling, and the bytes of arguments, results, temporaries and peak."""
        memory: Any = self.compiled.memory_analysis()
        sizes = {
            name: int(getattr(memory, f"{key}_size_in_bytes", 0) or 0)
            for name, key in (("temporary_bytes", "temp"), ("argument_bytes", "argument"),
                              ("output_bytes", "output"), ("alias_bytes", "alias"))
        }  # fmt: skip
        aliased = sizes.pop("alias_bytes")
        return {
            "trace_seconds": self.trace_seconds,
            "compile_seconds": self.compile_seconds,
            **sizes,
            "peak_bytes": sum(sizes.values()) - aliased,
        }


class Measured:
    """Compile `function(*make_arguments(seed))`, and run it once unless that needs over `large` bytes.

    The object holds no arrays, because many measurements wait for their turn at the same time. With `pool`, the
    function is compiled in its threads and not run. If `shapes` (those of the arguments) are given, `make_arguments` is
    not called here, so that it may run other programs.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        make_arguments: Callable[[int], tuple],
        *,
        large: float = 2e9,
        shapes: tuple | None = None,
        compiler_options: Mapping[str, Any] | None = None,
        pool: Executor | None = None,
    ):
        if shapes is None:
            shapes = jax.eval_shape(lambda: make_arguments(0))
        self.make_arguments = make_arguments
        self.profiled = jax.default_backend() == "gpu"
        how: dict[str, Any] = {"compiler_options": compiler_options, "pool": pool}
        self.program = Program(function, *shapes, **how)
        self.loop = (
            None if self.profiled else Program(repeated(function), shapes, jnp.int32(1), **how)
        )
        if pool is None and self.program.costs()["peak_bytes"] < large:
            self.result()

    @property
    def count(self) -> int:
        """Number of sets of arguments that calls take in turn."""
        if not self.profiled:
            return 1
        # A set that is larger than all caches is never cached. XLA's count leaves out arguments that are not read.
        read = max(1, self.program.costs()["argument_bytes"])
        return min(MOST_SETS, -int(-COLD_BYTES // read))

    def result(self) -> Any:
        """Compute the result for the arguments of seed 0."""
        return jax.block_until_ready(self.program(*self.make_arguments(0)))

    def inputs(self) -> list[tuple]:
        """Return the sets of arguments that calls take in turn."""
        return [self.make_arguments(seed) for seed in range(max(1, self.count))]

    def time(self, *, calls: int = 20, seconds: float = 0.2, repeats: int = 5) -> Time:
        """Time at least `calls` calls, and each set of inputs at least once.

        `seconds` and `repeats` are for times by the clock: seconds of a run, and number of runs.
        """
        sets = self.inputs()
        if self.loop is not None:
            return _loop_time(self.loop, sets[0], seconds, repeats)
        run = lambda i: self.program(*sets[i % len(sets)])  # noqa: E731
        once = min(clock(run, warm_up=1, steps=1, repeats=2))
        if once > LONG:
            calls = max(1, min(calls, int(1e3 * seconds / once)))
            median, fastest, slowest = clock(run, warm_up=0, steps=calls, repeats=3)
            return Time("clock", median, fastest, slowest, None, None, 3 * calls, len(sets))
        if len(sets) == 1:
            return profile(run, calls)
        calls = max(calls, len(sets))
        # Rotated and warm calls are in one trace, because starting and ending a trace takes longer than the calls.
        events = _profile(lambda i: run(i if i < calls else 0), 2 * calls)
        time, warm = (
            profiled_time(half, calls)
            for half in (events[: len(events) // 2], events[len(events) // 2 :])
        )
        return dataclasses.replace(time, warm=warm.median, input_sets=len(sets))


def repeated(function: Callable[..., Any]) -> Callable[[tuple, jax.Array], jax.Array]:
    """Build a program that calls the function n times. Each call waits for the result of the call before."""

    def program(arguments, n):
        def body(_, total):
            waiting, total = lax.optimization_barrier((arguments, total))
            results = lax.optimization_barrier(jax.tree.leaves(function(*waiting)))
            return total + sum(x.ravel()[0].astype(jnp.float32) for x in results)

        return lax.fori_loop(0, n, body, jnp.float32(0))

    return program


def _loop_time(loop: Program, arguments: tuple, seconds: float, repeats: int) -> Time:
    def elapsed(count):
        n = jnp.int32(count)
        start = time.perf_counter()
        jax.block_until_ready(loop(arguments, n))
        return time.perf_counter() - start

    count = 1
    while (took := elapsed(count)) < seconds / 4 and count < 10**6:
        count *= 4
    count = max(1, round(count * seconds / took))
    times = [1e3 * elapsed(count) / count for _ in range(repeats)]
    return Time("loop", statistics.median(times), min(times), max(times), calls=count * repeats)


def clock(
    step: Callable[[int], Any], *, warm_up: int = 2, steps: int = 10, repeats: int = 5
) -> tuple[float, float, float]:
    """Return median, fastest and slowest milliseconds per step, of `repeats` runs of `steps` queued steps."""
    times = []
    for i in range(warm_up):
        jax.block_until_ready(step(i))
    for _ in range(repeats):
        start = time.perf_counter()
        for i in range(steps):
            last = step(i)
        jax.block_until_ready(last)
        times.append(1e3 * (time.perf_counter() - start) / steps)
    return statistics.median(times), min(times), max(times)


def steady_clock(
    step: Callable[[int], Any], *, seconds: float = 0.2, repeats: int = 5
) -> tuple[float, float, float, int]:
    """Time runs of about `seconds` each, after a long warm-up; return the times of `clock`, and the number of steps.

    The warm-up matters, because XLA launches a GPU's kernels as a graph only after tens of calls. For small kernels
    this takes half the time or less.
    """
    estimate, _, _ = clock(step, warm_up=2, steps=2, repeats=1)
    steps = max(3, min(200, round(1e3 * seconds / estimate)))
    clock(step, warm_up=0, steps=steps, repeats=2)
    return *clock(step, warm_up=0, steps=steps, repeats=repeats), repeats * steps


Event = tuple[str, float, float]  # name, start and duration in nanoseconds


def profile(step: Callable[[int], Any], calls: int = 10) -> Time:
    """Measure the device time of queued steps."""
    return profiled_time(_profile(step, calls), calls)


def _profile(step: Callable[[int], Any], calls: int) -> list[Event]:
    """List everything that runs on all GPUs' streams during the steps, in order of time."""
    events = device_events(step, calls).values()
    return sorted((event for each in events for event in each), key=lambda e: e[1])


def device_events(step: Callable[[int], Any], calls: int) -> dict[str, list[Event]]:
    """List everything that runs on each GPU's streams during the steps, by the GPU's name, in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(calls):
                # Drop the previous result, so that not all results have to fit into memory.
                last = step(i)
            jax.block_until_ready(last)
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        return {
            plane.name: sorted(
                (
                    (event.name, event.start_ns, event.duration_ns)
                    for line in plane.lines
                    if line.name.startswith("Stream")
                    for event in line.events
                ),
                key=lambda e: e[1],
            )
            for plane in data.planes
            if plane.name.startswith("/device:GPU")
        }


def profiled_time(events: list[Event], calls: int, kernels: int = 12) -> Time:
    """Compute the times of `calls` equal calls from their events."""
    if not events:
        raise RuntimeError("the profiler saw nothing on the device")
    events = sorted(events, key=lambda e: e[1])
    each = len(events) // calls
    if len(events) % calls:  # some copies are events of their own, so only the mean is known
        totals = [sum(e[2] for e in events) / calls]
    else:
        totals = [sum(e[2] for e in events[i * each : (i + 1) * each]) for i in range(calls)]
    by_name: dict[str, float] = collections.defaultdict(float)
    for name, _, duration in events:
        by_name[name] += duration / calls / 1e6
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:kernels]
    span = max(e[1] + e[2] for e in events) - events[0][1]
    return Time(
        method="profiler",
        median=statistics.median(totals) / 1e6,
        fastest=min(totals) / 1e6,
        slowest=max(totals) / 1e6,
        span=span / calls / 1e6,
        calls=calls,
        kernels={name: round(value, 5) for name, value in longest},
    )


def relative_error(actual: Any, expected: Any, *, together: bool = False) -> float:
    """Return the largest ‖actual - expected‖ / ‖expected‖ of all arrays. With `together`, join them to one vector.

    The result is NaN if an entry is not finite.
    """

    def squares(a, b):
        a, b = a.astype(jnp.float32).ravel(), b.astype(jnp.float32).ravel()
        return jnp.sum((a - b) ** 2), jnp.sum(b**2)

    @jax.jit
    def error(actual, expected):
        pairs = [
            squares(a, b)
            for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
        ]
        if together:
            pairs = [tuple(map(sum, zip(*pairs, strict=True)))]
        return jnp.max(jnp.stack([jnp.sqrt(d / jnp.maximum(n, 1e-35)) for d, n in pairs]))

    return float(error(actual, expected))


def skipped(reason: str) -> Case:
    """Return a measurement that gives a row with the reason why it cannot be made here."""
    raise NotImplementedError(reason)
    yield


def run(cases: Sequence[tuple[Row, Case]]) -> Iterator[Row]:
    """Yield one row per measurement. `cases` pairs what names a measurement with its generator.

    A measurement that fails or cannot run here gives a row that says why.
    """
    shared = "FASTVIM_BENCH_LOCK" in os.environ
    alive = [True] * len(cases)
    failures: dict[int, Row] = {}

    def advance(i: int) -> Row | None:
        try:
            return next(cases[i][1])
        except NotImplementedError as error:  # does not run here
            failures[i] = {**cases[i][0], "skipped": str(error)}
        except Exception as error:
            message = f"{type(error).__name__}: {error}".split("\n")[0]
            failures[i] = {**cases[i][0], "failed": message[:300]}
        alive[i] = False
        return None

    if shared:
        with _compiling():
            for i in range(len(cases)):
                advance(i)
    with _timing() if shared else contextlib.nullcontext(True) as quiet:
        for i, (name, case) in enumerate(cases):
            if not shared:
                advance(i)
            row = advance(i) if alive[i] else None
            yield failures[i] if row is None else {**name, **row, "quiet": quiet}
            close = getattr(case, "close", None)
            if close:
                close()


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    with open(os.environ["FASTVIM_BENCH_LOCK"] + ".compiling", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def _timing() -> Iterator[bool]:
    """Wait until it is this program's turn to be timed. Yield whether no other program is compiling."""
    name = os.environ["FASTVIM_BENCH_LOCK"]
    with open(f"{name}.timing", "w") as turn, open(f"{name}.compiling", "w") as others:
        fcntl.flock(turn, fcntl.LOCK_EX)
        quiet = False
        while not quiet:
            try:
                fcntl.flock(others, fcntl.LOCK_EX | fcntl.LOCK_NB)
                quiet = True
            except BlockingIOError:
                if time.monotonic() - _started > PATIENCE:
                    break
                time.sleep(0.1)
        yield quiet


def circumstances(command: str) -> dict[str, str]:
    """Return what a record says beside its numbers: device, versions, commit, date, command, and a GPU's XLA flags."""
    device = jax.devices()[0]
    processor = f"{platform.machine()}, {os.cpu_count()} cores"
    flags = os.environ.get("XLA_FLAGS", "").strip() if device.platform == "gpu" else ""
    return {
        "device": device.device_kind if device.platform != "cpu" else f"cpu ({processor})",
        "platform": device.client.platform_version.strip(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "commit": os.environ.get("FASTVIM_COMMIT") or _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        **({"xla_flags": flags} if flags else {}),
    }


def _commit() -> str:
    """Return the commit of the checkout that holds this file, marked if there are changes; "unknown" outside of one."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    here = [git, "-C", str(Path(__file__).parent)]
    found = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*here, "status", "--porcelain", "-uno"], capture_output=True, text=True
    )
    mark = " with changes" if changed.stdout.strip() else ""
    return found.stdout.strip() + mark if found.returncode == 0 else "unknown"

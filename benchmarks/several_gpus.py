"""Time training steps on one and on several GPUs of one host: `python benchmarks/several_gpus.py four --out FILE`.

Every program is a process of its own (`Worker`). All compile at the same time, and write what they need. Then they are
timed in turn, several rounds long, while all others wait: a GPU whose clock falls, or another program of the machine,
then slows all programs alike. Profiles of the steps on several GPUs follow. The record is written after every result.

`--small` takes models of one block, to try the script on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clocks import Clocks

S, B, H = (
    f"fastvim_{size}_patch{patch}_224"
    for size, patch in (("small", 16), ("base", 16), ("huge", 14))
)
ROUNDS = 3
SECONDS, REPEATS = 0.4, 5
"""Length of a timed run of steps, and number of runs in a round."""
STEPS_OF_A_PROFILE = 5


def _row(model: str, mesh: str = "one", *, gpus: str = "", **more: Any) -> dict[str, Any]:
    """Return a program: its model, its mesh ("one", "data 4", "fsdp 2"), its visible GPUs, and more settings."""
    kind, _, number = mesh.partition(" ")
    sizes = (
        {"data": int(number), "fsdp": 1}
        if kind == "data"
        else {"data": 1, "fsdp": int(number or 1)}
    )
    row = {
        "model": model,
        "batch": 128,
        "blocks": "unroll",
        "mesh": mesh,
        **(sizes if number else {}),
    }
    return {
        **row,
        "gpus": gpus or ("0" if not number else ",".join(map(str, range(int(number))))),
        **more,
    }


PLANS: dict[str, list[dict[str, Any]]] = {
    "two": [
        *(_row(S), _row(S, "data 2"), _row(S, "fsdp 2")),
        *(_row(B), _row(B, "data 2"), _row(B, "fsdp 2")),
        _row(S, gpus="1", after=0),
        _row(B, gpus="1", after=3),
    ],
    "four": [
        _row(S),
        _row(S, "data 4"),
        _row(S, "fsdp 4"),
        _row(B),
        _row(B, "data 4"),
        _row(B, "fsdp 4"),
        *(_row(S, gpus=gpu, after=0) for gpu in "123"),
    ],
    "huge": [
        _row(H, batch=256, blocks="scan", remat="block", limit_bytes=80e9),
        _row(H, "fsdp 4", batch=256, blocks="scan", remat="block", limit_bytes=80e9),
        _row(H, gpus="1", batch=64, blocks="scan", limit_bytes=80e9),
        _row(H, "fsdp 4", batch=64, blocks="scan", limit_bytes=80e9),
    ],
}
"""Programs by the plan's name, the most important first. `after`: begin when the program of this number has compiled,
and find its result in the compilation cache; such programs are then timed all at once, too."""


class Worker:
    """A process with one program. Its answers come back in `answers`, one dictionary for each command.

    Args:
        row: the program.
        number: its place in the plan.
        answers: where its number and its answers go; None is its end.
        options: more arguments of the process.
        log: what the process prints.
        cache: folder of compiled programs, which all processes share.
    """

    def __init__(
        self,
        row: dict[str, Any],
        number: int,
        answers: queue.Queue[Any],
        options: Sequence[str],
        log: Path,
        cache: str,
    ) -> None:
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "CUDA_VISIBLE_DEVICES": visible(row["gpus"]),
        }
        if "limit_bytes" in row:
            share = row["limit_bytes"] / float(os.environ.get("GPU_BYTES", "150.75e9"))
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{share:.4f}"
        self.row, self.number = row, number
        self._answers = answers
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, __file__, "work", json.dumps(row), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    self._answers.put((self.number, json.loads(line)))
        self._answers.put((self.number, None))

    def ask(self, command: str) -> None:
        """Send a command. Its answer comes through the queue."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        self._listener.join(5)
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._log.close()


def visible(gpus: str) -> str:
    """Return the GPUs of these numbers, counted among those that this process may use."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
    return ",".join(allowed[int(gpu)] for gpu in gpus.split(","))


def work(row: dict[str, Any], small: bool) -> None:
    """Prepare one program, then obey the commands `time`, `profile` and `end` from the standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is no answer.

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    step = Step(row, small)
    answer(ready=step.prepare())
    for command in sys.stdin:
        if command.strip() == "end":
            return
        answer(**{command.strip(): getattr(step, command.strip())()})


@dataclasses.dataclass
class Step:
    """One program in this process.

    Attributes:
        row: the program.
        small: whether to shrink the model to what a CPU trains.
    """

    row: dict[str, Any]
    small: bool

    def prepare(self) -> dict[str, Any]:
        """Build the state, compile, and make three steps. Return what the program costs, besides time."""
        import jax

        from fastvim_jax.bench import train as bench
        from fastvim_jax.distributed import place_batch
        from pallas_kernels import timing

        row = self.row
        options = {"remat": row["remat"]} if "remat" in row else {}
        pixels, recipe = 224, not self.small
        if self.small:
            pixels, row["batch"] = 32, 8
            options |= {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_classes": 16}
        mesh_sizes = {key: row[key] for key in ("data", "fsdp") if key in row}
        ((named, config),) = bench.rows_and_configs(
            [(row["model"], pixels, row["batch"], "bf16")],
            blocks=row["blocks"],
            recipe=recipe,
            **mesh_sizes,
            **options,
        )
        mesh = bench.mesh_of(named)
        images = row["batch"] * (1 if mesh is None else mesh.size)
        begin = time.perf_counter()
        before = bench.bytes_in_use()
        quick = {"xla_backend_optimization_level": 1}  # Random bits compile slowly.
        # One program builds the state: op by op, a model of 64 blocks takes a minute.
        build = functools.partial(bench.placed_state, config, recipe, mesh)
        self._state = jax.block_until_ready(
            build() if mesh is not None else jax.jit(build, compiler_options=quick)()
        )
        memory = {
            "state_bytes": bench.bytes_on_a_device(self._state),
            "state_bytes_in_use": bench.bytes_in_use() - before,
        }
        built = time.perf_counter() - begin
        self._program = bench.step_program(config, images, recipe, mesh)
        make = jax.jit(functools.partial(bench.make_batch, config, images, recipe=recipe))
        batches = [make(seed=seed) for seed in range(2)]
        self._batches = batches if mesh is None else [place_batch(mesh, each) for each in batches]
        self._losses: list[Any] = []
        for i in range(3):
            jax.block_until_ready(self.one(i))
        peaks = [(device.memory_stats() or {}) for device in jax.local_devices()]
        return {
            **named, **memory, "images": images, "state_seconds": built,
            "losses": [float(each) for each in self._losses],
            "peak_bytes_in_use": [each.get("peak_bytes_in_use", 0) for each in peaks],
            "limit_bytes": [each.get("bytes_limit", 0) for each in peaks],
            **self._program.costs(), "circumstances": timing.circumstances(""),
        }  # fmt: skip

    def one(self, number: int) -> Any:
        """Make one step, without waiting for it."""
        self._state, metrics = self._program(self._state, self._batches[number % 2])
        if len(self._losses) < 3:
            self._losses.append(metrics["loss"])
        return metrics["loss"]

    def time(self) -> dict[str, Any]:
        """Time `REPEATS` runs of about `SECONDS`, in ms per step, and how long the host takes to queue a step."""
        import jax

        begin = time.perf_counter()
        jax.block_until_ready([self.one(i) for i in range(3)])
        steps = max(2, min(200, round(SECONDS * 3 / (time.perf_counter() - begin))))
        times, queued = [], []
        for _ in range(REPEATS + 1):
            begin = time.perf_counter()
            for i in range(steps):
                loss = self.one(i)
            queued.append(1e3 * (time.perf_counter() - begin) / steps)
            jax.block_until_ready(loss)
            times.append(1e3 * (time.perf_counter() - begin) / steps)
        # The first run warms up: XLA launches kernels as graphs only after some steps.
        return {"ms": times[1:], "queued_ms": statistics.median(queued[1:]), "steps": steps}

    def profile(self) -> dict[str, Any]:
        """Profile some steps: by GPU, what computes, waits and idles, and the longest kernels."""
        from fastvim_jax.bench.overlap import gaps, overlap
        from pallas_kernels import timing

        events = timing.device_events(self.one, STEPS_OF_A_PROFILE)
        parts = overlap(events, STEPS_OF_A_PROFILE)
        kernels = {}
        for device, each in events.items():
            totals: dict[str, float] = {}
            for name, _, duration in each:
                totals[name] = totals.get(name, 0.0) + duration / STEPS_OF_A_PROFILE / 1e6
            longest = sorted(totals.items(), key=lambda item: -item[1])[:40]
            kernels[device] = {name: round(value, 4) for name, value in longest}
            parts[device]["kernels"] = len(each) / STEPS_OF_A_PROFILE
        first = sorted(events)[0] if events else None
        return {
            "overlap": parts,
            "gaps": gaps(events[first], STEPS_OF_A_PROFILE) if first else [],
            "longest": {device: each for device, each in kernels.items() if device == first},
        }  # fmt: skip


class Bench:
    """Drive the workers of a plan until the time is over, and keep the record.

    Args:
        plan: name of the plan.
        out: the record's file; logs lie beside it.
        seconds: time from now after which all ends.
        options: more arguments of the workers.
    """

    def __init__(self, plan: str, out: Path, seconds: float, options: Sequence[str] = ()) -> None:
        self._rows: list[dict[str, Any]] = [dict(row) for row in PLANS[plan]]
        self._plan, self._out, self._options = plan, out, options
        self._end = time.monotonic() + seconds
        self._answers: queue.Queue[Any] = queue.Queue()
        self._workers: dict[int, Worker] = {}
        self._circumstances: dict[str, Any] = {}
        self._clocks = Clocks()
        self._cache = tempfile.TemporaryDirectory()
        out.parent.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Compile, time in rounds, profile, and time all programs of one GPU at once."""
        try:
            self._compile()
            ready = [i for i, row in enumerate(self._rows) if "peak_bytes" in row]
            main = [i for i in ready if "after" not in self._rows[i]]
            for each in range(ROUNDS):
                for i in main if each != 1 else ready:
                    self._measure(i, "time")
                if each == 0:  # the profile that matters most, early
                    for i in main[:2]:
                        self._measure(i, "profile")
            for i in main[2:]:
                self._measure(i, "profile")
            alone = [i for i in ready if "after" in self._rows[i]]
            for first in sorted({self._rows[i]["after"] for i in alone}):
                same = [i for i in alone if self._rows[i]["after"] == first]
                self._together([first, *same])
        finally:
            for worker in self._workers.values():
                worker.end()
            self._clocks.end()
            self._cache.cleanup()

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _start(self, i: int) -> None:
        log = self._out.with_name(f"{self._out.stem}_{i}.log")
        self._workers[i] = Worker(
            self._rows[i], i, self._answers, self._options, log, self._cache.name
        )

    def _compile(self) -> None:
        """Start all programs, and wait until they are ready, or until two thirds of the time are over and some are."""
        for i, row in enumerate(self._rows):
            if "after" not in row:
                self._start(i)
        waiting, limit = set(range(len(self._rows))), time.monotonic() + 0.65 * self._left()
        while waiting and self._left() > 0:
            if time.monotonic() > limit and len(waiting) < len(self._rows):
                break
            found = self._next(1.0)
            if found is None:
                continue
            i, answer = found
            waiting.discard(i)
            if answer is None:
                self._rows[i]["failed"] = "ended before it was ready"
                waiting -= {j for j, row in enumerate(self._rows) if row.get("after") == i}
            else:
                ready = answer["ready"]
                self._circumstances = ready.pop("circumstances")
                self._rows[i] |= ready
                for j, row in enumerate(self._rows):
                    if row.get("after") == i:
                        self._start(j)
            print(
                f"{self._name(i)}: {'failed' if answer is None else 'ready'}, {self._left():.0f} s left",
                flush=True,
            )
            self._keep()
        for i in waiting:  # Programs that are timed must be alone.
            self._rows[i]["failed"] = "not ready in time"
            if i in self._workers:
                self._workers.pop(i).end()

    def _next(self, seconds: float) -> tuple[int, Any] | None:
        try:
            return self._answers.get(timeout=max(0.01, min(seconds, self._left())))
        except queue.Empty:
            return None

    def _measure(self, i: int, command: str) -> None:
        if self._left() > 1 and "failed" not in self._rows[i]:
            self._workers[i].ask(command)
            self._collect({i}, command)

    def _together(self, chosen: list[int]) -> None:
        chosen = [i for i in chosen if "failed" not in self._rows[i]]
        for i in chosen:
            self._workers[i].ask("time")
        self._collect(set(chosen), "time", "together_ms")

    def _collect(self, asked: set[int], command: str, name: str = "times_ms") -> None:
        begin = time.monotonic()
        while asked and self._left() > 0:
            found = self._next(1.0)
            if found is None:
                continue
            i, answer = found
            if i not in asked:  # the end of a program that was not ready in time
                continue
            asked.discard(i)
            row = self._rows[i]
            if answer is None:
                row["failed"] = f"ended during {command}"
            elif command == "time":
                values = answer["time"]
                row.setdefault(name, []).append([round(ms, 4) for ms in values["ms"]])
                row["queued_ms"] = values["queued_ms"]
                row.setdefault(name.replace("_ms", "_clocks"), []).append(self._clocks.since(begin))
                if name == "times_ms":
                    row["ms"] = statistics.median(ms for each in row[name] for ms in each)
                    row["images_per_s_of_a_device"] = 1e3 * row["batch"] / row["ms"]
                median = statistics.median(values["ms"])
                print(
                    f"{self._name(i)}: {median:.3f} ms ({name}), queued {values['queued_ms']:.2f}"
                    f" {self._clocks.since(begin)}",
                    flush=True,
                )
            else:
                row |= answer[command]
                print(f"{self._name(i)}: {json.dumps(row['overlap'])}", flush=True)
            self._keep()

    def _name(self, i: int) -> str:
        row = self._rows[i]
        return f"{i} {row['model']} {row['mesh']} on {row['gpus']}"

    def _keep(self) -> None:
        record = {
            "bench": "several_gpus", "plan": self._plan, "circumstances": self._circumstances, "rows": self._rows,
        }  # fmt: skip
        part = self._out.with_name(self._out.name + ".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(part, self._out)


def main() -> None:
    """Run a plan, or be one of its workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", choices=[*PLANS, "work"])
    parser.add_argument("row", nargs="?", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="the record's file")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument(
        "--small", action="store_true", help="models of one block, to try the script on a CPU"
    )
    chosen = parser.parse_args()
    if chosen.plan == "work":
        work(chosen.row, chosen.small)
    else:
        Bench(chosen.plan, chosen.out, chosen.seconds, ["--small"] if chosen.small else []).run()


if __name__ == "__main__":
    main()

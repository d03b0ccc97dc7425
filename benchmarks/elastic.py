"""Stop, kill and continue runs of several processes on one host, through experiments/launch/manual.sh as it stands.

python benchmarks/elastic.py --out FOLDER [--processes 4 1 2 4] [--only whole moved killed]

Three runs of one small model on CIFAR-10. `whole` trains in one process without a stop, beside the others. `moved` is
stopped by SIGTERM to one of its processes, and goes on with another number of processes, several times. Then `killed`
loses one of its processes by SIGKILL after some checkpoints, and the same command goes on. `elastic.json` tells how
all processes ended, and how far the losses of the three differ. Each process of a run has a GPU of its own. Two runs
of several processes do not share GPUs: where they did, on two H200s, both stood still. One reason was how the first
checkpoint was read back, which has been mended since (commit 6de0de3; docs/scaling.md).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("whole", "moved", "killed")
STEPS, EVERY = 256, 16  # steps of a run, and between checkpoints
WRAPPER = """\
import os, sys
arguments = sys.argv[1:]
arguments[arguments.index("--data.workers") + 1] = "0"
open(os.environ["PID_FILE"], "w").write(str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "fastvim_jax", *arguments, *{flags!r}])
"""
"""What manual.sh starts in place of `fastvim`: the same, with a small model, and a file that tells its number."""
FLAGS = [
    "--data.source", "packed_npz", "--data.path", "$FASTVIM_DATA_DIR/cifar10", "--data.train-split", "train[:4096]",
    "--data.eval-split", "test[:1024]", "--data.image-size", "32", "--data.batch-size", "128",
    "--model.image-size", "32", "--model.patch-size", "4", "--model.embed-dim", "64", "--model.depth", "2",
    "--model.num-classes", "10",
    "--epochs", str(STEPS * 128 // 4096), "--checkpoint-every-steps", str(EVERY), "--log-every-steps", "8",
    "--evaluate-every-epochs", "0", "--optimizer.warmup-epochs", "1", "--no-progress",
]  # fmt: skip


class Run:
    """A run folder, and the processes that work on it.

    Args:
        name: name of the run.
        out: folder of all runs and logs.
    """

    def __init__(self, name: str, out: Path) -> None:
        self.folder, self._out, self._name = out / "runs" / name, out, name
        self.starts: list[dict[str, Any]] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, count: int, gpus: Sequence[str]) -> None:
        """Start `count` processes, each with a GPU of its own."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        at = len(self.starts)
        self.starts.append({"processes": count, "began": time.time()})
        self._processes = []
        for i in range(count):
            environment = {
                **os.environ, "RUN": str(self.folder), "FASTVIM": str(self._out / "fastvim"),
                "PID_FILE": str(self._pid(i)),
                "CUDA_VISIBLE_DEVICES": ",".join(gpus[:count]), "FASTVIM_IMAGENET_DIR": "/nowhere",
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            }  # fmt: skip
            if count > 1:
                environment["JAX_LOCAL_DEVICE_IDS"] = str(i)
            command = [
                "bash",
                str(ROOT / "experiments/launch/manual.sh"),
                address,
                str(count),
                str(i),
            ]
            with contextlib.suppress(FileNotFoundError):
                self._pid(i).unlink()
            with (self._out / f"{self._name}_{at}_{i}.log").open("wb") as log:
                self._processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                )

    def _pid(self, i: int) -> Path:
        return self._out / f"{self._name}_{i}.pid"

    def lines(self, kind: str = "train") -> dict[int, dict[str, Any]]:
        """Return the log's lines of a kind by step."""
        try:
            text = (self.folder / "metrics.jsonl").read_text()
        except OSError:
            return {}
        found = {}
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                values = json.loads(line)
                if values["kind"] == kind:
                    found[values["step"]] = values
        return found

    def reach(self, step: int) -> None:
        """Wait until the log has this step, or a process has ended."""
        while max(self.lines(), default=0) < step and all(
            p.poll() is None for p in self._processes
        ):
            time.sleep(0.02)

    def send(self, i: int, number: signal.Signals) -> None:
        """Send a signal to the training process `i`, not to the script that started it."""
        self.starts[-1] |= {"signal": number.name, "to": i, "at_step": max(self.lines(), default=0)}
        self._sent = time.time()
        os.kill(int(self._pid(i).read_text()), number)

    def wait(self) -> None:
        """Wait until all processes have ended, and note how."""
        here = self.starts[-1]
        ended = []
        for process in self._processes:
            process.wait()
            ended.append(round(time.time() - getattr(self, "_sent", time.time()), 1))
        here["statuses"] = [process.returncode for process in self._processes]
        here["seconds_after_signal"] = ended if "signal" in here else None
        here["last_step"] = max(self.lines(), default=0)
        here["seconds"] = round(time.time() - here.pop("began"), 1)
        here["said"] = [self._last_words(i) for i in range(len(self._processes))]
        print(self._name, json.dumps(here), flush=True)

    def _last_words(self, i: int) -> list[str]:
        text = (self._out / f"{self._name}_{len(self.starts) - 1}_{i}.log").read_text(
            errors="replace"
        )
        return [line[:300] for line in text.strip().splitlines()[-3:]]


def moved(run: Run, counts: Sequence[int], gpus: Sequence[str]) -> None:
    """Stop the run by SIGTERM to its last process, and go on with the next number of processes."""
    for at, count in enumerate(counts):
        run.start(count, gpus)
        if at < len(counts) - 1:
            run.reach((at + 1) * STEPS // len(counts))
            run.send(count - 1, signal.SIGTERM)
        run.wait()


def killed(run: Run, count: int, gpus: Sequence[str]) -> None:
    """Kill one process after some checkpoints, and give the same command again."""
    run.start(count, gpus)
    run.reach(3 * EVERY + 8)
    run.send(count - 2, signal.SIGKILL)
    run.wait()
    run.start(count, gpus)
    run.wait()


def compared(first: Run, second: Run) -> dict[str, Any]:
    """Compare the losses of two runs at all steps of the log."""
    a, b = first.lines(), second.lines()
    both = sorted(set(a) & set(b))
    differences = [abs(a[step]["loss"] / b[step]["loss"] - 1) for step in both]
    return {
        "lines": len(both),
        "equal": sum(d == 0 for d in differences),
        "largest_relative_difference": max(differences, default=None),
        "last_losses": [a[both[-1]]["loss"], b[both[-1]]["loss"]] if both else None,
    }


def main() -> int:
    """Run all three, and write the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[4, 1, 2, 4])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="the runs to make")
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    flags = [os.path.expandvars(flag) for flag in FLAGS]
    (out / "fastvim.py").write_text(WRAPPER.format(flags=flags))
    program = shlex.join([sys.executable, str(out / "fastvim.py")])  # A "#!" line takes no spaces.
    (out / "fastvim").write_text(f'#!/usr/bin/env bash\nexec {program} "$@"\n')
    (out / "fastvim").chmod(0o755)
    numbers = map(str, range(max(chosen.processes)))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(numbers)).split(",")
    runs = {name: Run(name, out) for name in NAMES if name in chosen.only}

    def whole() -> None:
        if "whole" in runs:
            runs["whole"].start(1, gpus[-1:])
            runs["whole"].wait()

    def stopped() -> None:
        if "moved" in runs:
            moved(runs["moved"], chosen.processes, gpus)
        if "killed" in runs:
            killed(runs["killed"], max(chosen.processes), gpus)

    works = [threading.Thread(target=work, daemon=True) for work in (whole, stopped)]
    for work in works:
        work.start()
    while any(work.is_alive() for work in works):
        for work in works:
            work.join(0.5)
        keep(out, runs)
    keep(out, runs)
    return 0


def keep(out: Path, runs: dict[str, Run]) -> None:
    """Write the summary of what is there."""
    record = {
        "bench": "elastic",
        "commit": os.environ.get("FASTVIM_COMMIT", ""),
        "runs": {name: run.starts for name, run in runs.items()},
        "against_whole": {
            name: compared(run, runs["whole"])
            for name, run in runs.items()
            if name != "whole" and "whole" in runs
        },
        "evaluated": {name: list(run.lines("eval").values()) for name, run in runs.items()},
    }
    (out / "elastic.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

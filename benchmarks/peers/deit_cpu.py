"""Time FastVim-T and timm's DeiT-T in PyTorch on the same CPU cores, in turns.

    python benchmarks/peers/deit_cpu.py --torch PYTHON --json FILE

PYTHON is an interpreter that imports torch and timm (by default this one). Images have 224 px, float32; weights are
random. Each program has a process that is pinned to the same processors: the first `--cores` of those that this program
may use (`taskset -c 4,5 python ...` chooses others), one for each physical core where Linux tells them. They take
turns, so that other work on the machine disturbs all alike. `cpu` is the processor time of a call in milliseconds,
which other programs disturb less than `wall`, the wall-clock time. Both are given as smallest, median and largest;
`ratio` is DeiT's time divided by FastVim's. `fastvim` is one call of a plain `jax.jit`. `fastvim_options` runs as
`Classifier`, `fastvim predict` and `fastvim bench model` do: with compiler options, and with the batch in one share for
each core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZE = 224
CALLS = {1: 8, 16: 2}
"""Calls per round, by batch size."""
FASTVIM = ("fastvim", "fastvim_options")


def make_fastvim(batch: int, *, options: bool) -> Any:
    """Return a function that calls FastVim-T, jitted, with the defaults of `create_model`."""
    import jax
    from flax import nnx

    from fastvim_jax import create_model
    from fastvim_jax.models.compiling import forward_options
    from fastvim_jax.models.shares import run_in_shares, share_count

    model = create_model("fastvim_tiny_patch16_224", rngs=0)
    graphdef, params = nnx.split(model)
    chosen = forward_options(model.config.precision.compute) if options else None
    run = jax.jit(
        lambda params, images: nnx.merge(graphdef, params)(images), compiler_options=chosen
    )
    images = jax.random.normal(jax.random.key(0), (batch, SIZE, SIZE, 3))
    if options:
        size = batch // share_count(batch)
        return lambda: run_in_shares(run, params, images, size).block_until_ready()
    return lambda: run(params, images).block_until_ready()


def make_deit(batch: int, cores: int) -> Any:
    """Return a function that calls timm's DeiT-T, eager, with the defaults of `create_model`."""
    import timm
    import torch

    torch.set_num_threads(cores)
    model = timm.create_model("deit_tiny_patch16_224").eval()
    images = torch.randn(batch, 3, SIZE, SIZE)

    def call() -> Any:
        with torch.inference_mode():
            return model(images)

    return call


def work(name: str, cores: int) -> None:
    """Read a batch size per line of standard input, and print (processor, wall-clock) milliseconds of each call."""
    os.sched_setaffinity(0, processors(cores))
    calls: dict[int, Any] = {}
    for line in sys.stdin:
        batch = int(line)
        if batch not in calls:
            calls[batch] = (
                make_deit(batch, cores)
                if name == "deit"
                else make_fastvim(batch, options=name == "fastvim_options")
            )
            for _ in range(2):
                calls[batch]()
        times = []
        for _ in range(CALLS[batch]):
            cpu, wall = time.process_time(), time.perf_counter()
            calls[batch]()
            times.append((1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)))
        print(json.dumps(times), flush=True)


def processors(cores: int) -> list[int]:
    """List the first processors that this program may use, one for each physical core where there are enough."""
    allowed = sorted(os.sched_getaffinity(0))
    first: dict[str, int] = {}
    for number in allowed:
        file = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        first.setdefault(file.read_text() if file.exists() else str(number), number)
    found = list(first.values())
    return (found if len(found) >= cores else allowed)[:cores]


def start(python: str, name: str, cores: int) -> subprocess.Popen:
    """Start a worker process that computes on `cores` threads."""
    root = str(Path(__file__).resolve().parents[2])
    command = [python, __file__, "--work", name, "--cores", str(cores)]
    search = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PYTHONPATH": search, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(cores)}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings},
    )


def ask(worker: subprocess.Popen, batch: int) -> list[list[float]]:
    """Let a worker run one round, and return its times."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{batch}\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise SystemExit("a worker ended: see its message above.")
    return json.loads(answer)


def compare(workers: dict[str, subprocess.Popen], batch: int, rounds: int) -> dict[str, Any]:
    """Let the models take turns, and summarise their times."""
    times: dict[str, list[list[float]]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name] += ask(worker, batch)
    row: dict[str, Any] = {"batch": batch, "calls": len(times["fastvim"])}
    for i, kind in enumerate(("cpu", "wall")):
        for name, found in times.items():
            values = [each[i] for each in found]
            spread = [min(values), statistics.median(values), max(values)]
            row[f"{name}_{kind}_ms"] = [round(value, 2) for value in spread]
        for name in FASTVIM:
            best, median = (row[f"deit_{kind}_ms"][j] / row[f"{name}_{kind}_ms"][j] for j in (0, 1))
            ratio = {"of_fastest": round(best, 3), "of_medians": round(median, 3)}
            row[f"{name}_ratio_{kind}"] = ratio
    return row


def versions(python: str) -> dict[str, str]:
    """Return the versions of an interpreter, of its torch and of its timm."""
    code = "import platform, torch, timm; print(platform.python_version(), torch.__version__, timm.__version__)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(("python", "torch", "timm"), found.stdout.split(), strict=True))


def processor() -> str:
    """Return the processor's name, and whether it has AVX-512."""
    text = Path("/proc/cpuinfo").read_text()
    name = next(
        (line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), "?"
    )
    return f"{name}, AVX-512" if "avx512f" in text else name


def main() -> None:
    """Measure, print, and write JSON if --json is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default=sys.executable, help="interpreter with torch and timm")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", choices=(*FASTVIM, "deit"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        return work(chosen.work, chosen.cores)
    from pallas_kernels import timing

    circumstances = timing.circumstances("benchmarks/peers/deit_cpu.py")
    circumstances |= {
        "processor": processor(),
        "cores": chosen.cores,
        "processors": processors(chosen.cores),
        "peer": versions(chosen.torch),
        "load_before": os.getloadavg(),
    }
    pythons = dict.fromkeys(FASTVIM, sys.executable) | {"deit": chosen.torch}
    workers = {name: start(python, name, chosen.cores) for name, python in pythons.items()}
    rows = []
    try:
        for batch in CALLS:
            rows.append(compare(workers, batch, chosen.rounds))
            print(json.dumps(rows[-1], indent=1), flush=True)
            if chosen.json:
                circumstances["load_after"] = os.getloadavg()
                record = {"bench": "deit_cpu", "circumstances": circumstances, "rows": rows}
                chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.wait()


if __name__ == "__main__":
    main()

"""Runs the experiments of masked pre-training on the GPUs of one host, keeps their results, and writes masked.md.

    FASTVIM_DATA_DIR=... python benchmarks/masked.py run RUNS --devices 0,1,2,3 --seconds 540
    python benchmarks/masked.py collect RUNS --commit HASH
    python benchmarks/masked.py report

`run` trains every job of JOBS in a folder of its own in RUNS, one process a GPU. After --seconds it stops the
jobs under way, which save; asked again, it goes on with them. A job that begins from another waits for it.

Stated beforehand, in the commit that brought this file: pre-training must be ahead of training from scratch with a
tenth of CIFAR-10's labels (`tenth` against `tenth_scratch`, three seeds each, same epochs). All else as it falls.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS = HERE / "results" / "h100" / "masked"
KEPT = ("epoch", "loss", "learning_rate", "images_per_second", "seconds")


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: its folder.
        experiment: of `fastvim train`.
        after: the job whose run it starts from.
        arguments: overrides.
    """

    name: str
    experiment: str
    after: str = ""
    arguments: tuple[str, ...] = ()


def _seeded(name: str, experiment: str, after: str, seed: int, *arguments: str) -> Job:
    source = f"{after}_s{seed}" if after else ""
    return Job(f"{name}_s{seed}", experiment, source, ("--seed", str(seed), *arguments))


CIFAR, TINY = "mae_cifar10", "mae_tiny_imagenet"
UNSCALED = "--no-scale-from-init"
JOBS = [
    *(_seeded("pretrain", f"{CIFAR}/pretrain", "", seed) for seed in range(3)),
    *(_seeded("tenth_scratch", f"{CIFAR}/scratch_tenth", "", seed) for seed in range(3)),
    *(_seeded("tenth", f"{CIFAR}/finetune_tenth", "pretrain", seed) for seed in range(3)),
    _seeded("probe", f"{CIFAR}/probe", "pretrain", 0),
    _seeded("probe_unscaled", f"{CIFAR}/probe", "pretrain", 0, UNSCALED),
    _seeded("pretrain_consistent", f"{CIFAR}/pretrain_consistent", "", 0),
    _seeded("pretrain_true_mean", f"{CIFAR}/pretrain_true_mean", "", 0),
    _seeded("full_scratch", f"{CIFAR}/scratch", "", 0),
    _seeded("full", f"{CIFAR}/finetune", "pretrain", 0),
    _seeded("tenth_unscaled", f"{CIFAR}/finetune_tenth", "pretrain", 0, UNSCALED),
    _seeded("tenth_every_block", f"{CIFAR}/finetune_tenth", "pretrain", 0, "--optimizer.layer-rule", "blocks"),
    _seeded("tenth_consistent", f"{CIFAR}/finetune_tenth", "pretrain_consistent", 0),
    _seeded("tenth_true_mean", f"{CIFAR}/finetune_tenth", "pretrain_true_mean", 0),
    _seeded("probe_consistent", f"{CIFAR}/probe", "pretrain_consistent", 0),
    _seeded("probe_true_mean", f"{CIFAR}/probe", "pretrain_true_mean", 0),
    _seeded("full_unscaled", f"{CIFAR}/finetune", "pretrain", 0, UNSCALED),
    _seeded("tiny_pretrain", f"{TINY}/pretrain", "", 0),
    _seeded("tiny_scratch", f"{TINY}/scratch", "", 0),
    _seeded("tiny", f"{TINY}/finetune", "tiny_pretrain", 0),
    _seeded("tiny_probe", f"{TINY}/probe", "tiny_pretrain", 0),
    _seeded("tiny_probe_unscaled", f"{TINY}/probe", "tiny_pretrain", 0, UNSCALED),
]  # fmt: skip


def run(runs: Path, devices: list[str], seconds: float) -> int:
    """Train all jobs, one process a GPU, until they are done or the time is over; return the number left."""
    end = time.monotonic() + seconds
    runs.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in JOBS if not _done(runs / job.name)]
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    failed: set[str] = set()
    while (waiting or running) and time.monotonic() < end:
        for device in [d for d in devices if d not in running]:
            ready = [job for job in waiting if not job.after or _done(runs / job.after)]
            if ready:
                waiting.remove(ready[0])
                running[device] = (ready[0], _start(ready[0], runs, device))
        for device, (job, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[device]
            _finished(job, process, runs)
            if process.returncode:
                failed.add(job.name)
        waiting = [job for job in waiting if job.after not in failed]
        time.sleep(0.5)
    for _, process in running.values():
        process.send_signal(signal.SIGTERM)  # It saves, and goes on next time.
    for job, process in running.values():
        process.wait()
        _finished(job, process, runs)
    left = [job.name for job in JOBS if not _done(runs / job.name)]
    print(f"{len(JOBS) - len(left)} of {len(JOBS)} runs done; left: {', '.join(left) or 'none'}")
    return len(left)


def _finished(job: Job, process: subprocess.Popen[bytes], runs: Path) -> None:
    if process.returncode == 0:
        (runs / job.name / "done").touch()
    print(f"{time.strftime('%H:%M:%S')} {job.name}: exit status {process.returncode}", flush=True)


def _done(folder: Path) -> bool:
    return (folder / "done").is_file()


def _start(job: Job, runs: Path, device: str) -> subprocess.Popen[bytes]:
    folder = runs / job.name
    start = ["--init", str(runs / job.after)] if job.after else []
    command = [
        sys.executable, "-m", "fastvim_jax", "train", job.experiment, "--run-dir", str(folder), "--no-progress",
        *start, *job.arguments,
    ]  # fmt: skip
    with (runs / f"{job.name}.log").open("ab") as log:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def collect(runs: Path, commit: str) -> None:
    """Keep of every finished run: circumstances, curve, last evaluation."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    for job in JOBS:
        folder = runs / job.name
        if not _done(folder):
            continue
        start = json.loads((folder / "environment.json").read_text())["starts"][0]
        config = json.loads((folder / "config.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        trained = [line for line in lines if line["kind"] == "train"]
        evaluation = [line for line in lines if line["kind"] == "eval"][-1]
        record = {
            "job": job.name,
            "experiment": job.experiment,
            "arguments": list(job.arguments),
            "from": job.after,
            "seed": config["seed"],
            "device": start["device"]["kind"],
            "versions": start["versions"],
            "commit": commit,
            "started": start["started"],
            "seconds": trained[-1]["seconds"],
            "pool_scale": config["model"].get("pool_scale"),
            "evaluation": {
                k: v for k, v in evaluation.items() if k.startswith(("raw", "ema", "count"))
            },
            "log": [{k: round(line[k], 6) for k in KEPT if k in line} for line in trained],
        }
        text = json.dumps(record, indent=1).replace("\n   ", " ").replace("\n  }", " }")
        (RECORDS / f"{job.name}.json").write_text(text + "\n")


def load() -> dict[str, list[dict[str, Any]]]:
    """Return the kept runs by name without seed, in the order of JOBS."""
    found: dict[str, list[dict[str, Any]]] = {}
    for job in JOBS:
        path = RECORDS / f"{job.name}.json"
        if path.is_file():
            found.setdefault(job.name.rpartition("_s")[0], []).append(json.loads(path.read_text()))
    return found


def top1(record: dict[str, Any]) -> float:
    """Return the top-1 % of the averaged weights, or the raw ones if no average was kept."""
    scores = record["evaluation"]
    return 100 * scores.get("ema_top1", scores.get("raw_top1"))


ROWS = (
    ("10 % of the labels, 100 epochs", "", ""),
    ("from scratch", "tenth_scratch", ""),
    ("pre-trained", "tenth", ""),
    ("pre-trained, no scaling factor", "tenth_unscaled", "84.6 against 84.9 (L)"),
    ("pre-trained, rates fall at every block", "tenth_every_block", "83.9 against 84.9 (L)"),
    ("pre-trained with true mean", "tenth_true_mean", "82.8 against 83.0 (B)"),
    ("pre-trained with consistent reversal", "tenth_consistent", "not published"),
    ("All labels, 30 epochs", "", ""),
    ("from scratch", "full_scratch", ""),
    ("pre-trained", "full", ""),
    ("pre-trained, no scaling factor", "full_unscaled", "84.6 against 84.9 (L)"),
    ("Linear probe, all labels", "", ""),
    ("scaling factor 0.25", "probe", "60.2 (L)"),
    ("no scaling factor", "probe_unscaled", "0.02 (L)"),
    ("true mean", "probe_true_mean", ""),
    ("consistent reversal", "probe_consistent", "not published"),
    ("A tenth of Tiny-ImageNet, 100 epochs", "", ""),
    ("from scratch", "tiny_scratch", ""),
    ("pre-trained", "tiny", ""),
    ("probe, scaling factor 0.25", "tiny_probe", ""),
    ("probe, no scaling factor", "tiny_probe_unscaled", ""),
)


def report() -> None:
    """Write masked.md from the kept runs."""
    runs = load()
    lines = ["| run | top-1 % | seeds | minutes | paper, ImageNet |", "|---|--:|--:|--:|---|"]
    for title, name, paper in ROWS:
        if not name:
            lines.append(f"| **{title}** | | | | |")
            continue
        if name not in runs:
            continue
        values = [top1(record) for record in runs[name]]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        minutes = statistics.fmean(record["seconds"] for record in runs[name]) / 60
        each = ", ".join(f"{v:.2f}" for v in values)
        lines.append(
            f"| {title} | {statistics.fmean(values):.2f}{spread} | {each} | {minutes:.1f} | {paper} |"
        )
    losses = ["| pre-training | loss on test images | images/s | minutes |", "|---|--:|--:|--:|"]
    for name in runs:
        if "pretrain" in name:
            for record in runs[name]:
                rate = statistics.median(
                    x["images_per_second"] for x in record["log"] if "images_per_second" in x
                )
                losses.append(
                    f"| `{record['job']}` | {record['evaluation']['raw_loss']:.4f} | {rate:,.0f} | "
                    f"{record['seconds'] / 60:.1f} |"
                )
    records = [record for found in runs.values() for record in found]
    circumstances = sorted(
        {
            f"{r['device']}, JAX {r['versions']['jax']}, {r['started'][:10]}, commit {r['commit'][:7]}"
            for r in records
        }
    )
    verdict = _verdict(runs)
    (HERE / "masked.md").write_text(
        "\n".join(
            [
                "# Masked pre-training at a small size\n",
                "Generated by `benchmarks/masked.py report` from recorded runs; do not edit. CIFAR-10 (a JPEG copy)\n"
                "and a tenth of Tiny-ImageNet; FastVim of 12 blocks x 192, 64 patches of which 16 are seen; test\n"
                "images read once a run; nothing tuned. `benchmarks/masked.py run` makes all of it again. Several\n"
                "runs shared the GPU, and pre-training was stopped once and went on.\n",
                verdict,
                "",
                *lines,
                "",
                *losses,
                "",
                "; ".join(circumstances)
                + ". Every record has its curve: `results/h100/masked/`.\n",
            ]
        )
    )


def _verdict(runs: dict[str, list[dict[str, Any]]]) -> str:
    if not {"tenth", "tenth_scratch"} <= runs.keys():
        return "The comparison stated beforehand has not been run.\n"
    tuned, scratch = ([top1(r) for r in runs[name]] for name in ("tenth", "tenth_scratch"))
    ahead = statistics.fmean(tuned) - statistics.fmean(scratch)
    wins = min(tuned) > max(scratch)
    return (
        "Stated beforehand: with a tenth of CIFAR-10's labels, pre-training must be ahead of training from scratch. "
        f"It is {ahead:+.2f} points ahead ({len(tuned)} and {len(scratch)} seeds; "
        f"{'every seed of the one above every seed of the other' if wins else 'the seeds overlap'}).\n"
    )


def main() -> int:
    """Run, collect or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train all jobs that are not done")
    running.add_argument("runs", type=Path)
    running.add_argument("--devices", default="0", help="GPU numbers: 0,1,2,3")
    running.add_argument("--seconds", type=float, default=540.0)
    collecting = commands.add_parser("collect", help="keep finished runs")
    collecting.add_argument("runs", type=Path)
    collecting.add_argument("--commit", required=True, help="of the code that ran")
    commands.add_parser("report", help="write masked.md")
    chosen = parser.parse_args()
    if chosen.command == "run":
        devices = chosen.devices.split(",")
        if len(set(devices)) < len(devices):
            parser.error(
                f"--devices {chosen.devices}: name each GPU once; a GPU has one run at a time"
            )
        run(chosen.runs, devices, chosen.seconds)
    elif chosen.command == "collect":
        collect(chosen.runs, chosen.commit)
    else:
        report()
    return 0


if __name__ == "__main__":
    sys.exit(main())

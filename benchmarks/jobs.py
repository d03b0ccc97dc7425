"""Run training jobs side by side on the GPUs of one host, and write records of their run folders.

A job is one Python command with a run folder of its own. Jobs start in the order of the list, as soon as a GPU has room
and the job from which they start is done. When the time is over, running jobs are asked to stop, and they save. The
same call then resumes them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
"""Folder of the kept records: CARD/PAGE/NAME.json."""
GRACE = 30.0
"""Seconds that runs have to save when the time is over."""
KEPT = ("epoch", "loss", "learning_rate", "images_per_second", "seconds")


@dataclasses.dataclass(frozen=True)
class Job:
    """Describe one run.

    Attributes:
        name: name of the run folder.
        command: arguments of Python; `{runs}` in them becomes the folder of all runs.
        after: name of the job from whose run this job starts, or "".
        like: name of a job with the same programs, or "". This job waits until that job has compiled them, and then
            finds them in the compilation cache.
        share: part of a GPU that the job takes. The shares of a GPU's jobs add up to at most 1.
        environment: more environment variables.
    """

    name: str
    command: tuple[str, ...]
    after: str = ""
    like: str = ""
    share: float = 1.0
    environment: tuple[tuple[str, str], ...] = ()


def training(name: str, experiment: str, *arguments: str, after: str = "", **options: Any) -> Job:
    """Return the job that trains an experiment. If `after` is given, training starts from that job's run."""
    start = ("--init", f"{{runs}}/{after}") if after else ()
    command = (
        "-m", "fastvim_jax", "train", experiment, "--run-dir", f"{{runs}}/{name}", "--no-progress", *start, *arguments,
    )  # fmt: skip
    return Job(name, command, after, **options)


def run(
    jobs: Sequence[Job], runs: Path, devices: Sequence[str], seconds: float, share: float = 0.0
) -> list[str]:
    """Run all jobs that are not done, until the time is over. Return the names of jobs that are left.

    Args:
        jobs: jobs in order of importance.
        runs: folder that holds the run folders.
        devices: numbers of the GPUs to use.
        seconds: time after which running jobs are asked to stop.
        share: replaces the share of every job, if it is positive.
    """
    end = time.monotonic() + seconds
    runs.mkdir(parents=True, exist_ok=True)
    jobs = [dataclasses.replace(job, share=share) if share else job for job in jobs]
    waiting = [job for job in jobs if not done(runs / job.name)]
    running: dict[str, tuple[Job, str, subprocess.Popen[bytes]]] = {}
    while (waiting or running) and time.monotonic() < end:
        for job in list(waiting):
            coming = {each.name for each in waiting} | set(running)
            if job.after and job.after not in coming and not done(runs / job.after):
                print(f"{job.name} is left out: it starts from {job.after}", flush=True)
                waiting.remove(job)
            elif _ready(job, runs, coming):
                device = _roomiest(devices, running)
                if job.share <= 1.001 - _taken(device, running):
                    waiting.remove(job)
                    running[job.name] = (job, device, _start(job, runs, device))
        for name, (_, _, process) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                _finished(name, process, runs)
        time.sleep(0.3)
    for _, _, process in running.values():
        process.send_signal(signal.SIGTERM)  # It saves, and is resumed next time.
    patience = time.monotonic() + GRACE
    for name, (_, _, process) in running.items():
        try:
            process.wait(max(0.1, patience - time.monotonic()))
        except subprocess.TimeoutExpired:  # It is compiling, which blocks signals.
            process.kill()
            process.wait()
        _finished(name, process, runs)
    left = [job.name for job in jobs if not done(runs / job.name)]
    print(f"{len(jobs) - len(left)} of {len(jobs)} runs done; left: {', '.join(left) or 'none'}")
    return left


def done(folder: Path) -> bool:
    """Return whether the job of this folder is finished."""
    return (folder / "done").is_file()


def _ready(job: Job, runs: Path, coming: set[str]) -> bool:
    if job.after and not done(runs / job.after):
        return False
    if job.like not in coming:
        return True
    log = runs / job.like / "metrics.jsonl"  # Empty until the first steps are logged.
    return log.is_file() and log.stat().st_size > 0


def _taken(device: str, running: dict[str, tuple[Job, str, Any]]) -> float:
    return sum(job.share for job, where, _ in running.values() if where == device)


def _roomiest(devices: Sequence[str], running: dict[str, tuple[Job, str, Any]]) -> str:
    return min(devices, key=lambda device: _taken(device, running))


def _start(job: Job, runs: Path, device: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, *(part.replace("{runs}", str(runs)) for part in job.command)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device}
    if job.share < 1:
        environment |= {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 * job.share:.3f}",
        }
    environment |= dict(job.environment)
    print(f"{time.strftime('%H:%M:%S')} GPU {device}: {job.name} starts", flush=True)
    with (runs / f"{job.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _finished(name: str, process: subprocess.Popen[bytes], runs: Path) -> None:
    status = process.returncode
    if status == 0:
        (runs / name).mkdir(exist_ok=True)
        (runs / name / "done").touch()
    print(f"{time.strftime('%H:%M:%S')} {name}: exit status {status}", flush=True)


def record_of(folder: Path, commit: str) -> dict[str, Any]:
    """Return the record of a run: circumstances, training curve, last evaluation.

    Args:
        folder: the run folder.
        commit: commit of the code that ran.
    """
    starts = json.loads((folder / "environment.json").read_text())["starts"]
    config = json.loads((folder / "config.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    evaluation = _evaluations(folder)[-1]
    experiment, arguments, source = _command(starts[0]["command"])
    return {
        "job": folder.name,
        "experiment": experiment,
        "arguments": arguments,
        "from": source,
        "seed": config["seed"],
        "epochs": config["epochs"],
        "device": starts[0]["device"]["kind"],
        "versions": starts[0]["versions"],
        "commit": commit,
        "started": starts[0]["started"],
        "starts": len(starts),
        "seconds": _duration(trained),
        "pool_scale": config["model"].get("pool_scale"),
        "evaluated_at_epoch": evaluation["epoch"],
        "evaluation": {
            k: v for k, v in evaluation.items() if k.startswith(("raw", "ema", "count"))
        },
        "log": [{k: round(line[k], 6) for k in KEPT if k in line} for line in trained],
    }


def keep(record: dict[str, Any], folder: Path) -> None:
    """Write a record to `folder`, named by its job."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1).replace("\n   ", " ").replace("\n  }", " }")
    (folder / f"{record['job']}.json").write_text(text + "\n")


def card(device: str) -> str:
    """Return the short name of a device: `h200` for "NVIDIA H200", `h100` for "NVIDIA H100 80GB HBM3"."""
    named = re.search(r"\b[A-Z]+\d+\w*", device)
    return (named[0] if named else re.sub(r"\W+", "_", device)).lower()


def cards(records: Sequence[dict[str, Any]]) -> str:
    """Name the cards of records for a table: `H100`, or `H100, H200`."""
    return ", ".join(sorted({card(record["device"]).upper() for record in records}))


def one_of_each(paths: Iterable[Path]) -> list[Path]:
    """Sort the records of all cards by file name.

    Raises:
        ValueError: two cards have a record of one run, so that its seed would count twice.
    """
    found = sorted(paths, key=lambda path: path.name)
    for path, after in itertools.pairwise(found):
        if path.name == after.name:
            raise ValueError(f"two records of one run, keep one: {path}, {after}")
    return found


def load(
    jobs: Sequence[Job], topic: str, results: Path = RESULTS
) -> dict[str, list[dict[str, Any]]]:
    """Return the kept records of every card by name without seed (`_s0`), in the order of the jobs."""
    kept = {path.stem: path for path in one_of_each(results.glob(f"*/{topic}/*.json"))}
    found: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        if job.name in kept:
            record = json.loads(kept[job.name].read_text())
            found.setdefault(job.name.rpartition("_s")[0], []).append(record)
    return found


def collect(
    jobs: Sequence[Job], runs: Path, topic: str, commit: str, results: Path = RESULTS
) -> None:
    """Write the records of finished runs to `results/CARD/topic`, of other evaluated runs to `unfinished` in it."""
    for job in jobs:
        folder = runs / job.name
        if done(folder) or _evaluations(folder):
            record = record_of(folder, commit)
            kept = results / card(record["device"]) / topic
            keep(record, kept if done(folder) else kept / "unfinished")


def load_unfinished(topic: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the kept records of runs that were stopped, by name."""
    return [
        json.loads(path.read_text())
        for path in sorted(results.glob(f"*/{topic}/unfinished/*.json"))
    ]


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    log = folder / "metrics.jsonl"
    lines = map(json.loads, log.read_text().splitlines() if log.is_file() else ())
    return [line for line in lines if line["kind"] == "eval"]


def command_line(
    doc: str,
    jobs: Sequence[Job],
    topic: str,
    report: Callable[[], None],
    prepare: Callable[[Path], None] | None = None,
) -> int:
    """Parse the command line of a program with a list of jobs, and run, collect or report.

    Args:
        doc: the program's description.
        jobs: the program's jobs.
        topic: name of the folder that holds its records in the folder of each card.
        report: writes its page.
        prepare: makes the data that jobs read, given the folder of the runs.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train all jobs that are not done")
    running.add_argument("runs", type=Path)
    running.add_argument("--devices", default="0", help="GPU numbers: 0,1,2,3")
    running.add_argument(
        "--share", type=float, default=1.0, help="part of a GPU per run; 0.25: four at a time"
    )
    running.add_argument("--seconds", type=float, default=540.0)
    running.add_argument(
        "--only", nargs="+", default=["*"], help="patterns of job names: 'scenes_*'"
    )
    collecting = commands.add_parser("collect", help="keep finished runs")
    collecting.add_argument("runs", type=Path)
    collecting.add_argument("--commit", required=True, help="commit of the code that ran")
    commands.add_parser("report", help="write the page")
    chosen = parser.parse_args()
    if chosen.command == "report":
        report()
    elif chosen.command == "collect":
        collect(jobs, chosen.runs, topic, chosen.commit)
    else:
        if prepare is not None:
            prepare(chosen.runs)
        jobs = [job for job in jobs if any(fnmatchcase(job.name, name) for name in chosen.only)]
        run(jobs, chosen.runs, chosen.devices.split(","), chosen.seconds, chosen.share)
    return 0


def circumstances(records: Sequence[dict[str, Any]]) -> str:
    """Name the devices, versions, dates and commits of the records."""
    seen = {
        f"{r['device']}, JAX {r['versions']['jax']}, {r['started'][:10]}, commit {r['commit'][:7]}"
        for r in records
    }
    return "; ".join(sorted(seen))


def _command(command: Sequence[str]) -> tuple[str, list[str], str]:
    """Split the command of a run into experiment, overrides, and the name of the run from which it starts."""
    rest = list(command[command.index("train") + 1 :])
    experiment, arguments, source = rest.pop(0), [], ""
    while rest:
        argument = rest.pop(0)
        if argument in ("--run-dir", "--init"):  # Records name no folders of the machine.
            value = rest.pop(0)
            source = Path(value).name if argument == "--init" else source
        elif argument != "--no-progress":
            arguments.append(argument)
    return experiment, arguments, source


def _duration(trained: Sequence[dict[str, Any]]) -> float:
    """Return the seconds of training, summed over all starts, because a resumed run's clock starts again at 0."""
    times = [line["seconds"] for line in trained]
    return times[-1] + sum(a for a, b in itertools.pairwise(times) if b < a)

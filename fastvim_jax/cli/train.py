"""`fastvim train EXPERIMENT [--overrides]`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastvim_jax.cli.join import join_processes
from fastvim_jax.cli.usage import as_usage_error, command, parse
from fastvim_jax.closed_output import say

_RUN_DIR_HELP = "Folder of the run; an unfinished run of the same config there is continued."
_PROGRESS_HELP = (
    "Say how far the run is: a bar on a terminal, elsewhere a line now and then; also every epoch's "
    "scores, and what slows the run. The log holds all numbers in any case."
)
_PROFILE_HELP = "Steps of this start to trace for xprof or TensorBoard, into the folder profile of the run: 10:13."
_WANDB_HELP = "A project of Weights & Biases that gets the numbers too (extra: wandb)."

_PROCESS_FLAGS = [
    (
        "coordinator",
        Annotated[
            str | None,
            tyro.conf.arg(
                help="With several processes: host:port at which process 0 listens.",
                metavar="HOST:PORT",
            ),
        ],
        None,
    ),
    (
        "processes",
        Annotated[
            int | None,
            tyro.conf.arg(
                help="Number of processes. Under SLURM and Open MPI, --coordinator, --processes and --process are "
                "detected.",
                metavar="N",
            ),
        ],
        None,
    ),
    (
        "process",
        Annotated[int | None, tyro.conf.arg(help="Number of this process, from 0.", metavar="I")],
        None,
    ),
]

HELP = """\
Usage: fastvim train EXPERIMENT [--run-dir FOLDER] [--FIELD VALUE ...]

Train an experiment: one of the names below, or a Python file that sets `config`. Every field of the config can be
overridden; `fastvim train EXPERIMENT --help` lists them with their types and defaults.
The run goes to FOLDER, by default runs/EXPERIMENT. An unfinished run of the same config in FOLDER is continued.
On SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or Ctrl-C the current step is finished and saved, and the exit status is 75. The
same command continues.

Experiments:
"""


def run(arguments: Sequence[str]) -> int:
    """Train an experiment, or continue an unfinished run of it."""
    from fastvim_jax.distributed import is_first_process
    from fastvim_jax.training import (
        STOPPED_STATUS,
        ProfileSteps,
        Stopped,
        experiment_docs,
        list_experiments,
        load_experiment,
        train,
    )

    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP + "".join(f"  {name}\n" for name in list_experiments()), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    with as_usage_error():
        config = load_experiment(name)
        description = f"{experiment_docs(name)}\n\nEvery field of the config can be overridden:"
    run_dir = Path("runs") / (Path(name).stem if name.endswith(".py") else name)
    chosen = parse(_arguments(config, run_dir), f"train {name}", rest, description)
    with as_usage_error():
        profile = ProfileSteps.parse(chosen.profile) if chosen.profile else None
    join_processes(chosen.coordinator, chosen.processes, chosen.process)
    try:
        result = train(
            chosen.config,
            chosen.run_dir,
            progress=chosen.progress,
            profile=profile,
            wandb=chosen.wandb,
        )
    except Stopped as stopped:
        if is_first_process():
            say(f"fastvim: {stopped}\n  {command()} train {shlex.join(arguments)}", sys.stderr)
        return STOPPED_STATUS
    if not is_first_process():
        return 0
    say(
        f"Finished at step {result.step} after {result.seconds:.0f} s: {result.headline}.\n"
        f"Everything is in {result.run_dir}, the curves in summary.png.{_next(chosen.config, result.run_dir)}",
        sys.stdout,
    )
    return 0


def _next(config: Any, run_dir: Path) -> str:
    """Say what one does with a finished run of this task."""
    following = {
        "TrainConfig": f"eval {run_dir}",
        "SegmentationConfig": f"eval {run_dir}",
        "PretrainConfig": f"train EXPERIMENT --init {run_dir}",
    }.get(type(config).__name__)
    return f" Next: {command()} {following}" if following else ""


def _arguments(config: Any, run_dir: Path) -> type:
    """Build the arguments of this experiment: its config's fields at the top level, their values being the defaults."""
    # A config holds one kind of model: other kinds are other experiments, not subcommands.
    kind: Any = type(config)
    fields = tyro.conf.AvoidSubcommands[kind]
    return dataclasses.make_dataclass(
        "Arguments",
        [
            ("run_dir", Annotated[Path, tyro.conf.arg(help=_RUN_DIR_HELP)], run_dir),
            ("progress", Annotated[bool, tyro.conf.arg(help=_PROGRESS_HELP)], True),
            (
                "profile",
                Annotated[str | None, tyro.conf.arg(help=_PROFILE_HELP, metavar="FIRST:LAST")],
                None,
            ),
            (
                "wandb",
                Annotated[str | None, tyro.conf.arg(help=_WANDB_HELP, metavar="PROJECT")],
                None,
            ),
            *_PROCESS_FLAGS,
            (
                "config",
                Annotated[fields, tyro.conf.arg(name="")],
                dataclasses.field(default=config),
            ),
        ],
        frozen=True,
    )

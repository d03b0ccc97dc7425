"""Join a group of processes: detect the group from flags, JAX_* variables, SLURM or Open MPI.

JAX's own cluster detection is not used, for three reasons. If only some variables are set, it starts a single process,
so every process would train the whole run. It uses one port for all steps of a SLURM job. With Open MPI 5 it needs
mpi4py.

A process needs three values to join a group: the coordinator's address (where process 0 listens), the number of
processes, and its own number. Each value is taken from the first of these places that gives it:

    the caller (flags of `fastvim train`)
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (an indexed Kubernetes job: JOB_COMPLETION_INDEX)
    SLURM, for a process that `srun` started; Open MPI's `mpirun`

If no value is given, or the number of processes is 1, the process runs alone.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from fastvim_jax.errors import UserError

_COORDINATOR, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_DEVICES = "JAX_LOCAL_DEVICE_IDS"
_LOST_AFTER = 30
"""Seconds without a word from a process after which the others end. They cannot go on without it, and GPUs that wait
for its part of a reduction wait forever."""


@dataclass(frozen=True)
class Launch:
    """One process's place in its group.

    Attributes:
        coordinator: `host:port` at which process 0 listens.
        processes: number of processes.
        process: number of this process, from 0.
        local_devices: numbers of this host's devices that this process uses; None: all that it sees.
    """

    coordinator: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None


_joined: list[Launch] = []


def joined() -> Launch | None:
    """Return this process's place in the group that `initialize_distributed` joined; None if it runs alone.

    Unlike `jax.process_count`, this starts no devices, which waits for the other processes and may fail.
    """
    return _joined[0] if _joined else None


def initialize_distributed(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Launch | None:
    """Join the group of processes that `detect` finds, if any. Call this before the devices are first used.

    Raises:
        UserError: some of the values are missing or impossible, or the coordinator cannot be reached.
    """
    launch = detect(os.environ, coordinator, processes, process)
    if launch is None or jax.distributed.is_initialized():
        return launch
    # The trainer handles SIGTERM. JAX's preemption service would catch the signal before the trainer listens for it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address=launch.coordinator,
            num_processes=launch.processes,
            process_id=launch.process,
            local_device_ids=launch.local_devices,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=_LOST_AFTER,
        )
    except RuntimeError as error:
        raise UserError(
            f"Process {launch.process} of {launch.processes} could not join the coordinator at {launch.coordinator}: "
            f"{error}. Process 0 must run on that host, the port must be free and open to the others, and all "
            "processes must have been started."
        ) from error
    _joined[:] = [launch]
    return launch


def detect(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Launch | None:
    """Detect this process's place in its group. Return None if it runs alone.

    Args:
        environment: the environment variables.
        coordinator, processes, process: values that the caller knows; they override the environment.

    Raises:
        UserError: a value is missing or impossible. The message says which one, and where it can be set.
    """
    ours = bool(
        coordinator
        or processes is not None
        or process is not None
        or any(name in environment for name in (_COORDINATOR, _COUNT, _INDEX))
    )
    if processes is None:
        processes = _number(environment, _COUNT)
    if processes == 1:
        return None
    found = _slurm(environment) or _open_mpi(environment) or _Found()
    coordinator = coordinator or environment.get(_COORDINATOR) or found.coordinator
    if process is None:
        process = _number(environment, _INDEX)
    if process is None and ours:
        process = _number(environment, "JOB_COMPLETION_INDEX")
    processes = found.processes if processes is None else processes
    process = found.process if process is None else process
    if processes == 1 or (processes is None and not ours):
        return None
    missing = [
        f"{what} (--{flag} or {variable}{hint})"
        for value, what, flag, variable, hint in (
            (coordinator, "the coordinator's host:port", "coordinator", _COORDINATOR, ""),
            (processes, "the number of processes", "processes", _COUNT, ""),
            (process, "this process's number", "process", _INDEX, ", or JOB_COMPLETION_INDEX"),
        )
        if value is None
    ]
    if coordinator is None or processes is None or process is None:
        raise UserError(
            f"A start with several processes is missing {' and '.join(missing)}. {found.hint}"
            "For a process on its own, unset the others or give --processes 1."
        )
    if processes < 1 or not 0 <= process < processes:
        raise UserError(
            f"Process {process} of {processes}: processes are numbered from 0 to their number less one."
        )
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise UserError(
            f"The coordinator is {coordinator!r}, but must be host:port of process 0, for example node1:12345."
        )
    return Launch(coordinator, processes, process, _own_devices(environment, found))


@dataclass(frozen=True)
class _Found:
    """Values from a launcher's variables. `local` is the process's number on its host, if others run there too."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    local: int | None = None
    hint: str = ""


def _slurm(environment: Mapping[str, str]) -> _Found | None:
    """Detect a task of a SLURM step, that is, a process that `srun` started.

    The batch script itself is not a task: there, SLURM_NTASKS is only the number that was requested.
    """
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS")
    if tasks is None:
        if "SLURM_STEP_ID" in environment or (_number(environment, "SLURM_NTASKS") or 1) == 1:
            return None
        raise UserError(
            f"This SLURM job has {environment['SLURM_NTASKS']} tasks, but this process was not started by srun: "
            "put `srun` before the command, or say --processes 1 for a process on its own."
        )
    if tasks == 1:
        return _Found(processes=1)
    needed = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    job, task, local, _ = (_required(environment, name, "SLURM") for name in needed)
    first = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", environment["SLURM_STEP_NODELIST"])
    if first is None:
        raise UserError(
            f"SLURM_STEP_NODELIST is {environment['SLURM_STEP_NODELIST']!r}: no list of nodes."
        )
    step = environment.get("SLURM_STEP_ID", "0")
    # Choose a port below those that the system assigns by itself, and another one for each step.
    port = 10000 + (int(job) + 101 * (int(step) if step.isdigit() else 0)) % 20000
    shared = (_number(environment, "SLURM_STEP_NUM_NODES") or 1) < tasks
    host = "".join(part or "" for part in first.groups())
    return _Found(f"{host}:{port}", tasks, int(task), int(local) if shared else None)


def _open_mpi(environment: Mapping[str, str]) -> _Found | None:
    """Detect a rank of Open MPI. Its variables do not tell ranks on other hosts where rank 0 is."""
    size = _number(environment, "OMPI_COMM_WORLD_SIZE")
    if size is None or size == 1:
        return None if size is None else _Found(processes=1)
    names = ("RANK", "LOCAL_RANK", "LOCAL_SIZE")
    rank, local, local_size = (
        int(_required(environment, f"OMPI_COMM_WORLD_{name}", "Open MPI")) for name in names
    )
    coordinator = None
    if local_size == size:
        job = environment.get("PMIX_NAMESPACE", environment.get("OMPI_MCA_ess_base_jobid", ""))
        coordinator = f"127.0.0.1:{10000 + zlib.crc32(job.encode()) % 20000}"
    hint = f"With Open MPI on several hosts: mpirun -x {_COORDINATOR}=HOST_OF_RANK_0:12345 ... "
    return _Found(coordinator, size, rank, local if local_size > 1 else None, hint)


def _own_devices(environment: Mapping[str, str], found: _Found) -> tuple[int, ...] | None:
    """Choose this process's device among those of its host, unless the launcher shows it only one device."""
    listed = environment.get(_DEVICES)
    if listed:
        if not re.fullmatch(r"\d+(,\d+)*", listed):
            raise UserError(
                f"{_DEVICES} is {listed!r}, but must be numbers of devices such as 0,1."
            )
        return tuple(map(int, listed.split(",")))
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    shown_one = len(visible) == 1 and visible[0] != ""
    return None if found.local is None or shown_one else (found.local,)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None or value == "":
        return None
    if not value.isdigit():
        raise UserError(f"{name} is {value!r}, but must be a whole number.")
    return int(value)


def _required(environment: Mapping[str, str], name: str, launcher: str) -> str:
    if not environment.get(name):
        raise UserError(
            f"{launcher} started this process as one of several, but {name} is not set: "
            f"give --coordinator, --processes and --process, or --processes 1 for a process on its own."
        )
    if name != "SLURM_STEP_NODELIST":
        _number(environment, name)
    return environment[name]

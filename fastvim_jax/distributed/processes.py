"""Coordinate several processes: run an action once, fail together, wait for each other, gather sets."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from fastvim_jax.distributed.start import joined
from fastvim_jax.distributed.watch import lost_message
from fastvim_jax.errors import UserError
from fastvim_jax.version import __version__

_MESSAGE = 4096  # bytes
_LAST_WORDS = 3.0  # seconds
_LONGEST_TRACE = 3_600_000  # milliseconds: process 0 may still read its first batch
_VALUE = re.compile(r"%\w+")
_TOGETHER = re.compile(r"stablehlo\.(all_|collective_|reduce_scatter)|sdy\.")
_programs = itertools.count()
_PEER_GONE = re.compile(
    r"gloo|nccl|connection reset by peer|connection refused|broken pipe|socket closed|heartbeat|coordination service",
    re.IGNORECASE,
)


def is_first_process() -> bool:
    """Return whether this process writes the logs and the files that all processes share."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def on_first_process(action: Callable[[], None]) -> None:
    """Run `action` in process 0 only. The other processes wait for it, and raise if it raises.

    Raises:
        Exception: in process 0, what the action raised; in the others, a UserError with the same message.
    """
    if jax.process_count() == 1:
        action()
        return
    failure: Exception | None = None
    if is_first_process():
        try:
            action()
        except Exception as error:  # Whatever it is, the others must not wait forever.
            failure = error
    # Padded with spaces: all processes have to offer the same shape.
    text = ("" if failure is None else str(failure) or type(failure).__name__).encode()
    message = np.frombuffer(text[:_MESSAGE].ljust(_MESSAGE), np.uint8)
    said = np.asarray(multihost_utils.broadcast_one_to_all(message)).tobytes()
    if failure is not None:
        raise failure
    if said.strip():
        raise UserError(said.decode(errors="ignore").strip())


def arrays_of_first_process(
    make: Callable[[], Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Run `make` in process 0 only, and return its arrays in every process.

    Raises:
        Exception: see `on_first_process`.
    """
    if jax.process_count() == 1:
        return dict(make())
    packed = io.BytesIO()
    on_first_process(lambda: np.savez(packed, **make()))  # type: ignore[arg-type]
    size = int(multihost_utils.broadcast_one_to_all(np.int32(packed.tell())))
    content = np.frombuffer(packed.getvalue().ljust(size), np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes()
    with np.load(io.BytesIO(received), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def require_same(values: Mapping[str, Any]) -> None:
    """Compare JSON-able values with those of the first process.

    Processes that disagree about the course of a run would wait for each other in different places, on GPUs forever.

    Raises:
        UserError: in a process whose values differ; the message names them.
    """
    if jax.process_count() == 1:
        return
    ours = json.dumps(values)
    theirs = arrays_of_first_process(lambda: {"values": np.asarray(ours)})["values"].item()
    here, there = json.loads(ours), json.loads(theirs)
    different = [
        f"{name}: {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    if different:
        raise UserError(
            f"process {jax.process_index()} was given another run than process 0:\n  "
            + "\n  ".join(different)
            + "\nGive all processes the same command and the same data."
        )


def share_folder(folder: Path | None, *, patience: float = 0.0, sure: bool = False) -> bool:
    """Return whether all processes see the same folder: the first one puts a file into it, and the others look for it.

    Args:
        folder: the folder, by the name that it has for this process; made if need be. None: this process has none.
        patience: seconds in which the file may become visible on other hosts.
        sure: whether this process need not look.
    """
    if jax.process_count() == 1:
        return True
    name = arrays_of_first_process(lambda: {"name": np.asarray(f".shared-{uuid4().hex}")})["name"]
    mark = None if folder is None else folder / name.item()
    if mark is not None and is_first_process():
        with contextlib.suppress(OSError):  # Then nobody finds it.
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    barrier("shared folder")
    end = time.monotonic() + patience
    # os.path.exists says no where Path.exists may raise, and the others would wait for this process.
    while mark is not None and not os.path.exists(mark) and time.monotonic() < end:
        time.sleep(0.1)
    alike = not on_any_process(not (sure or (mark is not None and os.path.exists(mark))))
    if mark is not None and is_first_process():
        mark.unlink(missing_ok=True)
    return alike


def require_same_program(name: str, text: str) -> None:
    """Compare a lowered program with that of the first process: what its devices do together, in which order.

    Processes whose devices sum in different orders, or over different groups, wait for each other forever. No device
    takes part in the comparison. Numbers of values may differ, and kernels, which hold paths of the host.

    Args:
        name: what the program does, for the message.
        text: the program (`jax.stages.Lowered.as_text`).

    Raises:
        UserError: in a process whose program differs.
    """
    if jax.process_count() == 1:
        return
    together = [_VALUE.sub("%", line) for line in text.splitlines() if _TOGETHER.search(line)]
    ours = hashlib.sha256("\n".join(together).encode()).hexdigest()
    coordinator: Any = distributed.global_state.client
    key = f"fastvim/program/{next(_programs)}"
    if is_first_process():
        coordinator.key_value_set(key, ours)
    elif coordinator.blocking_key_value_get(key, _LONGEST_TRACE) != ours:
        raise UserError(
            f"process {jax.process_index()} made another {name} than process 0: its devices would wait for the others "
            f"forever. Give all hosts the same versions of all packages (here fastvim_jax {__version__}, JAX "
            f"{jax.__version__}). If they have, the model's own code depends on the order of a set: set "
            "PYTHONHASHSEED=0 for all processes."
        )


def fail_at_once(status: int, last_words: str = "") -> None:
    """Print `last_words` and end this process with `status` now, if it is one of several; otherwise do nothing.

    A normal exit would wait minutes for the other processes, which may be waiting for this one. After an immediate exit
    the launcher ends them, or JAX does when it misses this process. The exit of process 0 ends the others at once, so
    process 0 first gives them the time to print their message.
    """
    launch = joined()
    if launch is None:
        return
    if last_words:
        print(last_words, file=sys.stderr, flush=True)
    if launch.process == 0:
        time.sleep(_LAST_WORDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def lost_process(error: Exception) -> str | None:
    """Say that another process of this run has ended, if `error` or what caused it tells this; return None for others.

    The cause counts because a collective operation may fail while a checkpoint is read, which then looks damaged.
    """
    launch = joined()
    if launch is None:
        return None
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, jax.errors.JaxRuntimeError | ValueError) and _PEER_GONE.search(
            str(each)
        ):
            message = lost_message(launch.process, launch.processes)
            return f"{message}\n({str(each).splitlines()[0][:200]})"
        each = each.__cause__ or each.__context__
    return None


def on_any_process(flag: bool) -> bool:
    """Return whether `flag` is set in any process. All processes must call this."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def all_gather_set(numbers: Iterable[int]) -> set[int]:
    """Return the union of all processes' sets of non-negative numbers."""
    own = np.array(sorted(set(numbers)), np.int32)
    if jax.process_count() == 1:
        return set(own.tolist())
    longest = int(np.max(multihost_utils.process_allgather(np.int32(own.size))))
    padded = np.full(longest, -1, np.int32)
    padded[: own.size] = own
    every = np.asarray(multihost_utils.process_allgather(padded)).ravel()
    return {int(number) for number in every if number >= 0}

"""Worker processes leave signals to their parent, stay between evaluations, and end with it however it ends."""

from __future__ import annotations

import functools
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import grain
import numpy as np
import pytest

from fastvim_jax.data import stream
from fastvim_jax.data.stream import WorkersEnded, grain_stream
from fastvim_jax.errors import UserError
from fastvim_jax.stop_signals import STOP_SIGNALS
from tests.support import ROOT

SCRIPT = """
import os, sys, time
from fastvim_jax.data import ClassificationData, make_eval_iterator

if __name__ == "__main__":
    config = ClassificationData(source="digits", image_size=8, channels=1, mean=(0.5,), std=(0.5,), workers=2)
    batches = make_eval_iterator(config, batch_size=64)
    for _ in range(2):
        count = sum(int(batch["valid"].sum()) for batch in batches)
        batches.rewind()
        print(count, flush=True)
        sys.stdin.readline()
"""


def _children(parent: int) -> dict[int, str]:
    """Process numbers and command lines of a process's children."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(status[1]) == parent and status[0] != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue
    return found


def _runs(pid: int) -> bool:
    """Tell whether a process runs; one that has ended may wait for its new parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_for_workers(run: subprocess.Popen[str]) -> set[int]:
    while run.poll() is None:
        found = {pid for pid, words in _children(run.pid).items() if "spawn_main" in words}
        if len(found) == 2:
            return found
        time.sleep(0.01)
    raise AssertionError(f"ended with status {run.returncode}")


def _send(workers: set[int]) -> None:
    for each in STOP_SIGNALS:
        for pid in workers:
            os.kill(pid, each)


@pytest.mark.drawn("data pipelines", one_in=6)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_stay_ignore_signals_and_end_with_their_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # where the resource tracker says what it frees
    ) as run:  # fmt: skip
        assert run.stdin and run.stdout
        left: set[int] = set()
        watch = threading.Timer(180, run.kill)  # so that a hang fails
        watch.start()
        try:
            first = _wait_for_workers(run)
            _send(first)  # while they start
            assert run.stdout.readline() == "360\n"
            left = set(_children(run.pid))
            _send(first)
            time.sleep(0.2)
            run.stdin.write("go on\n")
            run.stdin.flush()
            assert run.stdout.readline() == "360\n"
            again = {pid for pid, words in _children(run.pid).items() if "spawn_main" in words}
            assert again == first
            run.kill()
            run.wait()
            deadline = time.monotonic() + 30
            while alive := [pid for pid in left if _runs(pid)]:
                assert time.monotonic() < deadline, alive
                time.sleep(0.1)
        finally:
            watch.cancel()
            run.kill()
            for pid in left:
                if _runs(pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes of shared memory, as a test sets them."""
    found = {"bytes": 0}
    usage = lambda folder: SimpleNamespace(free=found["bytes"], total=2**30)  # noqa: E731
    monkeypatch.setattr(stream.shutil, "disk_usage", usage)
    monkeypatch.setattr(stream, "_claims", weakref.WeakSet())
    monkeypatch.setattr(stream, "_not_started", weakref.WeakSet())
    monkeypatch.setattr(stream, "_read_ahead", lambda *_: iter([{"image": 0}]))
    return found


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_shared_memory_is_enough_for_all_streams(free: dict[str, int]) -> None:
    """Refuse streams that need more shared memory than is free.

    Two workers with one or two batches waiting in each hold 6 or 8 MiB.
    """
    one = grain.MapDataset.source([0])
    make = functools.partial(grain_stream, one, 2, batch_bytes=2**20)
    free["bytes"] = 5 * 2**20
    with pytest.raises(UserError, match="need 6 MiB of shared memory.* has 5 MiB free: use fewer"):
        make()
    free["bytes"] = 13 * 2**20
    assert stream.describe_shared_memory() is None
    training = make()
    with pytest.raises(UserError, match="beside the 8 MiB of this run's other streams: use fewer"):
        make()
    free["bytes"] = 14 * 2**20
    evaluation = make()
    # A stream that has started has taken its part from what is free.
    assert next(training(0)) == {"image": 0}
    free["bytes"] = 11 * 2**20
    with pytest.raises(UserError, match="other streams"):
        make()
    free["bytes"] = 12 * 2**20
    last = make()
    assert stream.describe_shared_memory() == (
        "Data workers hold up to 20 MiB of batches in /dev/shm, which has 1,024 MiB."
    )
    del evaluation, last, training  # Whatever nobody holds needs no memory.
    gc.collect()
    free["bytes"] = 6 * 2**20
    make()
    assert grain_stream(one, 2) and grain_stream(one, 0, batch_bytes=10**9)


def test_a_worker_killed_while_it_starts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report a worker killed while it starts, however much work it was to be given.

    A pipe holds 64 kB, and nobody empties it any more.
    """
    from multiprocessing import util

    spawn = util.spawnv_passfds

    def spawn_and_kill(path: str, arguments: list[str], *rest: object) -> int:
        pid = spawn(path, arguments, *rest)
        if any("spawn_main" in str(argument) for argument in arguments):
            os.kill(pid, signal.SIGKILL)
        return pid

    def hangs(*_: object) -> None:
        raise AssertionError("hangs")

    monkeypatch.setattr(util, "spawnv_passfds", spawn_and_kill)
    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, 60, 1)  # again, because closing the pipe would write again
    try:
        batches = grain.MapDataset.source([{"image": np.zeros(2**18, np.uint8)}])
        with pytest.raises(WorkersEnded, match=r"exit code -9 \(SIGKILL"):
            next(grain_stream(batches, 1)(0))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.drawn("data pipelines", one_in=6)
def test_semaphores_of_closed_streams_do_not_pile_up():
    """Count them without the collector, which would free them by chance while others are made: then they leak."""
    from multiprocessing.synchronize import SemLock

    numbers = grain.MapDataset.range(4).map(lambda i: {"x": np.asarray(i)})
    counts = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            assert [int(batch["x"]) for batch in grain_stream(numbers, 2)(0)] == [0, 1, 2, 3]
            counts.append(sum(isinstance(each, SemLock) for each in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[0] == counts[1]

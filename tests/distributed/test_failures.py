"""An error in one of several processes ends all of them soon, with its message."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from PIL import Image

from fastvim_jax.distributed import Launch, Watch, lost_process, start
from fastvim_jax.distributed import watch as module
from fastvim_jax.errors import UserError
from tests.distributed.two import end_of_both, free_address
from tests.support import ROOT


@pytest.mark.drawn("processes and devices", one_in=6)
@pytest.mark.slow
def test_a_corrupt_record_in_one_process_ends_both(tmp_path, rng):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "images" / "train" / "cat" / "3.png").write_bytes(b"no image")
    command = [
        sys.executable, "-m", "fastvim_jax", "train", "your_images/fastvim",
        "--run-dir", str(tmp_path / "run"), "--data.path", str(tmp_path / "images"),
        "--model.num-classes", "2", "--model.image-size", "16", "--data.image-size", "16",
        "--model.embed-dim", "16", "--model.depth", "1", "--data.batch-size", "8",
        "--coordinator", free_address(), "--processes", "2",
    ]  # fmt: skip
    commands = [[*command, "--process", str(process)] for process in range(2)]
    statuses, outputs = end_of_both(commands, [{}, {}], cwd=tmp_path)
    told = [status == 1 and "3.png" in out for status, out in zip(statuses, outputs, strict=True)]
    assert any(told) and all(statuses), "\n".join(outputs)


LOST = """
import sys, time
from fastvim_jax.distributed import initialize_distributed, start_watch
start_watch(initialize_distributed(sys.argv[1], 3, int(sys.argv[2])))
print("up", flush=True)
time.sleep(300)
"""


@pytest.mark.drawn("processes and devices", one_in=6)
@pytest.mark.slow
def test_the_others_tell_that_a_process_was_killed(rng):
    """Tell the other processes that one was killed.

    The death of process 0 is the hardest, because JAX aborts the others at once.
    """
    at = int(rng.integers(3))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOST, address, str(i)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(3)
    ]
    try:
        for process in processes:
            assert any(line == "up\n" for line in process.stdout)
        processes[at].kill()
        processes.pop(at).communicate()
        said = [process.communicate(timeout=25)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [75, 75], "\n".join(said)
    assert all("lost another process of this run" in text for text in said), "\n".join(said)


@pytest.fixture
def watches() -> Iterator[tuple[list[Watch], queue.Queue[int]]]:
    """Connect watches of four processes, and yield them with a queue of those that are told of a loss."""
    told: queue.Queue[int] = queue.Queue()
    watches = [Watch(functools.partial(told.put, i), grace=0.05) for i in range(4)]
    listener, token = socket.create_server(("127.0.0.1", 0)), os.urandom(16)
    address = listener.getsockname()
    works = [threading.Thread(target=watches[0].serve, args=(listener, token, 3))]
    works += [
        threading.Thread(target=w.listen, args=(w.join(address, token),)) for w in watches[1:]
    ]
    for work in works:
        work.start()
    # A stranger is not taken for a process.
    with socket.create_connection(address) as stranger:
        stranger.sendall(os.urandom(16))
    until = time.monotonic() + 10
    while len(watches[0]._connections) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    yield watches, told
    for watch in watches:
        watch.leave()
        cut(watch)
    for work in works:
        work.join(10)


def cut(watch: Watch) -> None:
    """Shut down the connections of a process, as the system does when it ends."""
    for connection in tuple(watch._connections):
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


class Coordinator:
    """Stands for JAX's coordinator: keeps a value and lets all pass."""

    def key_value_set_bytes(self, key: str, value: bytes) -> None:
        self.value = value

    def blocking_key_value_get_bytes(self, key: str, timeout: int) -> bytes:
        return self.value

    def wait_at_barrier(self, key: str, timeout: int) -> None:
        pass


def test_devices_connect_when_the_watch_starts(monkeypatch):
    """Connect them also where a firewall lets nobody watch: the others wait for this process's devices."""
    coordinator, connected = Coordinator(), []
    monkeypatch.setattr(module.distributed.global_state, "client", coordinator)
    monkeypatch.setattr(module.multihost_utils, "sync_global_devices", connected.append)
    monkeypatch.setattr(module, "_watches", [])
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for process in range(3):
        if process == 2:
            coordinator.value = coordinator.value[:16] + port.to_bytes(4, "big")
        module.start_watch(Launch("127.0.0.1:1", 2, process))
        assert len(connected) == process + 1
    assert [len(each._connections) for each in module._watches[1:]] == [1, 0]
    module.leave_watch()


@pytest.mark.parametrize("lost", [0, 2])
def test_the_loss_of_a_process_is_told_to_all_others(watches, lost):
    processes, told = watches
    processes[lost]._left = True  # It has ended: it is not told.
    cut(processes[lost])
    assert {told.get(timeout=10) for _ in range(3)} == {0, 1, 2, 3} - {lost}


def test_a_process_that_says_goodbye_is_not_taken_for_lost(watches):
    processes, told = watches
    for watch in reversed(processes):
        watch.leave()
        cut(watch)
    with pytest.raises(queue.Empty):
        told.get(timeout=0.5)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("INTERNAL: Gloo all-reduce failed: [pair.cc:538] Connection reset by peer", True),
        ("NCCL operation ncclGroupEnd() failed: remote process exited", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", False),
    ],
)
def test_errors_of_collectives_are_told_from_others(monkeypatch, text, lost):
    error = UserError("The checkpoint 20 is damaged: it could not be read together.")
    error.__cause__ = jax.errors.JaxRuntimeError(text)
    assert lost_process(error) is None  # This process is alone.
    monkeypatch.setattr(start, "_joined", [Launch("head:1", 4, 2)])
    found = lost_process(error)
    assert (found is not None) == lost
    assert found is None or "continues from the latest checkpoint" in found

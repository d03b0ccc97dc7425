"""An error in one of several processes ends all of them soon, with its message."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from fastvim_jax.distributed import lost_process
from fastvim_jax.errors import UserError
from tests.support import ROOT


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable, "-m", "fastvim_jax", "train", "your_images/fastvim",
        "--run-dir", str(tmp_path / "run"), "--data.path", str(tmp_path / "images"),
        "--model.num-classes", "2", "--model.image-size", "16", "--data.image-size", "16",
        "--model.embed-dim", "16", "--model.depth", "1", "--data.batch-size", "8",
        "--coordinator", address, "--processes", "2",
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            [*command, "--process", str(process)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    statuses = [process.returncode for process in processes]
    told = [status == 1 and "3.png" in out for status, out in zip(statuses, outputs, strict=True)]
    assert any(told) and all(statuses), "\n".join(outputs)


LOST = """
import os, sys
import jax
from fastvim_jax.distributed import all_gather_set, initialize_distributed, lost_process
initialize_distributed(sys.argv[1], 2, int(sys.argv[2]))
all_gather_set({1})
if sys.argv[2] == "1":
    os._exit(9)
try:
    for _ in range(1000):
        all_gather_set({1})
except Exception as error:
    print(lost_process(error))
    sys.stdout.flush()
os._exit(3)
"""


@pytest.mark.slow
def test_the_death_of_a_process_is_told_by_the_others():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", LOST, address, str(i)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    )
    try:
        said = first.communicate(timeout=200)[0]
    finally:
        first.kill()
        second.kill()
        second.communicate()
    assert first.returncode == 3 and "lost another process of this run" in said, said


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
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    found = lost_process(error)
    assert (found is not None) == lost
    assert found is None or "continues from the latest checkpoint" in found

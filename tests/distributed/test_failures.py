"""An error in one of several processes ends all of them soon, with its message."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

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

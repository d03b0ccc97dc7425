"""No kernel reads or writes out of bounds, says compute-sanitizer on a real Hopper GPU; skipped where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from pallas_kernels import gpu
from tests.support import ROOT

pytestmark = [
    pytest.mark.skipif(
        jax.__version_info__ < gpu.OLDEST_JAX or jax.default_backend() != "gpu",
        reason="no GPU that the kernels run on",
    ),
    pytest.mark.skipif(
        shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed"
    ),
]


SHARES = 6  # processes side by side: starting and compiling take most of the time


def test_every_access_is_in_bounds():
    from tests.gpu.sanitized import cases

    # An array from an allocation of its own: in JAX's pool, what lies beyond its end is somebody's, and allowed.
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer=",
    }
    tool = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    tool += ["--kernel-name", "kernel_substring=mosaic_gpu"]  # ours alone: minutes less
    commands = [
        [*tool, sys.executable, "-m", "tests.gpu.sanitized", str(i), str(SHARES)]
        for i in range(SHARES)
    ]

    def report(command: list[str]) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        text = done.stdout + done.stderr
        assert done.returncode == 0, text[-8000:]
        assert "ERROR SUMMARY: 0 errors" in text
        return text

    with ThreadPoolExecutor(SHARES) as pool:
        reports = "".join(pool.map(report, commands))
    assert reports.count("\nran ") == len(list(cases(np.random.default_rng(0))))

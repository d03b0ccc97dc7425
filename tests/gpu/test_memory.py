"""No kernel reads or writes out of bounds, says compute-sanitizer on a real Hopper GPU; skipped where there is none."""

from __future__ import annotations

import os
import shutil
import signal
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


PROCESSES = max(6, (os.cpu_count() or 2) - 2)  # Starting and compiling take most of the time.
CRASHED = (-signal.SIGSEGV, 128 + signal.SIGSEGV)


def test_every_access_is_in_bounds():
    from tests.gpu.sanitized import cases

    # An array from an allocation of its own: in JAX's pool, what lies beyond its end is somebody's, and allowed.
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer=",
        "PYTHONFAULTHANDLER": "1",
    }
    number = len(list(cases(np.random.default_rng(0))))
    tool = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    # Leave out the processes that XLA starts, such as the assembler.
    tool += ["--target-processes", "application-only"]
    tool += ["--kernel-name", "kernel_substring=mosaic_gpu"]  # ours alone: minutes less

    def fault_of(case: int) -> str | None:
        """Return what is wrong with one case, or None.

        Of 22 starts 4 crashed before a kernel ran, and once one hung while it compiled: start such a case again.
        """
        command = [*tool, sys.executable, "-m", "tests.gpu.sanitized", str(case), str(number)]
        for _ in range(5):
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
                )
            except subprocess.TimeoutExpired:
                text, status = "it did not end within 120 s", "none"
                continue
            text, status = done.stdout + done.stderr, done.returncode
            if done.returncode not in CRASHED or "\nran " in text or "Invalid" in text:
                break
        else:
            return f"case {case}, status {status} at the last of 5 starts: {text[-2000:]}"
        if status == 0 and "ERROR SUMMARY: 0 errors" in text and text.count("\nran ") == 1:
            return None
        return f"case {case}, status {status}: {text[-2000:]}"

    with ThreadPoolExecutor(PROCESSES) as pool:
        faults = [fault for fault in pool.map(fault_of, range(number)) if fault]
    assert not faults, f"{len(faults)} of {number} cases failed:\n\n" + "\n\n".join(faults)

"""The operations under a sharded `jit`: `sharded_*.py`, in a process of its own with eight simulated devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = [str(HERE / f"sharded_{name}.py") for name in ("scans", "cores", "models")]


@pytest.mark.drawn
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(which):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    options = ["-q", "-p", "no:cacheprovider", "-m", which]
    command = [sys.executable, "-m", "pytest", *options, *CASES]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-30000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

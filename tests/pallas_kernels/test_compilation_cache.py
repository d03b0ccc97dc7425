"""A program for several devices that holds kernels is compiled once: a second process finds it in JAX's cache."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.pallas_kernels.mosaic_support import needs_mosaic
from tests.support import ROOT


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
def test_a_second_process_compiles_nothing(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "tests.pallas_kernels.cached_program"]
    entries = []
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        entries.append([path.name for path in tmp_path.glob("jit_on_two_devices-*-cache")])
    assert len(entries[0]) == 1 and entries[0] == entries[1]

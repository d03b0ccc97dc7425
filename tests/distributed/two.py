"""Run two processes side by side."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import ROOT

PROCESSES = [
    {"JAX_PROCESS_ID": str(process), "PYTHONHASHSEED": seed} for process, seed in enumerate("03")
]
"""Environments of two processes. In a set of each, the mesh's axes "data" and "fsdp" have another order."""


def free_address() -> str:
    """Return an address of this machine for the coordinator."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def end_of_both(
    commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], **options: Any
) -> tuple[list[int], list[str]]:
    """Run two commands at once. Return their statuses, and what each printed."""
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def run_two(program: str, *arguments: str) -> list[str]:
    """Run a program of this folder twice. Return what each process printed; both must end well."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": free_address(),
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    each = [{**settings, **process} for process in PROCESSES]
    statuses, outputs = end_of_both([command] * 2, each)
    assert statuses == [0, 0], "\n".join(outputs)
    return outputs

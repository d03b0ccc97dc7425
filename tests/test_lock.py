"""One process at a time in a run folder, and none shut out by a dead one."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastvim_jax.errors import UserError
from fastvim_jax.lock import locked
from tests.support import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from fastvim_jax.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_by_name_until_it_dies(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, locked(tmp_path):
            pass
        message = str(caught.value)
        assert f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}" in message
        assert "wait until it ends, or choose another run folder" in message
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with locked(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / "lock").read_text()


def test_it_is_released_with_the_block_also_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with (
        locked(tmp_path),
        pytest.raises(UserError, match=f"process {os.getpid()} "),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        assert f"{tmp_path} cannot be locked (No locks available)" in caplog.text


def test_nothing_of_a_folder_that_cannot_be_locked_is_hidden(tmp_path):
    with pytest.raises(FileNotFoundError), locked(Path(tmp_path / "missing")):
        pass

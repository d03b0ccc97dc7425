"""A disk that is full: the run stops and says so, its last good checkpoint is whole, and with room again it goes on.

No file of the process may grow beyond a limit (RLIMIT_FSIZE), so that the real writes of Orbax, TensorStore and
the log fail. The rest of the disk stays as it is, for the machine's sake.
"""

import asyncio
import errno
import gc
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from fastvim_jax.errors import UserError
from fastvim_jax.training import load_run, read_metrics, train
from fastvim_jax.training.disk import explain_write_errors, replace_file, why_not_written
from fastvim_jax.training.late_results import drop_late_results
from fastvim_jax.training.metrics import RunLog
from tests.support import ROOT
from tests.training.compare_runs import steps_of
from tests.training.tiny import STEPS_PER_EPOCH, tiny_config, tiny_model

CONFIG = tiny_config(model=tiny_model(depth=1), keep_checkpoints=1)

# After the first checkpoint the limit falls below the size of a checkpoint's largest file.
SCRIPT = """
import resource, sys
from pathlib import Path
from fastvim_jax.cli.main import main
from fastvim_jax.training.checkpoints import Checkpoints

save, count = Checkpoints.save, iter(range(9))

def limited(self, *arguments):
    self.wait()
    if next(count) == 1:
        largest = max(p.stat().st_size for p in self.directory.rglob("*") if p.is_file())
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, resource.RLIM_INFINITY))
    return save(self, *arguments)

Checkpoints.save = limited
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def file_size(limit):
    """Let no file of this process grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.drawn("trainings", one_in=6)
def test_a_checkpoint_that_does_not_fit_stops_the_run_and_the_last_one_stands(tmp_path):
    experiment, folder = tmp_path / "experiment.py", tmp_path / "run"
    experiment.write_text(
        "from fastvim_jax.training import TrainConfig\n"
        f"config = TrainConfig.from_json({CONFIG.to_json()!r})\n"
    )
    # No cache of compiled programs: the limit would leave cut-off entries there.
    settings = {key: value for key, value in os.environ.items() if "CACHE" not in key}
    settings |= {"PYTHONPATH": str(ROOT), "FASTVIM_COMPILATION_CACHE": "off"}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, "train", str(experiment), "--run-dir", str(folder)],
        env=settings,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1, ended.stderr
    # Neither ours nor the checkpoint library's, whose other files report to an event loop that has ended.
    assert "Traceback" not in ended.stderr and "Error" not in ended.stderr, ended.stderr
    assert "The checkpoint of step 8 could not be written: a file would exceed" in ended.stderr
    assert f"Last good checkpoint: step 4 in {folder / 'checkpoints' / '4'}" in ended.stderr
    assert "give the same command again" in ended.stderr
    assert steps_of(folder) == [4] and load_run(folder).step == 4
    assert not [p for p in (folder / "checkpoints").iterdir() if "tmp" in p.name]

    assert train(CONFIG, folder, progress=False).step == 2 * STEPS_PER_EPOCH
    assert [line["step"] for line in read_metrics(folder, "train")] == [*range(3, 22, 3), 22]


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        ('OUT_OF_RANGE: Error writing "w/0.0" in OCDBT database', False),
        ("another error", True),
    ],
)
def test_failed_writes_that_nobody_asks_for_are_not_logged(caplog, error, logged):
    """Log none of them: the checkpoint's own message says what is wrong."""
    drop_late_results()

    async def forget():
        asyncio.get_running_loop().create_future().set_exception(ValueError(error))
        task = asyncio.create_task(fail())
        await asyncio.wait([task])

    async def fail():
        raise ValueError(error)

    asyncio.run(forget())
    gc.collect()
    for kind in ("Future", "Task"):
        assert (f"{kind} exception was never retrieved" in caplog.text) == logged


def test_a_log_that_does_not_fit_says_so_and_keeps_its_whole_lines(tmp_path):
    with (
        pytest.raises(UserError) as caught,
        RunLog(tmp_path, step=0, total_steps=9, progress=False) as log,
        file_size(500),
    ):
        for step in range(1, 100):
            log.write("train", step, {"loss": 1 / step})
    path = tmp_path / "metrics.jsonl"
    assert f"{path} could not be written: a file would exceed the size" in str(caught.value)
    assert "the run continues from its last good checkpoint" in str(caught.value)
    records = read_metrics(tmp_path)
    assert len(records) > 2
    assert [r["loss"] for r in records] == [1 / r["step"] for r in records]
    # Where there is no room to begin with, the log of before stands.
    before = path.read_bytes()
    with pytest.raises(UserError, match="could not be written"), file_size(100):
        RunLog(tmp_path, step=50, total_steps=9, progress=False)
    assert path.read_bytes() == before
    with RunLog(tmp_path, step=2, total_steps=9, progress=False) as log:
        log.write("train", 3, {"loss": 1 / 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "writing there is not permitted"),
    ],
)
def test_causes_are_told_apart_also_when_wrapped(tmp_path, number, cause):
    try:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise ValueError("commit failed") from error
    except ValueError as error:
        assert why_not_written(error, tmp_path / "not" / "there").startswith(f"{cause} (")
    assert why_not_written(ValueError("odd\nmore"), tmp_path) == "ValueError: odd"


def test_a_folder_that_cannot_be_made_is_no_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written: NotADirectoryError"):
        train(CONFIG, tmp_path / "file" / "run", progress=False)
    with explain_write_errors(tmp_path):
        pass


def test_a_small_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    """Write a small file to the disk before it replaces another.

    Otherwise a power cut leaves an empty file under the name.
    """
    path, synced = tmp_path / "config.json", []
    path.write_text("old")
    replace = os.replace

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_size)

    def replace_synced(source, target):
        assert synced == [3] and path.read_text() == "old"
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_synced)
    replace_file(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["config.json"]

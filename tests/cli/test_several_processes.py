"""However a command ends in one of several processes, it ends at once: the others may wait for it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import fastvim_jax.cli as cli
from fastvim_jax import distributed
from fastvim_jax.cli import eval, eval_detection, eval_segmentation
from fastvim_jax.cli.join import join_processes
from fastvim_jax.cli.main import main
from fastvim_jax.distributed import Launch, Watch, leave_watch, processes, start, watch
from fastvim_jax.errors import UserError


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def second_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be the second of three, without devices: they may have failed to start."""

    def end(status: int) -> None:
        raise Ended(status)

    def no_devices(*_: object) -> int:
        raise RuntimeError("no device")

    monkeypatch.setattr(start, "_joined", [Launch("head:1", 3, 1)])
    monkeypatch.setattr(os, "_exit", end)
    for name in ("process_count", "process_index", "devices"):
        monkeypatch.setattr(jax, name, no_devices)
    monkeypatch.setenv("FASTVIM_COMPILATION_CACHE", "off")


@pytest.mark.parametrize(
    ("error", "arguments", "status", "said"),
    [
        (UserError("no such file"), [], 1, "fastvim: no such file"),
        (UserError("no such file"), ["--traceback"], 1, "Traceback"),
        (KeyboardInterrupt(), [], 130, "fastvim: interrupted"),
        (KeyboardInterrupt(), ["--traceback"], 130, "Traceback"),
        (ZeroDivisionError("by 0"), [], 1, "ZeroDivisionError: by 0"),
        (BrokenPipeError(), [], 1, ""),
        (RuntimeError("no device"), [], 1, "no device"),
        (jax.errors.JaxRuntimeError("Gloo: Connection closed by peer"), [], 75, "process 1 of 3 lost"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("second_of_three")
def test_an_error_ends_the_process_at_once(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: BaseException,
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    def run(_: object) -> int:
        raise error

    monkeypatch.setattr("fastvim_jax.cli.models.run", run)
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # of the case BrokenPipeError
    with pytest.raises(Ended) as ended:
        main(["models", *arguments])
    assert ended.value.args == (status,)
    assert said in capfd.readouterr().err


@pytest.mark.usefixtures("second_of_three")
def test_a_signal_before_training_ends_the_process_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """End it, because the others wait for it with the first thing that all do together."""
    monkeypatch.setattr("fastvim_jax.cli.train.run", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Ended) as ended:
        main(["train", "x"])
    assert ended.value.args == (75,)
    assert "SIGTERM: stopped before training began" in capfd.readouterr().err


def test_process_0_leaves_the_others_time_for_their_message(
    monkeypatch: pytest.MonkeyPatch, second_of_three: None
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(processes.time, "sleep", slept.append)
    for process in (1, 0):
        monkeypatch.setattr(start, "_joined", [Launch("head:1", 3, process)])
        with pytest.raises(Ended):
            processes.fail_at_once(1)
    assert slept == [3.0]
    monkeypatch.setattr(start, "_joined", [])
    processes.fail_at_once(1)  # This process is alone.


def test_a_command_that_ends_well_watches_until_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[bool] = []
    mine = Watch(lambda: None, meet=lambda: left.append(mine._left))
    monkeypatch.setattr(watch, "_watches", [mine])
    monkeypatch.setattr("fastvim_jax.cli.models.run", lambda _: 7)
    assert main(["models"]) == 7
    assert left == [False] and mine._left
    leave_watch()
    assert left == [False]


@pytest.mark.parametrize("command", [eval, eval_detection, eval_segmentation])
def test_evaluations_watch_the_other_processes(monkeypatch: pytest.MonkeyPatch, command) -> None:
    def watched(launch: Launch | None) -> None:
        raise Ended(launch)

    monkeypatch.setattr(distributed, "initialize_distributed", lambda *_: Launch("head:1", 2, 0))
    monkeypatch.setattr(distributed, "start_watch", watched)
    monkeypatch.setattr(command, "parse", lambda *_: None)
    monkeypatch.setattr(cli.eval, "_arguments", lambda _: None)
    with pytest.raises(Ended, match="head:1"):
        command.run(["a-run"])


@pytest.mark.parametrize(
    ("backend", "others_find_it", "kept"),
    [("gpu", True, True), ("gpu", False, False), ("cpu", False, True)],
)
def test_gpus_use_a_compilation_cache_only_if_all_processes_do(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    backend: str,
    others_find_it: bool,
    kept: bool,
) -> None:
    """Otherwise one process compiles a program and waits for those that found it, for a day."""
    marks: list[bool] = []

    def on_any_process(mine: bool) -> bool:
        marks.append(any(tmp_path.glob("cache/.shared-*")))
        return mine or not others_find_it

    monkeypatch.setattr(distributed, "initialize_distributed", lambda *_: Launch("head:1", 2, 0))
    monkeypatch.setattr(distributed, "start_watch", lambda _: None)
    monkeypatch.setattr(processes, "on_any_process", on_any_process)
    monkeypatch.setattr(processes, "arrays_of_first_process", lambda make: make())
    monkeypatch.setattr(processes, "barrier", lambda name: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update(names[0], str(tmp_path / "cache"))
        jax.config.update(names[1], True)
        join_processes()
        assert jax.config.jax_enable_compilation_cache == kept
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()
    assert marks == ([True] if backend == "gpu" else [])
    assert not any(tmp_path.glob("cache/.shared-*"))
    assert ("not all processes share" in capfd.readouterr().err) != kept

"""Help is quick; bad input is answered in a sentence with the right status; tracebacks only when asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastvim_jax.cli import compilation_cache
from fastvim_jax.cli.main import COMMANDS, main
from fastvim_jax.cli.usage import parse
from fastvim_jax.errors import UserError, counted
from fastvim_jax.training import RunResult, Stopped
from fastvim_jax.training.metrics import RunLog
from tests.cli.conftest import Cli


def test_numbers_agree_with_their_nouns_and_verbs():
    assert [counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert [counted(n, "class has", "classes have") for n in (1, 2)] == [
        "1 class has",
        "2 classes have",
    ]


def _shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastvim_jax", *arguments],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_help_needs_no_jax() -> None:
    program = (
        "import sys; from fastvim_jax.cli.main import main; status = main(['--help'])\n"
        "heavy = [m for m in ('jax', 'flax', 'grain', 'tyro', 'numpy') if m in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy or status else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


def test_warnings_begin_like_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begin with the command's name, not with the module's, where Orbax was imported."""
    monkeypatch.setattr(logging.root, "handlers", [])
    assert main(["plot", "no-such-run"]) != 0
    capsys.readouterr()
    logging.basicConfig()  # As Orbax does.
    logging.getLogger("fastvim_jax.training.run_folder").warning("weights of step %d", 3)
    assert capsys.readouterr().err == "fastvim: weights of step 3\n"


def test_the_module_is_the_command() -> None:
    done = _shell("--version")
    assert done.returncode == 0 and done.stdout.startswith("fastvim ")
    done = _shell("modles")
    assert done.returncode == 2 and "Did you mean 'models'?" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(fastvim: Cli, command: str) -> None:
    status, out, _ = fastvim(command, "--help")
    assert status == 0 and f"fastvim {command}" in out
    # The help says in words what happens without an option.
    assert not re.search(r"\(default: (None|'')?\s*\)", out)


@dataclasses.dataclass
class TwoLines:
    value: int = 0
    """One sentence
    over two lines of source."""


def test_help_breaks_no_line_where_the_source_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(TwoLines, "any", ["--help"], "")
    assert "One sentence over two lines of source." in capsys.readouterr().out


WRONG_USAGE = [
    ((), "Usage: fastvim COMMAND"),
    (("evla", "x"), "unknown command 'evla'. Did you mean 'eval'"),
    (("models", "fastvm"), "no model matches 'fastvm'. Did you mean 'fastvim'"),
    (("models", "vim_tiny", "--image-size", "4"), "4x4 pixels is smaller than a patch of 16x16"),
    (("models", "--imagesize", "4"), "--image-size"),
    (("train",), "Usage: fastvim train EXPERIMENT"),
    (("train", "digits/fastvim_digts"), "Did you mean 'digits/fastvim_digits'"),
    (("train", "nowhere.py"), "no experiment file nowhere.py"),
    (("train", "digits/fastvim_digits", "--data.bach-size", "3"), "--data.batch-size INT"),
    (("train", "digits/fastvim_digits", "--epochs", "many"), "--epochs"),
    (("train", "digits/fastvim_digits", "--data.flip", "3"), "data.flip=3.0 must be at most 1.0"),
    (
        ("train", "digits/fastvim_digits", "--model.pooling", "maen"),
        "('mean', 'max', 'attention', 'none')",
    ),
    (("eval",), "run"),
    (("eval", "x", "--weights", "best"), "ema"),
    (("predict", "x"), "name at least one image file"),
]


@pytest.mark.parametrize(("arguments", "expected"), WRONG_USAGE, ids=lambda v: str(v)[:40])
def test_wrong_usage_exits_with_2(fastvim: Cli, arguments: tuple[str, ...], expected: str) -> None:
    status, out, err = fastvim(*arguments)
    text = out + err
    assert status == 2
    # Messages in a frame are broken into lines.
    flat = " ".join(text.replace("│", " ").split())
    assert expected in flat and "Traceback" not in text


@pytest.mark.drawn("commands", one_in=6)
def test_failures_exit_with_1(
    fastvim: Cli, run_dir: Path, experiment: Path, tmp_path: Path
) -> None:
    digit = tmp_path / "x.png"
    other = shutil.copytree(run_dir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["model"]["embed_dim"] = 12
    (other / "config.json").write_text(json.dumps(config))
    named = shutil.copytree(run_dir, tmp_path / "named")
    (named / "classes.json").write_text('["zero", "one"]')
    for arguments, expected in [
        (("eval", tmp_path), "is no run folder"),
        (("predict", tmp_path / "nowhere", digit), "for a model of the hub"),
        (("eval", run_dir, "--step", "7"), "finished are 11, 22"),
        (("eval", run_dir, "--split", "validation"), "no split 'validation'"),
        (("eval", other), "is of another model"),
        (("train", experiment, "--run-dir", run_dir, "--epochs", "3"), "another config"),
        (("quickstart-report", tmp_path), "is no run folder"),
        *(
            ((command, named, digit, "--out", tmp_path / "x.csv"), "2 class names are given by")
            for command in ("predict", "embed")
        ),
        (("export", named, "--out", tmp_path / "x.npz"), "2 class names are given by"),
        (
            ("export", run_dir, "--out", tmp_path / "x.npz", "--batch", 2**40),
            "less than 2147483648",
        ),
        (("eval", "a" * 5000), "File name too long. --traceback shows where."),
        (("predict", run_dir, digit, "--out", "/dev/null/x.csv"), "cannot be written"),
        (("export-weights", run_dir, "--out", "/dev/null/x"), "Not a directory"),
    ]:
        status, out, err = fastvim(*arguments)
        assert status == 1, (arguments, out, err)
        assert err.startswith("fastvim: ") and expected in err, err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "not enough memory\nThe memory does not suffice"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n more"),
            "9 bytes.\nThe memory",
        ),
        (OSError(28, "No space left on device"), "No space left on device. --traceback"),
        (OSError(13, "Permission denied", b"a\xff"), "a\\xff: Permission denied."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_machines_limits_are_said_without_a_traceback(
    fastvim: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def run(arguments: object) -> int:
        raise error

    monkeypatch.setattr("fastvim_jax.cli.models.run", run)
    status, _, err = fastvim("models")
    assert status == 1 and expected in err and "Traceback" not in err
    monkeypatch.undo()
    monkeypatch.setattr("fastvim_jax.cli.models.run", lambda arguments: [][0])
    status, _, err = fastvim("models")
    assert status == 1 and "Traceback" in err


@pytest.mark.parametrize("streams", ["broken", "none"])
def test_a_training_keeps_its_status_when_nobody_reads_the_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, streams: str
) -> None:
    """Keep it, because schedulers go by it: `fastvim train ... | head` has finished, a closed terminal has stopped."""
    ended: dict[int, RunResult | Exception] = {
        0: RunResult(tmp_path, 3, {}, 1.0, "done"), 75: Stopped("SIGHUP", 2, 9), 1: UserError("no"),
    }  # fmt: skip
    monkeypatch.setenv("FASTVIM_COMPILATION_CACHE", "off")
    for status, end in ended.items():

        def train(*_: object, end: RunResult | Exception = end, **__: object) -> RunResult:
            if isinstance(end, RunResult):
                return end
            raise end

        with monkeypatch.context() as patch, contextlib.ExitStack() as opened:
            patch.setattr("fastvim_jax.training.train", train)
            for name in ("stdout", "stderr"):
                reading, writing = os.pipe()
                os.close(reading)
                pipe = opened.enter_context(os.fdopen(writing, "w"))
                patch.setattr(sys, name, pipe if streams == "broken" else None)
            command = ["train", "digits/fastvim_digits", "--run-dir", str(tmp_path)]
            assert main(command) == status
            if streams == "none":  # The null device is in their place now.
                sys.stdout.close(), sys.stderr.close()


def test_a_run_log_needs_no_standard_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with RunLog(tmp_path, step=0, total_steps=1) as log:
        log.advance()
        log.say("to nobody")


def test_no_file_takes_the_place_of_a_closed_standard_stream(tmp_path: Path) -> None:
    """Open the null device there: what a library writes to standard error would end up in a checkpoint."""
    program = (
        "import os, sys; from fastvim_jax.cli.main import main; status = main(['--version'])\n"
        f"sys.exit(status or os.open({str(tmp_path / 'x')!r}, os.O_CREAT | os.O_WRONLY) <= 2)"
    )
    closing = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(program)} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", closing]).returncode == 0


@pytest.mark.drawn("commands", one_in=6)
def test_a_damaged_checkpoint_offers_the_one_before(
    fastvim: Cli, run_dir: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(run_dir, tmp_path / "damaged")
    for item in ("params", "ema"):  # Only what is read is checked.
        files = (damaged / "checkpoints" / "22" / item).rglob("*")
        largest = max(files, key=lambda f: f.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-7])
    status, _, err = fastvim("eval", damaged)
    assert status == 1 and "checkpoints/22 is damaged" in err and "step 11" in err
    status, _, _ = fastvim("eval", damaged, "--step", "11")
    assert status == 0


def test_traceback_on_request(fastvim: Cli, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        fastvim("eval", tmp_path, "--traceback")
    with pytest.raises(UserError, match="is no run folder"):
        fastvim("--traceback", "eval", tmp_path)


def test_a_folder_without_classes_is_refused(fastvim: Cli, run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    (copy / "classes.json").unlink()
    status, _, err = fastvim("predict", copy, tmp_path / "x.png")
    assert status == 1 and "class names" in err


@pytest.mark.parametrize("damage", [b"", None])
def test_evaluation_takes_unreadable_class_names_from_the_data(
    fastvim: Cli, run_dir: Path, tmp_path: Path, damage: bytes | None, caplog
) -> None:
    """Take the names from the data, as training does when it resumes, but leave the folder as it is."""
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    (copy / "classes.json").unlink()
    if damage is not None:
        (copy / "classes.json").write_bytes(damage)
    status, out, _ = fastvim("eval", copy, "--split", "test[:60]", "--per-class", "--json")
    assert status == 0 and '"9"' in out
    assert "The names of the data are taken" in caplog.text
    assert (copy / "classes.json").exists() == (damage is not None)


@pytest.mark.drawn("commands", one_in=6)
def test_compiled_programs_are_kept(run_dir: Path, digit_files: list[Path], tmp_path: Path) -> None:
    environment = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COMPILATION_CACHE_DIR": "",
        "FASTVIM_COMPILATION_CACHE": "",
    }
    kept = tmp_path / "cache" / "fastvim-jax" / "xla"
    arguments = ("predict", str(run_dir), str(digit_files[0]))
    off = _shell(*arguments, "--no-compilation-cache", **environment)
    assert off.returncode == 0 and not kept.exists(), off.stderr
    on = _shell(*arguments, **environment)
    assert on.returncode == 0 and any(kept.iterdir()), on.stderr
    assert on.stdout == off.stdout
    # The kernels may say once that they do not run on this JAX, and `predict` which weights it uses; nothing else.
    expected = ("selective_scan", "since they score better")
    said = (on.stderr + off.stderr).splitlines()
    assert not [line for line in said if not any(part in line for part in expected)]


def test_the_cache_respects_the_users_choice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    compilation_cache.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "mine")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    compilation_cache.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ

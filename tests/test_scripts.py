"""The scripts behind the Makefile: which Python is taken, what is refused, how tests are counted, the quickstart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of scripts/ with these additions to the environment."""
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def interpreter(path: Path, answer: str, status: int = 0) -> Path:
    """Return a stand-in for a Python interpreter that answers the probe with `answer` and its own path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "{answer} $0"\nexit {status}\n')
    path.chmod(0o755)
    return path


def find(series: str, home: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """Look for a Python in pyenv's versions below `home`, then on PATH."""
    search = ":".join([*map(str, path), os.environ["PATH"]])
    return run(
        "find_python.sh", series, HOME=str(home), PYENV_ROOT=str(home / ".pyenv"), PATH=search
    )


def test_the_newest_python_that_starts_is_found_past_shims_that_do_not(tmp_path: Path) -> None:
    shims, folder = tmp_path / "shims", tmp_path / "a folder"
    interpreter(shims / "python3.99", "3.99 7", status=1)
    assert find("3.99", tmp_path, shims).returncode == 1

    older = interpreter(folder / "python3.99", "3.99 2")
    assert find("3.99", tmp_path, shims, folder).stdout == f"{older}\n"

    installed = interpreter(tmp_path / ".pyenv/versions/3.99.10/bin/python", "3.99 10")
    interpreter(tmp_path / ".pyenv/versions/3.99.9/bin/python", "3.99 9")
    assert find("3.99", tmp_path, shims, folder).stdout == f"{installed}\n"


def test_an_interpreter_under_a_wrong_name_does_not_count(tmp_path: Path) -> None:
    interpreter(tmp_path / "bin" / "python3.99", "3.9 9")
    found = find("3.99", tmp_path, tmp_path / "bin")
    assert found.returncode == 1 and found.stdout == ""
    assert "No working Python 3.99" in found.stderr and "PYTHON=" in found.stderr


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python does not start"),
        ({"PYTHON": "/bin/echo"}, "PYTHON=/bin/echo is"),
        (
            {"PYTHON": sys.executable, "GPU": "rocm"},
            "GPU=rocm is unknown: use cuda12, cuda13 or cpu",
        ),
    ],
    ids=["missing", "no Python", "unknown GPU"],
)
def test_set_up_refuses_what_cannot_work(
    environment: dict[str, str], complaint: str, tmp_path: Path
) -> None:
    environment = {"GPU": "", "VENV": str(tmp_path / "new env")} | environment
    result = run("setup.sh", "base", **environment)
    assert result.returncode == 1
    assert complaint in result.stderr
    assert not (tmp_path / "new env").exists()


def report(path: Path, **counts: int) -> str:
    """Return a JUnit file with these counts."""
    attributes = " ".join(f'{name}="{value}"' for name, value in counts.items())
    path.write_text(f"<testsuites><testsuite {attributes}></testsuite></testsuites>")
    return str(path)


def test_counts_add_up_and_failures_or_missing_runs_fail(tmp_path: Path) -> None:
    def count(*reports: str) -> tuple[int, str]:
        result = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "count_tests.py"), *reports],
            capture_output=True,
            text=True,
        )
        return result.returncode, result.stdout.splitlines()[-1]

    good = report(tmp_path / "good.xml", tests=5, failures=0, errors=0, skipped=1)
    bad = report(tmp_path / "bad.xml", tests=7, failures=1, errors=2, skipped=0)
    none = report(tmp_path / "none.xml", tests=0, failures=0, errors=0, skipped=0)
    assert count(good) == (0, "4 passed, 0 failed, 1 skipped")
    assert count(good, bad) == (1, "8 passed, 3 failed, 1 skipped")
    assert count(good, str(tmp_path / "missing.xml"))[0] == 1
    assert count(none)[0] == 1


@pytest.mark.drawn("as a user types it")
@pytest.mark.slow
def test_the_quickstart_learns_and_draws_its_picture(tmp_path: Path) -> None:
    """Run a tenth of the quickstart's epochs; `make quickstart` trains them all, and fails below 97 %."""
    folder = tmp_path / "a run"
    # As a user has it: not with the settings that make the tests compile fast.
    settings = {"RUN": str(folder), "VENV": str(Path(sys.executable).parents[1]), "XLA_FLAGS": ""}
    result = run("quickstart.sh", **settings, EPOCHS="4", AT_LEAST="0.85")
    assert result.returncode == 0, result.stdout + result.stderr
    right = re.search(r"(\d+) of 360 held-out", result.stdout)
    assert right and int(right.group(1)) >= 0.85 * 360
    assert str(folder) in result.stdout.splitlines()[-1]
    assert (folder / "quickstart.png").stat().st_size > 20_000


def record(tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Return the recording of benchmarks, by a stand-in for Python that fails at scan_pair.

    With CRASH, the name of a file that does not exist yet, a signal ends the first start of scan_bf16.
    """
    python = tmp_path / "python"
    crash = '[ -z "$CRASH" ] || [ -e "$CRASH" ] || { : >"$CRASH"; kill -SEGV $$; }'
    cases = f"*scan_pair.json) exit 3 ;; *scan_bf16.json) {crash} ;;"
    python.write_text(f'#!/bin/sh\necho "$@"\ncase "$*" in {cases} esac\n')
    python.chmod(0o755)
    quick = {"PYTHON": str(python), "STAGGER": "0"}
    return run("record_benchmarks.sh", str(tmp_path / "out"), **quick, **environment)


def test_recording_says_which_program_failed(tmp_path):
    done = record(tmp_path)
    assert done.returncode == 1 and re.findall(r"FAILED (.*)", done.stdout) == [
        "scan_pair (status 3)"
    ]
    assert len(set(re.findall(r"started (\S+)", done.stdout))) == 89
    assert "bench scan --tune" in done.stdout and "train_base_compile.json" in done.stdout


def test_recording_starts_a_crashed_program_again(tmp_path):
    done = record(tmp_path, FASTVIM_BENCH_ONLY="scan_pair scan_bf16", CRASH=str(tmp_path / "crash"))
    assert done.returncode == 1 and re.findall(r"FAILED (.*)", done.stdout) == [
        "scan_pair (status 3)"
    ]
    assert (tmp_path / "crash").exists()


def test_recording_ends_at_once_without_the_packages(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho No module named tyro >&2\nexit 1\n")
    python.chmod(0o755)
    done = run("record_benchmarks.sh", str(tmp_path / "out"), PYTHON=str(python))
    assert done.returncode == 1 and "tyro" in done.stderr
    assert "started" not in done.stdout and not (tmp_path / "out").exists()


def test_recording_runs_what_is_named_and_shows_no_older_logs(tmp_path):
    done = record(tmp_path, FASTVIM_BENCH_ONLY="train_base* scan_bf16")
    assert done.returncode == 0 and "FAILED" not in done.stdout
    names = {
        "train_base",
        "train_base_scanned",
        "train_base_largest_batch",
        "train_base_compile",
        "scan_bf16",
    }
    assert set(re.findall(r"started (\w+)", done.stdout)) == names
    assert set(re.findall(r"== (\w+)", done.stdout)) == names
    done = record(tmp_path, FASTVIM_BENCH_ONLY="nothing")
    assert done.returncode == 1 and "No program has a name like nothing." in done.stdout

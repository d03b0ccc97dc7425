"""Write a run's numbers to the console, to `metrics.jsonl`, to TensorBoard event files and, if asked, to other places.

Each line of `metrics.jsonl` is a JSON object: `kind` (`train`, `norms`, `eval` or another evaluator's name), `step`,
`epoch`, then the numbers. Timings (the names in `clock.TIMING`) depend on the machine. All other numbers are the same
whether a run was interrupted or not.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO, cast, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastvim_jax.closed_output import survive_closed_output
from fastvim_jax.distributed import is_first_process, on_first_process
from fastvim_jax.errors import UserError
from fastvim_jax.json_text import parse_json
from fastvim_jax.serialise import to_dict
from fastvim_jax.training.disk import explain_write_errors, replace_file
from fastvim_jax.training.event_file import EventFile
from fastvim_jax.training.wandb_log import WandbLog

METRICS_FILE = "metrics.jsonl"
LINE_INTERVAL = 15.0  # seconds between progress lines where there is no terminal

_log = logging.getLogger(__name__)


@runtime_checkable
class Sink(Protocol):
    """A place for scalars besides `metrics.jsonl`, such as TensorBoard."""

    def add(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write the scalars of a step, by names such as `train/loss`."""

    def close(self) -> None:
        """Write the pending records, and close."""


class RunLog:
    """Context manager that writes a run's metrics. With several processes, only the first one writes.

    Args:
        folder: the run folder.
        step: the step at which the run starts or resumes. Later lines, which an interrupted run wrote, are dropped. If
            there are unreadable lines, they are dropped as well, and a copy of the file is kept as
            `metrics.jsonl.damaged`.
        total_steps: length of the run, for the progress bar.
        progress: show a progress bar and messages on standard error.
        sinks: more places for the scalars; closed with the log.

    Raises:
        UserError: a file cannot be written; the methods raise this, too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        total_steps: int,
        progress: bool = True,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._display = _Display(step, total_steps, shown=progress and is_first_process())
        self._path = Path(folder) / METRICS_FILE
        self._sinks: list[Sink] = list(sinks)
        self._file: TextIO | None = None
        if not is_first_process():
            return
        with explain_write_errors(self._path):
            records, damaged = _read(self._path)
            if damaged:
                copy = self._path.with_name(METRICS_FILE + ".damaged")
                shutil.copyfile(self._path, copy)
                _log.warning(
                    "%d lines of %s cannot be read and are left out; %s keeps the file as it was.",
                    damaged,
                    METRICS_FILE,
                    copy,
                )
            kept = [record for record in records if record["step"] <= step]
            if step and not kept:
                _log.warning(
                    "%s holds nothing of steps 1 to %d: its curves begin later.", METRICS_FILE, step
                )
            replace_file(self._path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = self._path.open("a")
            self._sinks.append(EventFile(Path(folder) / "tensorboard", purge_step=step + 1))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except UserError:
            if error is None:  # Otherwise raise the earlier error, which Python does by itself.
                raise

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self._display.advance()

    def write(self, kind: str, step: int, scalars: Mapping[str, Any]) -> None:
        """Record numbers of `kind` (`train`, `eval`, `norms`) at `step` everywhere."""
        if self._file is None:
            return
        with explain_write_errors(self._path):
            self._file.write(json.dumps({"kind": kind, "step": step, **scalars}) + "\n")
            self._file.flush()
            for sink in self._sinks:
                sink.add(step, {f"{kind}/{name}": value for name, value in scalars.items()})

    def show(self, **scalars: float) -> None:
        """Show numbers beside the progress bar."""
        self._display.show("  ".join(f"{name} {value:.4g}" for name, value in scalars.items()))

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._display.say(text)

    def close(self) -> None:
        """Close the files."""
        self._display.close()
        with explain_write_errors(self._path), contextlib.ExitStack() as closing:
            if self._file is not None:
                closing.callback(self._file.close)
            for sink in self._sinks:
                closing.callback(sink.close)


class _Display:
    """A progress bar on a terminal. Elsewhere, a line every `LINE_INTERVAL` seconds, so that log files stay short."""

    def __init__(self, step: int, total: int, *, shown: bool) -> None:
        self._console = Console(
            file=cast(TextIO, _StandardError()), quiet=not shown, highlight=False
        )
        self._live = shown and self._console.is_terminal
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("training", total=total, completed=step, numbers="")
        self._step, self._total = step, total
        self._last_line = time.monotonic()
        self._bar.start()

    def advance(self) -> None:
        self._step += 1
        self._bar.advance(self._task)

    def show(self, numbers: str) -> None:
        self._bar.update(self._task, numbers=numbers)
        if not self._live and time.monotonic() - self._last_line > LINE_INTERVAL:
            self.say(f"step {self._step}/{self._total}  {numbers}")

    def say(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._bar.print(text, soft_wrap=True, markup=False)

    def close(self) -> None:
        self._bar.stop()


class _StandardError(io.TextIOBase):
    """Standard error that survives the loss of its reader, because a closed terminal or pipe must not end a run.

    The first write that fails points the file descriptor at the null device, so that tracebacks and other libraries'
    messages cannot fail either.
    """

    encoding = "utf-8"

    def __init__(self) -> None:
        # Keep the streams themselves: while a bar is live, Rich puts proxies in their place that write to this object.
        # A process without a terminal may have none: then the messages go nowhere.
        nowhere = io.StringIO() if sys.stdout is None or sys.stderr is None else None
        self._stdout: Any = sys.stdout or nowhere
        self._stderr: Any = sys.stderr or nowhere

    def write(self, text: str) -> int:
        """Write `text`; drop it if nobody can read it."""
        with survive_closed_output(self._stderr):
            self._stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush standard error, and standard output too, which may end in the same pipe."""
        for stream in (self._stdout, self._stderr):
            with survive_closed_output(stream):
                stream.flush()

    def isatty(self) -> bool:
        """Return whether a person is watching."""
        return self._stderr.isatty()

    def fileno(self) -> int:
        """Return the file descriptor. The console uses it to find the width of the terminal."""
        return self._stderr.fileno()


def read_metrics(folder: Path | str, kind: str | None = None) -> list[dict[str, Any]]:
    """Read the records of a run folder in order, or only those of one kind. Skip lines that cannot be read."""
    records, _ = _read(Path(folder) / METRICS_FILE)
    return [record for record in records if kind is None or record["kind"] == kind]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the records of a file, and count its damaged lines. A last line cut off by a crash is not counted."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    records = [_record(line) for line in lines]
    damaged = sum(
        record is None and bool(line) for record, line in zip(records[:-1], lines[:-1], strict=True)
    )
    return [record for record in records if record is not None], damaged


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError are ValueErrors.
        return None
    whole = (
        isinstance(record, dict)
        and isinstance(record.get("kind"), str)
        and isinstance(record.get("step"), int)
    )
    return record if whole else None


def open_sinks(wandb: str | None, folder: Path, config: Any) -> list[Sink]:
    """Open places for the scalars besides the run folder: Weights & Biases, if its project is named."""
    sinks: list[Sink] = []
    if wandb is not None:
        on_first_process(lambda: sinks.append(WandbLog(wandb, folder, to_dict(config))))
    return sinks


def evaluated(folder: Path | str, step: int, kind: str = "eval") -> bool:
    """Return whether the run's log holds a record of `kind` at `step`."""
    return any(record["step"] == step for record in read_metrics(folder, kind))

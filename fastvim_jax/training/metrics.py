"""Where a run's numbers go: the console, `metrics.jsonl` and TensorBoard event files.

`metrics.jsonl` holds one JSON object a line: `kind` (`train` or `eval`), `step`, `epoch`, then the numbers.
Of these, `seconds`, `images_per_second` and `data_wait` are about the machine; everything else is the same for
a run that was interrupted and resumed and for one that was not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from fastvim_jax.distributed import is_first_process

METRICS_FILE = "metrics.jsonl"
TIMING = frozenset({"seconds", "images_per_second", "data_wait"})
LINE_INTERVAL = 15.0  # seconds


class RunLog:
    """Writes a run's metrics; a context manager. Of several processes the first writes, and the others are silent.

    Args:
        folder: the run folder.
        step: the step the run starts or resumes at; lines written past it by an interrupted run are dropped.
        total_steps: length of the run, for the progress bar.
        progress: show a progress bar and messages on standard error.
    """

    def __init__(self, folder: Path, *, step: int, total_steps: int, progress: bool = True) -> None:
        self._display = _Display(step, total_steps, shown=progress and is_first_process())
        self._events: SummaryWriter | None = None
        if not is_first_process():
            self._file = open(os.devnull, "a")
            return
        path = Path(folder) / METRICS_FILE
        kept = [record for record in read_metrics(folder) if record["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, path)
        self._file = path.open("a")
        self._events = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self._display.advance()

    def write(self, kind: str, step: int, scalars: Mapping[str, Any]) -> None:
        """Record numbers of `kind` (`train`, `eval`) at `step` in both files."""
        if self._events is None:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def show(self, **scalars: float) -> None:
        """Show numbers beside the progress bar."""
        self._display.show("  ".join(f"{name} {value:.4g}" for name, value in scalars.items()))

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._display.say(text)

    def close(self) -> None:
        """Flush and close the files."""
        self._display.close()
        if self._events is not None:
            self._events.close()
        self._file.close()


class _Display:
    """A progress bar on a terminal; elsewhere a line now and then, so that log files stay short."""

    def __init__(self, step: int, total: int, *, shown: bool) -> None:
        self._console = Console(stderr=True, quiet=not shown, highlight=False)
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


def read_metrics(folder: Path | str, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run folder in order, of one kind if given; a line cut off by a crash is left out."""
    path = Path(folder) / METRICS_FILE
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if kind is None or record["kind"] == kind:
            records.append(record)
    return records


def evaluated(folder: Path | str, step: int) -> bool:
    """Whether the run's log holds an evaluation of `step`."""
    return any(record["step"] == step for record in read_metrics(folder, "eval"))

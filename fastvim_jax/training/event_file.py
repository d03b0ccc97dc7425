"""Write a TensorBoard event file through tensorboardX's synchronous writer.

`SummaryWriter` is not used, because it writes from a thread: a full disk would end the thread, and the run would
continue without writing its numbers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class EventFile:
    """Event file with scalars for TensorBoard. A call returns when its record is written to the file.

    Args:
        folder: folder of the file; it is created if it does not exist.
        purge_step: TensorBoard ignores what earlier files hold for this step and later ones.

    Raises:
        OSError: the file cannot be written; the methods raise this, too.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write scalars by their tags."""
        values = [
            Summary.Value(tag=tag, simple_value=float(value)) for tag, value in scalars.items()
        ]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, event: Event) -> None:
        self._writer.write_event(event)
        self._writer.flush()

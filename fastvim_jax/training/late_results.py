"""Drop the errors that writes of a failed checkpoint report too late, when nobody waits for them any more."""

from __future__ import annotations

import asyncio.base_events
import logging
import re
import sys
from typing import Any

_print = sys.unraisablehook
_NEVER_ASKED = tuple(f"{kind} exception was never retrieved" for kind in ("Future", "Task"))


def drop_late_results() -> None:
    """Let Python print no traceback for a result that comes after its event loop has ended.

    Orbax writes all files of a checkpoint in one event loop, which ends with the first file that cannot be written.
    TensorStore's threads then report each other file to a closed loop, and Python would print dozens of tracebacks
    above the message that says what is wrong. A file that failed before the loop was closed is reported to a future
    that nobody asks any more, and asyncio would log it. All other errors are printed and logged as before.
    """
    global _print
    logging.getLogger("asyncio").addFilter(_is_no_forgotten_write)
    if sys.unraisablehook is not _print_unless_late:
        _print, sys.unraisablehook = sys.unraisablehook, _print_unless_late


def _print_unless_late(found: Any) -> None:
    if not _is_late(found):
        _print(found)


def _is_no_forgotten_write(record: logging.LogRecord) -> bool:
    """Return False for the message that a failed write was reported to a future or task that nobody asked."""
    error = record.exc_info[1] if record.exc_info else None
    return not (
        record.getMessage().startswith(_NEVER_ASKED)
        and isinstance(error, ValueError)
        and re.match(r"[A-Z_]+: Error writing ", str(error)) is not None
    )


def _is_late(found: Any) -> bool:
    """Tell whether a call from outside of Python found its event loop closed.

    Args:
        found: what `sys.unraisablehook` is given.
    """
    return (
        isinstance(found.exc_value, RuntimeError)
        and str(found.exc_value) == "Event loop is closed"
        and found.object is None
        and found.exc_traceback is not None
        and found.exc_traceback.tb_frame.f_code.co_filename == asyncio.base_events.__file__
    )

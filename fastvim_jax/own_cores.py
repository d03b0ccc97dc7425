"""Count the processor cores that this process may use."""

from __future__ import annotations

import os


def own_cores() -> int:
    """Count the processor cores that this process may use. A job of a cluster may have few of its machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

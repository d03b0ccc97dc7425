"""Parse JSON that may be damaged, or written by somebody else."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: the text cannot be parsed. Text nested so deeply that it exhausts the stack is refused alike, where
            `json.loads` raises RecursionError.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

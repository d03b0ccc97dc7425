"""Count the undecodable records of all processes, and stop the run if there are too many."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastvim_jax.data.records import DecodeError
from fastvim_jax.distributed import all_gather_set


def count_corrupt(found: Iterable[int], data: Any) -> int:
    """Return how many records were found undecodable in all processes together. Every process must call this.

    A process that reads data counts only the records that it met itself, which may be few enough.

    Args:
        found: indices of this process's undecodable records.
        data: the data's config; without a field `max_corrupt`, any number is allowed.

    Raises:
        DecodeError: in every process, if there are more than `data.max_corrupt`.
    """
    count = len(all_gather_set(found))
    most = getattr(data, "max_corrupt", None)
    if most is not None and count > most:
        raise DecodeError(
            f"All processes together met {count} undecodable records; data.max_corrupt allows {most}. Their logs name "
            "the files: mend or remove them, or raise data.max_corrupt."
        )
    return count

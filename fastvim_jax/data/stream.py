"""Read a grain sequence of batches ahead of its consumer, whatever task the batches are for."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import grain
import numpy as np

from fastvim_jax.data.batches import Stream


def grain_stream(batches: grain.MapDataset, workers: int) -> Stream:
    """Open a random-access sequence of batches at any number, read ahead by threads or by worker processes.

    Args:
        batches: dictionaries of arrays by their number.
        workers: processes; 0: two threads of this process.
    """

    def stream(first: int) -> Generator[dict[str, Any], None, None]:
        running = _read_ahead(batches[first:], workers)
        try:
            for batch in running:
                # Copied, because workers hand over shared memory that is freed under whoever still looks at it.
                yield {key: np.array(value) for key, value in batch.items()}
        finally:
            close = getattr(running, "close", None)
            if close is not None:
                close()

    return stream


def _read_ahead(batches: grain.MapDataset, workers: int) -> Iterator[dict[str, np.ndarray]]:
    """Start reading ahead: in two threads of this process, or in worker processes."""
    if workers == 0:
        return iter(
            batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
        )
    from absl import flags

    # grain's workers inherit absl's flags and refuse to start when nobody parsed them.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return iter(dataset.mp_prefetch(options))

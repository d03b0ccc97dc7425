"""Read rows of pixel shards in threads, straight into buffers that are used again for later batches.

A buffer that is used again has its pages already. New memory for every batch, as workers hand it over, makes the kernel
clear each page, map it twice and free it: that took longer than the copy itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from fastvim_jax.errors import UserError

THREADS = 8
"""Reads at the same time. A thread holds Python's lock only between reads."""


class RowReader:
    """Read byte ranges of several files in threads.

    Args:
        files: the files, whose numbers `read` takes.
        threads: number of reads at the same time.
    """

    def __init__(self, files: Sequence[Path], threads: int = THREADS) -> None:
        self._files = list(files)
        self._opened: dict[int, int] = {}
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pixel rows")

    def read(
        self,
        file: Int64[np.ndarray, " n"],
        offset: Int64[np.ndarray, " n"],
        starts: Int64[np.ndarray, " n"],
        stops: Int64[np.ndarray, " n"],
        into: UInt8[np.ndarray, " bytes"],
    ) -> list[Future[None]]:
        """Begin to read the bytes from `offset` of each `file` into `into[start:stop]`; the futures raise errors."""
        opened = [self._open(number) for number in file.tolist()]
        ranges = list(
            zip(
                file.tolist(), opened, offset.tolist(), starts.tolist(), stops.tolist(), strict=True
            )
        )
        share = -(-len(ranges) // self._threads)
        view = memoryview(into)
        return [
            self._pool.submit(self._read, ranges[first : first + share], view)
            for first in range(0, len(ranges), share)
        ]

    def close(self) -> None:
        """Wait for the reads that have begun, drop the others, and close the files."""
        self._pool.shutdown(cancel_futures=True)
        for opened in self._opened.values():
            os.close(opened)
        self._opened = {}

    def _open(self, number: int) -> int:
        if number not in self._opened:
            try:
                self._opened[number] = os.open(self._files[number], os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(
                    f"{str(self._files[number])!r} cannot be read: {error.strerror}."
                ) from None
        return self._opened[number]

    def _read(self, ranges: list[tuple[int, int, int, int, int]], view: memoryview) -> None:
        for file, opened, offset, start, stop in ranges:
            while start < stop:
                try:
                    count = os.preadv(opened, [view[start:stop]], offset)
                except OSError as error:
                    raise UserError(
                        f"{str(self._files[file])!r} cannot be read: {error.strerror}."
                    ) from None
                if not count:
                    raise UserError(
                        f"{str(self._files[file])!r} has become shorter since the run began: prepare the split again."
                    )
                start += count
                offset += count

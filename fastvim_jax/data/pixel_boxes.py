"""Copy boxes of images from pixel shards, in threads, straight into buffers that later batches reuse.

A reused buffer already has its memory pages. If every batch got new memory, as with worker processes, the operating
system would clear each page, map it twice and free it, which takes longer than the copy itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from fastvim_jax.errors import UserError


class BoxReader:
    """Copy boxes of images from files that hold decoded pixels.

    Args:
        files: the files; `read` names them by their index in this list.
        threads: number of boxes that are read at the same time. A thread holds Python's lock only between copies.
    """

    def __init__(self, files: Sequence[Path], threads: int) -> None:
        self._files = list(files)
        self._opened: dict[int, int] = {}
        self._threads = threads
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pixel boxes")

    def read(
        self,
        boxes: Int64[np.ndarray, "n 6"],
        starts: Int64[np.ndarray, " n"],
        into: UInt8[np.ndarray, " bytes"],
    ) -> list[Future[None]]:
        """Begin to copy boxes into a buffer. The futures raise UserError for a file that cannot be read.

        Args:
            boxes: for each box the file's index, the offset of the box's first pixel there in bytes, the image's width,
                and the box's height, width and channels.
            starts: where each box begins in the buffer.
            into: the buffer.
        """
        for number in np.unique(boxes[:, 0]).tolist():
            self._open(number)
        rows = np.concatenate([boxes, starts[:, None]], axis=1).tolist()
        share = -(-len(rows) // self._threads)
        return [
            self._pool.submit(self._read, rows[first : first + share], into)
            for first in range(0, len(rows), share)
        ]

    def close(self) -> None:
        """Wait for the reads that have begun, drop the others, and close the files."""
        self._pool.shutdown(cancel_futures=True)
        for opened in self._opened.values():
            os.close(opened)
        self._opened = {}

    def _open(self, number: int) -> None:
        if number not in self._opened:
            try:
                self._opened[number] = os.open(self._files[number], os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(
                    f"{str(self._files[number])!r} cannot be read: {error.strerror}."
                ) from None

    def _read(self, rows: list[list[int]], into: np.ndarray) -> None:
        # Each box is read in one call, with what lies between its rows: one call per row would take longer.
        scratch: np.ndarray = getattr(self._local, "scratch", np.empty(0, np.uint8))
        for number, offset, full_width, height, width, channels, start in rows:
            line, kept = full_width * channels, width * channels
            size = (height - 1) * line + kept
            if height * line > len(scratch):
                self._local.scratch = scratch = np.empty(height * line, np.uint8)
            self._fill(memoryview(scratch)[:size], number, offset)
            lines = scratch[: height * line].reshape(height, line)
            np.copyto(into[start : start + height * kept].reshape(height, kept), lines[:, :kept])

    def _fill(self, view: memoryview, number: int, offset: int) -> None:
        """Read exactly as many bytes as `view` has; system calls may return fewer."""
        while len(view):
            try:
                count = os.preadv(self._opened[number], [view], offset)
            except OSError as error:
                raise UserError(
                    f"{str(self._files[number])!r} cannot be read: {error.strerror}."
                ) from None
            if not count:
                raise UserError(
                    f"{str(self._files[number])!r} has become shorter since the run began: prepare the split again."
                )
            view, offset = view[count:], offset + count

"""Put the next batches on the device, in a thread, while the current step computes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import jax

from fastvim_jax.data.batches import Batch, BatchIterator, is_lent, plain

Placed = Mapping[str, Any]


class DevicePrefetch(Iterator[Placed]):
    """Iterate over batches on the device.

    Position and corrupt records describe the batches that the caller took, not those that the thread fetched ahead.

    Args:
        batches: the iterator to read. Nothing else may read it while this object does.
        place: function that puts a batch on the device, or shards it over the mesh.
        ahead: maximum number of batches that wait on the device. The thread holds one more while the queue is full.

    Attributes:
        source: see `BatchIterator`.
        steps_per_epoch: see `BatchIterator`.
        corrupt: see `BatchIterator`.
    """

    def __init__(
        self, batches: BatchIterator, place: Callable[[Batch], Placed], *, ahead: int = 2
    ) -> None:
        self.source = batches.source
        self.steps_per_epoch = batches.steps_per_epoch
        self.corrupt = set(batches.corrupt)
        self._batches = batches
        self._place = place
        self._ahead = ahead
        self._state = batches.get_state()
        self._running: _Feeder | None = None
        self._pace = _Pace()
        # Placing copies to another device, so that workers' memory need not be copied first.
        batches.lend = jax.default_backend() != "cpu"

    def __next__(self) -> Placed:
        if self._running is None:
            self._running = _Feeder(self._fetch, self._ahead)
        taken = self._running.take()
        if isinstance(taken, BaseException):
            self.close()
            raise taken
        batch, self._state = taken
        self.corrupt = set(self._state["corrupt"])
        return batch

    def _fetch(self) -> tuple[Placed, dict[str, Any]]:
        """Read and place the next batch, in the thread; return it with the position after it."""
        begin = time.perf_counter()
        lent = next(self._batches)
        batch = self._place(plain(lent))
        # Only lent memory must be waited for: all else may be computed while the step before runs.
        jax.block_until_ready([batch[name] for name, value in lent.items() if is_lent(value)])
        self._pace.add(time.perf_counter() - begin)
        return batch, self._batches.get_state()

    def seconds_per_batch(self) -> float | None:
        """Return the mean time to read and place a batch since the last call, without waiting for room in the queue.

        None if no batch was made.
        """
        return self._pace.take()

    def get_state(self) -> dict[str, Any]:
        """Return the position after the last batch taken; see `BatchIterator.get_state`."""
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue at the position `state`; see `BatchIterator.set_state`."""
        self.close()
        self._batches.set_state(state)
        self._state = self._batches.get_state()
        self.corrupt = set(self._batches.corrupt)

    def close(self) -> None:
        """End the thread and drop the waiting batches. `next` starts it again, after the last batch taken."""
        if self._running is not None:
            self._running.stop()
            self._running = None
        self._batches.set_state(self._state)


class _Pace:
    """The mean time of what one thread does, read by another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds, self._count = 0.0, 0

    def add(self, seconds: float) -> None:
        with self._lock:
            self._seconds += seconds
            self._count += 1

    def take(self) -> float | None:
        """Return the mean since the last call, and begin anew."""
        with self._lock:
            mean = self._seconds / self._count if self._count else None
            self._seconds, self._count = 0.0, 0
        return mean


def place_ahead(
    batches: Iterable[Batch], place: Callable[[Any], Placed], *, ahead: int = 2
) -> Generator[Placed, None, None]:
    """Iterate over one pass of `batches` on the device, the next ones read and placed by a thread meanwhile.

    Args:
        batches: ends after a pass, as an evaluation's do. Nothing else may read it until then.
        place: see `DevicePrefetch`.
        ahead: see `DevicePrefetch`.
    """
    reading = iter(batches)
    feeder = _Feeder(lambda: place(next(reading)), ahead)
    try:
        while not isinstance(taken := feeder.take(), StopIteration):
            if isinstance(taken, BaseException):
                raise taken
            yield taken
    finally:
        feeder.stop()


class _Feeder:
    """A thread that fills a queue with what `fetch` returns, and last with the error that ended it."""

    def __init__(self, fetch: Callable[[], Any], ahead: int) -> None:
        self._fetch = fetch
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._feed, name="device prefetch", daemon=True)
        self._thread.start()

    def take(self) -> Any:
        return self._queue.get()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _feed(self) -> None:
        try:
            while not self._stopped.is_set():
                self._put(self._fetch())
        # Hand any error to the thread that reads the queue, which raises it.
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.05)
            except queue.Full:
                continue

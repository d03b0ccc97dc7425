"""Define the batches that every pipeline yields, and the iterator over them, whose position can be saved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from fastvim_jax.data.config import DataConfig
from fastvim_jax.data.records import DecodeError, Record, Source, read_record
from fastvim_jax.data.sources import open_source
from fastvim_jax.data.turbo import Picture, open_image
from fastvim_jax.errors import UserError

_log = logging.getLogger(__name__)

Stream = Callable[[int], Generator[dict[str, Any], None, None]]
"""Function from the number of a batch to a generator that starts there.

The batches it yields also hold `corrupt`, the indices of records that could not be decoded.
"""


class Batch(TypedDict, total=False):
    """This process's share of a batch, as NumPy arrays."""

    channel_ids: Int32[np.ndarray, "b k"]
    """Numbers of the data's channels that the images hold. Absent if the images hold all channels in order."""
    image: UInt8[np.ndarray, "b h w c"]
    """Pixels, not normalised: the compiled step normalises them (`device_transforms`)."""
    label: Int32[np.ndarray, " b"]
    valid: Bool[np.ndarray, " b"]
    """Evaluation only: False for padding and for undecodable records, which must not be counted."""
    flip: Bool[np.ndarray, " b"]
    """Training with `augment_on="device"` only, as the next four: what the device does; see `augment`."""
    operation: Int32[np.ndarray, "b layers"]
    level: Float32[np.ndarray, "b layers"]
    jitter: Int32[np.ndarray, "b 3"]
    factor: Float32[np.ndarray, "b 3"]


class BatchIterator(Iterator[Batch]):
    """Iterate over a pipeline's batches. Keep track of the position and of the undecodable records.

    Args:
        stream: opens the pipeline at a batch, given the number of the batch.
        source: see the attributes.
        config: see the attributes.
        steps_per_epoch: see the attributes.
        identity: values, such as the seed, that a saved position must share with this iterator to be restored.
        reread: reads a record again by its index, to find out why it could not be decoded. By default it is read as an
            image.
        ends: end the iteration after each pass over the source. The stream itself is endless, so that `rewind` can
            keep its workers.

    Attributes:
        source: the records that are read.
        config: how the batches are made, and how the compiled step preprocesses them.
        steps_per_epoch: batches in one pass over the source.
        corrupt: indices of the undecodable records met so far.
        lend: yield the memory that workers share instead of a copy. It is freed when the next batch is taken.
    """

    def __init__(
        self,
        stream: Stream,
        source: Source,
        config: DataConfig,
        *,
        steps_per_epoch: int,
        identity: Mapping[str, int | str],
        reread: Callable[[int], Any] | None = None,
        ends: bool = False,
    ) -> None:
        self.source = source
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.corrupt: set[int] = set()
        self.lend = False
        self._stream = stream
        self._identity = dict(identity)
        self._taken = 0
        self._running: Generator[dict[str, Any], None, None] | None = None
        self._pass = steps_per_epoch if ends else None
        self._reread = reread or (lambda index: decode_record(source, index, config))

    def __next__(self) -> Batch:
        if self._taken == self._pass:
            raise StopIteration
        if self._running is None:
            self._running = self._stream(self._taken)
        batch: Any = next(self._running)
        self._taken += 1
        self._note_corrupt(batch.pop("corrupt"))
        return batch if self.lend else owned(batch)

    def get_state(self) -> dict[str, Any]:
        """Return the position as JSON-able values, together with the seed, data and batch size that it belongs to."""
        return {**self._identity, "batches": self._taken, "corrupt": sorted(self.corrupt)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue at the position `state`. The number of workers may have changed since.

        Raises:
            UserError: the state belongs to another seed, data set or batch size.
        """
        for key, ours in self._identity.items():
            if state.get(key) != ours:
                raise UserError(
                    f"The saved data position belongs to {key} = {state.get(key)!r}, but this run has "
                    f"{ours!r}: resume with the same data settings or start a new run."
                )
        self.close()
        self._taken = int(state["batches"])
        self.corrupt = {int(index) for index in state["corrupt"]}

    def close(self) -> None:
        """Stop prefetching and end the worker processes. Taking the next batch starts them again."""
        if self._running is not None:
            self._running.close()
        self._running = None

    def rewind(self) -> None:
        """Go back to the first batch. After a whole pass with `ends`, the workers keep running."""
        if self._taken != self._pass:
            self.close()
        self._taken = 0

    def _note_corrupt(self, indices: np.ndarray) -> None:
        for index in map(int, indices):
            if index in self.corrupt:
                continue
            self.corrupt.add(index)
            try:
                self._reread(index)
                reason = f"record {index} could not be decoded once, but can be now."
            except DecodeError as error:
                reason = str(error)
            if len(self.corrupt) > self.config.max_corrupt:
                raise DecodeError(
                    f"{reason}\n{len(self.corrupt)} undecodable record(s); data.max_corrupt allows "
                    f"{self.config.max_corrupt}. Mend or remove the file, or raise data.max_corrupt."
                )
            _log.warning("Undecodable record left out: %s", reason)


def plain(batch: Mapping[str, Any]) -> Any:
    """View arrays of workers' shared memory as plain NumPy arrays, the only ones that JAX surely takes."""
    return {
        key: value.view(np.ndarray) if isinstance(value, np.ndarray) else value
        for key, value in batch.items()
    }


def is_lent(value: Any) -> bool:
    """Return whether an array lies in memory shared with workers, which is freed under whoever still looks at it."""
    return isinstance(value, np.ndarray) and type(value) is not np.ndarray


def owned(batch: Mapping[str, Any]) -> Any:
    """Copy the arrays that lie in memory shared with workers."""
    return {key: np.array(value) if is_lent(value) else value for key, value in batch.items()}


def decode_record(
    source: Source, index: int, config: DataConfig, decoder: str = "pillow"
) -> tuple[Record, Picture]:
    """Read a record and open its image with a decoder of `turbo.open_image`.

    Raises:
        DecodeError: the record cannot be decoded. The message names the record and the cause.
    """
    record = read_record(source, index)
    picture = open_image(
        record.image,
        channels=config.channels,
        name=record.name,
        decoder=decoder,
        background=config.background,
    )
    return record, picture


def open_split(config: DataConfig, split: str) -> Source:
    """Open a split of a config's data set; see `open_source`."""
    return open_source(
        config.source,
        split,
        path=config.path,
        class_list=config.class_list,
        follow_links=config.follow_links,
    )


def evaluation_batch(batch_size: int | None, config: Any) -> int:
    """Return the number of images per batch of an evaluation: `batch_size`, or the config's if it is None.

    Raises:
        UserError: it is below 1.
    """
    if batch_size is None:
        return config.eval_batch_size or config.batch_size
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1, or None for the config's.")
    return batch_size


def local_batch(batch_size: int, process_count: int, name: str) -> int:
    """Return this process's share of a batch.

    Raises:
        UserError: the batch size is not divisible by the number of processes.
    """
    if batch_size % process_count:
        raise UserError(f"data.{name} is {batch_size}: not divisible by {process_count} processes.")
    return batch_size // process_count

"""Decode images into batches on the devices, ahead of the model that reads them.

Threads decode, unless `workers` asks for processes. On a machine of 16 cores, threads decoded as much as four cores
would. Presumably they wait for one another, as Python runs one thread at a time. Processes take seconds to start.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import PIL.Image
from jax.sharding import Sharding
from jaxtyping import Array, UInt8

from fastvim_jax.data.augment import eval_transform
from fastvim_jax.data.batches import Stream, plain
from fastvim_jax.data.classification import load_image
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.decode import convert_image, decode_image
from fastvim_jax.data.listing import Texts
from fastvim_jax.data.records import DecodeError
from fastvim_jax.data.stream import WorkersEnded, grain_stream
from fastvim_jax.data.turbo import available_decoder
from fastvim_jax.errors import UserError
from fastvim_jax.own_cores import own_cores

AHEAD = 3
"""Batches that are decoded and copied to the devices at the same time, while the devices compute."""
_WORTH_PROCESSES = 5000
"""Files that threads decode in about the time that processes take to start."""
_MOST_PROCESSES = 16
"""Processes at most, unless more are asked for: as many as were measured. Each loads Python and its libraries again."""
SHARED = "/dev/shm"
"""Folder of shared memory on Linux."""
_log = logging.getLogger(__name__)

Decoded = tuple[int, Array, dict[int, str]]
"""Index of a batch's first image; the padded batch on the devices; by place in the batch why an image is unreadable."""


def decoded_batches(
    images: Any,
    data: ClassificationData,
    *,
    batch_size: int,
    sharding: Sharding,
    workers: int = 0,
) -> Iterator[Decoded]:
    """Yield all images in batches, in order, up to `AHEAD` of them before they are asked for.

    Args:
        images: paths, Pillow images and uint8 arrays, or one uint8 array `n h w c`.
        data: size and crop.
        batch_size: images of a batch; the last one is padded with zeros.
        sharding: where a batch goes.
        workers: processes that decode. They take paths only; any other image is left to threads. Threads also decode
            if shared memory is missing or has no room for the processes' batches.

    Raises:
        UserError: an array of another rank, dtype or number of channels.
    """
    count = math.ceil(len(images) / batch_size)
    paths = workers > 0 and all(isinstance(image, str | Path) for image in images)
    if paths:
        files = [str(image) for image in images]
        try:
            stream = _stream_of_processes(files, data, batch_size, min(workers, count))
        except UserError as error:
            _log.warning("Threads decode the images, without worker processes: %s", error)
        else:
            yield from _by_processes(stream, batch_size, sharding, count)
            return
    with ThreadPoolExecutor(own_cores()) as decoders:
        build = _Builder(images, data, batch_size, sharding, decoders)
        if count == 1:  # Nothing can be built ahead, so no thread has to start.
            yield build(0)
        else:
            yield from _ahead(build, count, threads=AHEAD)


def decoding_workers(files: int, asked: int | None = None) -> int:
    """Return how many processes should decode: those asked for, or one per core if the files are worth their start."""
    if asked is not None:
        return asked
    return min(own_cores(), _MOST_PROCESSES) if files >= _WORTH_PROCESSES else 0


def _ahead(build: Callable[[int], Decoded], count: int, threads: int) -> Iterator[Decoded]:
    """Yield build(0), build(1), ..., built by threads, up to `AHEAD` of them before they are asked for."""
    waiting: collections.deque[Future[Decoded]] = collections.deque()
    with ThreadPoolExecutor(threads, "decode images") as builders:
        try:
            for i in range(count):
                waiting.append(builders.submit(build, i))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()


class _Builder:
    """Build batches by threads. Several batches may be built at the same time."""

    def __init__(
        self,
        images: Any,
        data: ClassificationData,
        batch_size: int,
        sharding: Sharding,
        decoders: ThreadPoolExecutor,
    ) -> None:
        self._images = images
        self._data = data
        self._size = batch_size
        self._sharding = sharding
        self._decoders = decoders
        self._decoder = available_decoder(data)
        self._copies = _copies(sharding)
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        # Two threads must not load one Pillow image at the same time, also for two batches.
        pillow = (x for x in images if isinstance(x, PIL.Image.Image))
        self._turns = {id(image): threading.Lock() for image in pillow}

    def __call__(self, number: int) -> Decoded:
        start = number * self._size
        images = self._images[start : start + self._size]
        if isinstance(images, np.ndarray) and len(images) == self._size and self._ready(images[0]):
            return start, jax.device_put(np.ascontiguousarray(images), self._sharding), {}
        batch = self._buffer()
        batch[len(images) :] = 0
        errors = self._fill(batch, images)
        batch[list(errors)] = 0
        placed = jax.device_put(batch, self._sharding)
        if self._copies:
            # Pages that were written before are written again much faster than new ones.
            placed.block_until_ready()
            self._free.put(batch)
        return start, placed, errors

    def _buffer(self) -> np.ndarray:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return np.empty((self._size, *self._data.height_width, self._data.channels), np.uint8)

    def _ready(self, image: Any) -> bool:
        """Return whether nothing of an image is left to decode, resize or cut."""
        return (
            isinstance(image, np.ndarray)
            and self._data.eval_crop == 1
            and image.dtype == np.uint8
            and image.shape == (*self._data.height_width, self._data.channels)
        )

    def _fill(self, batch: np.ndarray, images: Any) -> dict[int, str]:
        """Write the images' pixels into the batch, and say by place which cannot be read."""
        errors: dict[int, str] = {}

        def fill(places: Sequence[int]) -> None:
            for i in places:
                try:
                    image = images[i]
                    batch[i] = image if self._ready(image) else self._pixels(image)
                except DecodeError as error:
                    errors[i] = str(error)

        places = range(len(images))
        if all(map(self._ready, images)):
            fill(places)  # Copies take less time than handing them to other threads.
        else:
            list(
                self._decoders.map(
                    fill, (places[first :: own_cores()] for first in range(own_cores()))
                )
            )
        return dict(sorted(errors.items()))

    def _pixels(self, image: Any) -> UInt8[np.ndarray, "h w c"]:
        if isinstance(image, str | Path):
            return load_image(image, self._data, decoder=self._decoder)
        if isinstance(image, PIL.Image.Image):
            # As a file's: upright, 8 bits, opaque.
            with self._turns[id(image)]:
                opened = convert_image(
                    image, channels=self._data.channels, background=self._data.background
                )
        else:
            array = np.asarray(image)
            if array.ndim != 3 or array.dtype != np.uint8 or array.shape[2] not in (1, 3):
                raise UserError(
                    f"an image array has shape {array.shape} and dtype {array.dtype}: give `height width channels` of "
                    "uint8, with 1 or 3 channels. Pixels are normalised here, so give them as they are."
                )
            opened = decode_image(array, channels=self._data.channels)
        return eval_transform(opened, self._data)


@dataclasses.dataclass
class _DecodeBatch(grain.transforms.Map):
    """Decode a whole batch of files, in a worker process."""

    files: Texts
    data: ClassificationData
    batch_size: int
    decoder: str

    def map(self, number: int) -> dict[str, np.ndarray]:
        batch = np.zeros((self.batch_size, *self.data.height_width, self.data.channels), np.uint8)
        failed, said = [], []
        start = number * self.batch_size
        for i, file in enumerate(self.files[start : start + self.batch_size]):
            try:
                batch[i] = load_image(file, self.data, decoder=self.decoder)
            except DecodeError as error:
                failed.append(i)
                said.append(str(error))
        return {
            "image": batch,
            "failed": np.asarray(failed, np.int64),
            "said": np.asarray(said, str),
        }


def _stream_of_processes(
    files: Sequence[str], data: ClassificationData, batch_size: int, workers: int
) -> Stream:
    """Return a stream of decoded batches. Its processes start with the first one.

    Raises:
        UserError: shared memory is missing, read-only or too small.
    """
    if sys.platform == "linux" and not os.access(SHARED, os.W_OK):
        raise UserError(f"{SHARED} is missing or read-only, and processes need shared memory.")
    decode = _DecodeBatch(Texts(files), data, batch_size, available_decoder(data))
    batches = grain.MapDataset.source(range(math.ceil(len(files) / batch_size))).map(decode)
    size = batch_size * math.prod((*data.height_width, data.channels))
    return grain_stream(batches, workers, batch_bytes=size)


def _by_processes(
    stream: Stream, batch_size: int, sharding: Sharding, count: int
) -> Iterator[Decoded]:
    running: Any = stream(0)
    copies = _copies(sharding)

    def place(number: int) -> Decoded:
        try:
            batch = next(running)
        except WorkersEnded as error:
            raise WorkersEnded(
                f"a process that decodes images ended ({error.__cause__}). Use fewer workers if memory is short, or "
                'workers=0 for threads. A script that asks for workers must do so below `if __name__ == "__main__":`, '
                "because every process imports it."
            ) from error
        pixels = plain(batch)["image"]
        placed = jax.device_put(pixels if copies else np.array(pixels), sharding)
        if copies:
            placed.block_until_ready()  # The worker's memory is freed when the next batch is taken.
        errors = dict(zip(batch["failed"].tolist(), batch["said"].tolist(), strict=True))
        return number * batch_size, placed, errors

    try:
        yield from _ahead(place, count, threads=1)
    finally:
        running.close()


def _copies(sharding: Sharding) -> bool:
    """Return whether the devices have memory of their own, so that arrays are copied to them."""
    devices: Any = sharding.device_set
    return all(device.platform != "cpu" for device in devices)

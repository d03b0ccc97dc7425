"""Crop and resize images of pixel shards on the device: the host draws and copies boxes, and computes no pixels.

1. Workers draw each record's box and augmentation, as they do for crops on the host (`planned_example`).
2. Threads of this process copy the boxes' pixels from the shards into one buffer per batch (`pixel_boxes`).
3. The buffer goes to the device, where a small program resizes the boxes before the step (`resize_packed`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int64, Integer

from fastvim_jax.data.augment import draw_augmentation
from fastvim_jax.data.batches import Stream, owned
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.device_resize import resize_packed
from fastvim_jax.data.pixel_boxes import BoxReader
from fastvim_jax.data.records import Source
from fastvim_jax.data.sources.part import unwrapped
from fastvim_jax.data.transforms import random_box
from fastvim_jax.errors import UserError

PLANNERS = 4
"""Largest number of workers per device. Few are enough, because they draw boxes and read no pixels."""
CROP = "crop"
"""Key of the batches' drawn boxes, int64 `b 6`; see `pixel_boxes.BoxReader.read`."""

_THREADS = 8  # reading threads per device
_MOST_THREADS = 32  # reading threads per process
_AHEAD = 2  # batches that are being read
_BUFFERS = 4  # the batches being read, and as many that the device may still be copying
_STEPS = 8  # buffer sizes between two powers of two: each size compiles a program
_MOST = 2**31 - 1  # bytes of a buffer that int32 indices can address
_TILE = (
    16  # the largest box has sides that are multiples of this, which suits the GPU's matrix units
)


def crops_on_device(config: ClassificationData) -> bool:
    """Return whether training batches are cropped on the device: colour crops of pixel shards, augmented there."""
    return (
        config.source == "pixels"
        and config.augment_on == "device"
        and config.crop == "random_resized"
        and config.channels == 3
        and not config.resident
    )


def most_planners(mesh: Mesh | None) -> int:
    """Return the largest number of workers of use to this process's devices of a mesh."""
    return PLANNERS * (1 if mesh is None else len(mesh.local_devices))


def planned_example(
    source: Source, index: int, config: ClassificationData, rng: np.random.Generator
) -> dict[str, Any]:
    """Draw a record's crop and augmentation without reading its pixels.

    The numbers are those that `augment.train_example` draws.

    Returns:
        `CROP`, `label`, and what `augment.draw_augmentation` returns.

    Raises:
        DecodeError: the record's label is none of the classes.
    """
    whole, number = unwrapped(source, index)
    file, offset, height, width, channels, label = whole.place(number)
    left, top, right, bottom = random_box(width, height, rng, config.crop_scale, config.crop_aspect)
    first = offset + (top * width + left) * channels
    crop = np.array([file, first, width, bottom - top, right - left, channels], np.int64)
    return {CROP: crop, "label": label, **draw_augmentation(config, rng)}


@dataclasses.dataclass
class PackedBatch:
    """One device's boxes of a batch on the host: the first arguments of `device_resize.resize_packed`."""

    pixels: np.ndarray
    table: np.ndarray


class _Buffer:
    """Hold the host memory of one batch. It is reused when the device has copied it."""

    def __init__(self) -> None:
        self._memory = np.zeros(0, np.uint8)
        self.in_use: list[jax.Array] = []

    def take(self, size: int) -> np.ndarray:
        """Wait until the device no longer needs the content, and return memory of `size` bytes."""
        jax.block_until_ready(self.in_use)
        self.in_use = []
        if len(self._memory) < size:
            self._memory = np.zeros(size, np.uint8)
        return self._memory[:size]


def packed_batches(
    plans: Iterator[dict[str, Any]], source: Source, parts: list[slice]
) -> Generator[tuple[dict[str, Any], list[PackedBatch], _Buffer], None, None]:
    """Read the boxes of planned batches, `_AHEAD` batches ahead.

    A batch's memory is used again once `_BUFFERS - 1` more have been taken and the arrays in `in_use` are ready.

    Args:
        plans: batches of `planned_example`.
        source: data set that they were planned for.
        parts: which examples of a batch each device gets.

    Yields:
        Labels and augmentation of a batch, the boxes of each part, and the buffer that holds their pixels.

    Raises:
        UserError: a shard cannot be read, or a device's part is larger than it can address.
    """
    whole, _ = unwrapped(source, 0)
    threads = min(_MOST_THREADS, _THREADS * len(parts))
    with contextlib.closing(BoxReader(whole.files, threads)) as reader:
        waiting: collections.deque[Any] = collections.deque()
        buffers = itertools.cycle([_Buffer() for _ in range(_BUFFERS)])
        capacity = 0
        while True:
            while len(waiting) < _AHEAD and (plan := next(plans, None)) is not None:
                plan = dict(owned(plan))
                crop = plan.pop(CROP)
                # It never shrinks, because each new size compiles a program.
                capacity = max(capacity, _capacity(crop, parts))
                waiting.append((plan, *_begin(reader, next(buffers), crop, parts, capacity)))
            if not waiting:
                return
            plan, packed, buffer, reads = waiting.popleft()
            for read in reads:
                read.result()
            yield plan, packed, buffer


def _capacity(crop: Int64[np.ndarray, "b 6"], parts: list[slice]) -> int:
    """Return how many bytes each device's part gets, rounded up so that most batches get the same."""
    sizes = crop[:, 3:].prod(1)
    most = max(int(sizes[part].sum()) for part in parts)
    step = max(1, 2 ** (most.bit_length() - 1) // _STEPS)
    capacity = -(-most // step) * step
    if capacity > _MOST:
        raise UserError(
            f"The crops of one device's images take {capacity / 2**30:.1f} GiB, more than it can address: use a "
            "smaller data.batch_size, or set data.augment_on=host."
        )
    return capacity


def _begin(
    reader: BoxReader,
    buffer: _Buffer,
    crop: Int64[np.ndarray, "b 6"],
    parts: list[slice],
    capacity: int,
) -> tuple[list[PackedBatch], _Buffer, list[Any]]:
    """Begin to read a batch. Return each device's part, the memory, and the reads to wait for."""
    sizes = crop[:, 3:].prod(1)
    memory = buffer.take(len(parts) * capacity)
    packed, starts = [], np.zeros(len(crop), np.int64)
    for number, part in enumerate(parts):
        begin = np.cumsum(sizes[part]) - sizes[part]
        starts[part] = number * capacity + begin
        table = np.concatenate([begin[:, None], crop[part, 3:]], axis=1).astype(np.int32)
        packed.append(PackedBatch(memory[number * capacity : (number + 1) * capacity], table))
    return packed, buffer, reader.read(crop, starts, memory)


def device_crop_stream(
    plans: Stream,
    source: Source,
    config: ClassificationData,
    *,
    batch_size: int,
    mesh: Mesh | None,
    first: int = 0,
) -> Stream:
    """Return a function that iterates over cropped batches from a given number on.

    Args:
        plans: iterates over this process's batches of `planned_example`.
        source: data set that they were planned for.
        config: how to crop.
        batch_size: images of this process's batches.
        mesh: the devices that share a global batch. `image` is then the global array. None: `image` holds this
            process's images, on its first device.
        first: number of this process's first image in the global batch.
    """
    whole, _ = unwrapped(source, 0)
    heights, widths = whole.sizes
    most = largest_box(heights, widths, config.crop_aspect)
    sharding = None if mesh is None else NamedSharding(mesh, P(mesh.axis_names))
    shape = (config.batch_size, *config.height_width, 3)
    parts: dict[Any, slice] = {None: slice(0, batch_size)}
    if sharding is not None:
        places = sharding.addressable_devices_indices_map(shape)
        bounds = {d: (index or (slice(None),))[0].indices(shape[0]) for d, index in places.items()}
        parts = {
            device: slice(start - first, stop - first)
            for device, (start, stop, _) in bounds.items()
        }

    def stream(number: int) -> Generator[dict[str, Any], None, None]:
        with contextlib.closing(plans(number)) as planned:
            batches = packed_batches(planned, source, list(parts.values()))
            with contextlib.closing(batches):
                for batch, packed, buffer in batches:
                    pieces = []
                    for device, part in zip(parts, packed, strict=True):
                        placed = jax.device_put((part.pixels, part.table), device)
                        image, done = resize_packed(*placed, size=config.height_width, most=most)
                        pieces.append(image)
                        buffer.in_use.append(done)
                    image = (
                        pieces[0]
                        if sharding is None
                        else jax.make_array_from_single_device_arrays(shape, sharding, pieces)
                    )
                    yield {**batch, "image": image}

    return stream


def largest_box(
    height: Integer[np.ndarray, " n"], width: Integer[np.ndarray, " n"], aspect: tuple[float, float]
) -> tuple[int, int]:
    """Return a bound on height and width, in whole tiles, of any box that `random_box` draws in such images."""
    # Sides are rounded to whole pixels after the aspect has been drawn.
    rows = np.minimum(height, np.floor((width + 0.5) / aspect[0] + 0.5))
    columns = np.minimum(width, np.floor((height + 0.5) * aspect[1] + 0.5))
    tall, wide = (math.ceil(side.max() / _TILE) * _TILE for side in (rows, columns))
    return tall, wide

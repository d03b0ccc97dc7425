"""Decode a data set of small images once, keep it on the device, and gather batches there.

Seed and epoch decide the permutation of the images. The train step crops and flips them (`device_transforms`), so the
host sends only the indices of each batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, UInt8

from fastvim_jax.data.augment import eval_transform
from fastvim_jax.data.batches import BatchIterator, decode_record, local_batch
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.records import DecodeError, Source
from fastvim_jax.data.transforms import resized, to_array
from fastvim_jax.data.turbo import Picture
from fastvim_jax.errors import UserError
from fastvim_jax.own_cores import own_cores

_SHARE_OF_MEMORY = 0.5


def resident_training(
    source: Source,
    config: ClassificationData,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Return an endless iterator over training batches, reshuffled each epoch; see `make_train_iterator`.

    The images are uint8 and have the model's input size. They are neither shifted nor flipped yet. Records that cannot
    be decoded are left out.

    Raises:
        UserError: the images do not fit into memory, or do not fill one batch.
    """
    size, local = config.batch_size, local_batch(config.batch_size, process_count, "batch_size")
    images = _Images(source, config, lambda image: to_array(resized(image, stored_size(config))))
    steps = len(images.kept) // size
    if steps == 0:
        raise UserError(
            f"data.batch_size is {size}, but {config.source} {config.train_split} holds only "
            f"{len(images.kept)} images that can be decoded."
        )

    def stream(first: int) -> Generator[dict[str, Any], None, None]:
        number, epoch = first, -1
        order = np.zeros(0, np.int64)
        while True:
            if number // steps != epoch:
                epoch = number // steps
                order = np.random.default_rng((seed, epoch)).permutation(len(images.kept))
            start = number % steps * size + process_index * local
            yield images.batch(order[start : start + local])
            number += 1

    return BatchIterator(
        stream,
        source,
        config,
        steps_per_epoch=steps,
        identity={"seed": seed, "records": len(source), "batch_size": size, "order": "resident"},
    )


def resident_evaluation(
    source: Source,
    config: ClassificationData,
    *,
    split: str,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Return an iterator over one pass of the data; see `make_eval_iterator`. `rewind` does not decode again.

    Raises:
        UserError: the images do not fit into memory.
    """
    local = local_batch(batch_size, process_count, "eval_batch_size")
    images = _Images(source, config, lambda image: eval_transform(image, config))
    steps = -(-len(images.kept) // batch_size)

    def stream(first: int) -> Generator[dict[str, Any], None, None]:
        for number in range(first, steps):
            start = number * batch_size + process_index * local
            indices = np.arange(start, start + local)
            valid = indices < len(images.kept)
            yield {**images.batch(np.where(valid, indices, 0), valid), "valid": valid}

    return BatchIterator(
        stream,
        source,
        config,
        steps_per_epoch=steps,
        identity={"split": split, "records": len(source), "batch_size": batch_size},
    )


class _Images:
    """All decodable images of a source. The constructor decodes them; the first batch sends them to the device.

    Attributes:
        kept: indices of the records that could be decoded.
        corrupt: indices of the records that could not.
    """

    def __init__(
        self,
        source: Source,
        config: ClassificationData,
        transform: Callable[[Picture], UInt8[np.ndarray, "h w c"]],
    ) -> None:
        shape = (len(source), *config.height_width, config.channels)
        check_memory(shape)
        pixels, labels = np.empty(shape, np.uint8), np.empty(len(source), np.int32)

        def load(index: int) -> bool:
            try:
                record, image = decode_record(source, index, config)
            except DecodeError:
                return False
            pixels[index], labels[index] = transform(image), record.target
            return True

        with ThreadPoolExecutor(own_cores()) as threads:
            decoded = np.fromiter(threads.map(load, range(len(source))), np.bool_, len(source))
        self.kept, self.corrupt = np.flatnonzero(decoded), np.flatnonzero(~decoded)
        whole = len(self.kept) == len(source)
        self._host = (pixels, labels) if whole else (pixels[self.kept], labels[self.kept])

    @cached_property
    def _device(self) -> tuple[Array, Array]:
        pixels, labels = self._host
        del self._host
        return jax.device_put(pixels), jax.device_put(labels)

    def batch(
        self, indices: Int[np.ndarray, " b"], valid: Bool[np.ndarray, " b"] | None = None
    ) -> dict[str, Any]:
        """Gather images and labels by their indices into `kept`, on the device; zeros where not `valid`."""
        image, label = _gather(*self._device, indices.astype(np.int32), valid)
        return {"image": image, "label": label, "corrupt": self.corrupt}


@jax.jit
def _gather(
    images: UInt8[Array, "n h w c"],
    labels: Int32[Array, " n"],
    indices: Int32[Array, " b"],
    valid: Bool[Array, " b"] | None,
) -> tuple[Array, Array]:
    image, label = images[indices], labels[indices]
    if valid is not None:
        image = jnp.where(valid[:, None, None, None], image, 0)
        label = jnp.where(valid, label, 0)
    return image, label


def stored_size(config: ClassificationData) -> tuple[int, int]:
    """Return height and width of the images as they are kept."""
    if config.crop == "random_resized":
        return config.resident_size, config.resident_size
    return config.height_width


def check_memory(
    shape: tuple[int, ...],
    advice: str = ", or spread the set over several devices with data.resident_shares",
) -> None:
    """Raise if the images would fill more than half of the memory, before hours are spent on decoding them."""
    needed = int(np.prod(shape, dtype=np.int64))
    statistics = jax.local_devices()[0].memory_stats() or {}
    memory = statistics.get("bytes_limit", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if needed > _SHARE_OF_MEMORY * memory:
        raise UserError(
            f"data.resident=True needs {needed / 2**30:.1f} GiB for {shape[0]} images, more than half of the "
            f"device's {memory / 2**30:.1f} GiB: set data.resident=False{advice}."
        )

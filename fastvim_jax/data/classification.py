"""Build the batches of image classification: grain pipelines that shuffle, decode, augment and batch records.

Batches are random access (`grain.MapDataset`): the seed and the number of a batch decide its content, whatever the
number of workers or processes, and after any restart. So the iterator's state is little more than the number of batches
taken.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from fastvim_jax.data.augment import DRAWN, eval_transform, train_example
from fastvim_jax.data.batches import (
    BatchIterator,
    decode_record,
    evaluation_batch,
    local_batch,
    open_split,
)
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.device_crops import (
    CROP,
    crops_on_device,
    device_crop_stream,
    most_planners,
    planned_example,
)
from fastvim_jax.data.records import DecodeError, Source, printable
from fastvim_jax.data.resident import resident_evaluation, resident_training
from fastvim_jax.data.resident_shares import in_shares, sharded_training
from fastvim_jax.data.stream import evaluation_stream, grain_stream
from fastvim_jax.data.tar_members import read_image_file
from fastvim_jax.data.turbo import available_decoder, chosen_decoder, open_image
from fastvim_jax.errors import UserError, counted

_Example = Callable[[Source, int, ClassificationData, np.random.Generator], dict[str, Any]]
_REPLACEMENTS = 100
"""Undecodable records drawn in a row before the path is taken for a wrong one."""


def make_train_iterator(
    config: ClassificationData,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    mesh: Mesh | None = None,
) -> BatchIterator:
    """Return an endless iterator over augmented training batches, reshuffled each epoch.

    Each epoch takes every record at most once, and drops the last records if they do not fill a batch. With several
    processes, each process gets a contiguous part of every global batch.

    Args:
        config: what to read and how to augment it.
        seed: seed of the order and of the augmentation, from 0 to 2**32 - 1.
        process_index: this process's number.
        process_count: number of processes that share a global batch.
        mesh: the devices that share a batch. It matters where images are kept or cropped on the device. By default a
            resident set is kept on all devices, and images are cropped on this process's first device.

    Raises:
        UserError: the data set cannot be found, or it holds fewer records than one batch.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"The data seed is {seed}, but must lie within 0 and 2**32 - 1.")
    source = open_split(config, config.train_split)
    local = local_batch(config.batch_size, process_count, "batch_size")
    steps = len(source) // config.batch_size
    if steps == 0:
        raise UserError(
            f"data.batch_size is {config.batch_size}, but {config.source} {config.train_split} holds only "
            f"{counted(len(source), 'image')}: use a batch size of at most {len(source)}."
        )
    if in_shares(config):
        mesh = mesh or Mesh(np.asarray(jax.devices()), ("data",))
        return sharded_training(source, config, mesh, seed=seed)
    if config.resident:
        return resident_training(
            source, config, seed=seed, process_index=process_index, process_count=process_count
        )
    share = train_batches(source, config, seed=seed, batch_size=local)[process_index::process_count]
    decoder: str = chosen_decoder(config)
    if crops_on_device(config):
        decoder = "device"
        stream = device_crop_stream(
            grain_stream(share, min(config.workers, most_planners(mesh))), source, config,
            batch_size=local, mesh=mesh, first=process_index * local,
        )  # fmt: skip
    else:
        stream = grain_stream(share, config.workers, batch_bytes=local * _image_bytes(config))
    return BatchIterator(
        stream,
        source,
        config,
        steps_per_epoch=steps,
        identity={
            "seed": seed,
            "records": len(source),
            "batch_size": config.batch_size,
            "decoder": decoder,
        },
    )


def train_batches(
    source: Source, config: ClassificationData, *, seed: int, batch_size: int
) -> grain.MapDataset:
    """Build the endless sequence of training batches. Indexing it reads, decodes and augments one batch.

    Where images are cropped on the device, it only draws (`device_crops.planned_example`).

    Args:
        source: the records.
        config: how to decode and augment them. Each epoch drops the last records that do not fill a batch of
            `config.batch_size`.
        seed: seed of the order and of the augmentation.
        batch_size: images per batch of this sequence, a divisor of `config.batch_size`.
    """
    records = grain.MapDataset.source(range(len(source))).seed(seed).shuffle()
    example: _Example = planned_example
    if not crops_on_device(config):
        example = functools.partial(_decoded_example, decoder=chosen_decoder(config))
    images = records.random_map(_LoadForTraining(source, config, example))
    whole = len(source) // config.batch_size * config.batch_size
    return images[:whole].batch(batch_size, batch_fn=_stack).repeat(None)


def make_eval_iterator(
    config: ClassificationData,
    *,
    split: str | None = None,
    batch_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Return an iterator over one pass over a split, in the source's order and without augmentation.

    The last batch is padded with zero images whose `valid` is False. So counts over `valid` are exact, and every
    process takes the same number of steps.

    Args:
        config: what to read.
        split: the split to read; by default `config.eval_split`.
        batch_size: images per global batch; by default `config.eval_batch_size`, or else `config.batch_size`.
        process_index: this process's number.
        process_count: number of processes that share a global batch.

    Raises:
        UserError: the data set cannot be found, or a batch size below 1.
    """
    split = split or config.eval_split
    source = open_split(config, split)
    size = evaluation_batch(batch_size, config)
    local = local_batch(size, process_count, "eval_batch_size")
    if config.resident and not in_shares(config):
        return resident_evaluation(
            source, config, split=split, batch_size=size,
            process_index=process_index, process_count=process_count,
        )  # fmt: skip
    steps = math.ceil(len(source) / size)
    positions = grain.MapDataset.source(range(steps * size))
    load = _LoadForEvaluation(source, config, available_decoder(config))
    batches = positions.map(load).batch(local, batch_fn=_stack)
    share = batches[process_index::process_count]
    stream, endless = evaluation_stream(
        share, config.workers, batch_bytes=local * _image_bytes(config)
    )
    return BatchIterator(
        stream,
        source,
        config,
        steps_per_epoch=steps,
        identity={"split": split, "records": len(source), "batch_size": size},
        ends=endless,  # The iterator ends each pass itself.
    )


def load_image(
    file: str | Path, config: ClassificationData, *, decoder: str | None = None
) -> UInt8[np.ndarray, "h w c"]:
    """Read one image file the way evaluation does: decode, resize, centre crop.

    Args:
        file: its name, or `shard.tar/member`.
        config: how to read it.
        decoder: `available_decoder(config)`, found once for many files.

    Raises:
        DecodeError: the file cannot be read, or is not an image.
    """
    image = open_image(
        read_image_file(file),
        channels=config.channels,
        name=printable(str(file)),
        decoder=decoder or available_decoder(config),
        background=config.background,
    )
    return eval_transform(image, config)


def _image_bytes(config: ClassificationData) -> int:
    return math.prod((*config.height_width, config.channels))


@dataclasses.dataclass
class _LoadForTraining(grain.transforms.RandomMap):
    """Make a record's example. Replace an undecodable record by another, drawn at random."""

    source: Source
    config: ClassificationData
    example: _Example

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        corrupt: list[int] = []
        while len(corrupt) < _REPLACEMENTS:
            try:
                example = self.example(self.source, index, self.config, rng)
            except DecodeError as error:
                reason = str(error)
                corrupt.append(index)
                index = int(rng.integers(len(self.source)))
                continue
            return {**example, "corrupt": corrupt}
        raise UserError(
            f"{_REPLACEMENTS} records drawn one after the other are undecodable, the last because: {reason} "
            "Is data.path the right folder?"
        )


def _decoded_example(
    source: Source,
    index: int,
    config: ClassificationData,
    rng: np.random.Generator,
    *,
    decoder: str,
) -> dict[str, Any]:
    """Decode a record, and crop and augment it as far as the host does that."""
    record, image = decode_record(source, index, config, decoder)
    return {**train_example(image, config, rng), "label": record.target}


@dataclasses.dataclass
class _LoadForEvaluation(grain.transforms.Map):
    """Decode a record. Positions past the end and undecodable records become zeros that do not count."""

    source: Source
    config: ClassificationData
    decoder: str

    def map(self, index: int) -> dict[str, Any]:
        corrupt: list[int] = []
        if index < len(self.source):
            try:
                record, image = decode_record(self.source, index, self.config, self.decoder)
                pixels = eval_transform(image, self.config)
                return {"image": pixels, "label": record.target, "valid": True, "corrupt": corrupt}
            except DecodeError:
                corrupt.append(index)
        zeros = np.zeros((*self.config.height_width, self.config.channels), np.uint8)
        return {"image": zeros, "label": 0, "valid": False, "corrupt": corrupt}


def _stack(elements: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Stack the examples of a batch, and list the indices of its undecodable records, however many there are."""
    batch = {
        "label": np.asarray([e["label"] for e in elements], np.int32),
        "corrupt": np.asarray([index for e in elements for index in e["corrupt"]], np.int64),
    }
    stacked = ("image", CROP, *DRAWN)
    batch |= {key: np.stack([e[key] for e in elements]) for key in stacked if key in elements[0]}
    if "valid" in elements[0]:
        batch["valid"] = np.asarray([e["valid"] for e in elements], np.bool_)
    return batch

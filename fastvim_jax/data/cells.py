"""Batches of images of any number of channels: grain pipelines that cut, batch and choose channels.

What the host does is cheap: read, cut to the input's size, pick the channels of the step. Turns, defocus, dropout and
normalisation run inside the step (`cells_device`). A batch is a function of its number and the seed alone, the draw of
its channels too, so every process of a run and every resumed run sees the same channels in the same step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32, UInt8

from fastvim_jax.data.batches import BatchIterator, evaluation_batch, local_batch
from fastvim_jax.data.cells_config import CellsData, ChannelSampling
from fastvim_jax.data.multichannel import MultiChannel, axes_hint, in_order, read_channels, to_uint8
from fastvim_jax.data.records import DecodeError, Record, Source, read_record
from fastvim_jax.data.sources import open_source
from fastvim_jax.data.stream import evaluation_stream, grain_stream
from fastvim_jax.data.tar_members import read_image_file
from fastvim_jax.errors import UserError, counted

_REPLACEMENTS = 100
_CHANNEL_STREAM = 0xCE11
"""Keeps the draws of channels apart from other draws of the same seed."""


def make_train_iterator(
    config: CellsData, *, seed: int, process_index: int = 0, process_count: int = 1
) -> BatchIterator:
    """Return an endless iterator over training batches, reshuffled each epoch.

    Batches hold `image` uint8 `b h w k`, `label` `b` and, with channel sampling, `channel_ids` `b k`, the same in every
    row. Each epoch takes every record at most once and drops the remainder that fills no batch.

    Args:
        config: what to read and which channels to see.
        seed: decides order, cuts and channels, from 0 to 2**32 - 1.
        process_index: this process's number.
        process_count: how many processes share a batch.

    Raises:
        UserError: when the data cannot be found or hold less than one batch.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"The data seed is {seed}, but must lie within 0 and 2**32 - 1.")
    source = _open(config, config.train_split)
    local = local_batch(config.batch_size, process_count, "batch_size")
    steps = len(source) // config.batch_size
    if steps == 0:
        raise UserError(
            f"data.batch_size is {config.batch_size}, but {config.source} {config.train_split} holds only "
            f"{counted(len(source), 'image')}: use a batch size of at most {len(source)}."
        )
    records = grain.MapDataset.source(range(len(source))).seed(seed).shuffle()
    images = records.random_map(_LoadForTraining(source, config))
    whole = steps * config.batch_size
    batches = images[:whole].batch(local, batch_fn=_stack).repeat(None)
    mine = batches[process_index::process_count]
    if config.channel_sampling != "none":
        mine = mine.map_with_index(_SampleChannels(seed, config.channels, config.channel_sampling))
    return BatchIterator(
        grain_stream(mine, config.workers, batch_bytes=local * _image_bytes(config)),
        source,
        config,
        steps_per_epoch=steps,
        identity={"seed": seed, "records": len(source), "batch_size": config.batch_size},
        reread=_Decode(source, config),
    )


def make_eval_iterator(
    config: CellsData,
    *,
    split: str | None = None,
    batch_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Return an iterator over one pass in the source's order, cut at the centre, with the channels of `eval_channels`.

    The last batch is padded with zero images whose `valid` is False.

    Args:
        config: what to read.
        split: defaults to `config.eval_split`.
        batch_size: images per step over all processes; defaults to `config.eval_batch_size` or `batch_size`.
        process_index: this process's number.
        process_count: how many processes share a batch.

    Raises:
        UserError: when the data cannot be found, or a batch size below 1.
    """
    split = split or config.eval_split
    source = _open(config, split)
    size = evaluation_batch(batch_size, config)
    local = local_batch(size, process_count, "eval_batch_size")
    steps = -(-len(source) // size)
    positions = grain.MapDataset.source(range(steps * size))
    batches = positions.map(_LoadForEvaluation(source, config)).batch(local, batch_fn=_stack)
    if config.eval_channels:
        batches = batches.map(_TakeChannels(config.eval_ids))
    stream, stay = evaluation_stream(
        batches[process_index::process_count],
        config.workers,
        batch_bytes=local * _image_bytes(config),
    )
    return BatchIterator(
        stream,
        source,
        config,
        steps_per_epoch=steps,
        identity={"split": split, "records": len(source), "batch_size": size},
        reread=_Decode(source, config),
        ends=stay,
    )


def load_image(file: str | Path, config: CellsData) -> UInt8[np.ndarray, "h w c"]:
    """Read one image file of all channels the way evaluation does: decode, cut at the centre.

    Raises:
        DecodeError: when the file cannot be read, is no image, or has other channels.
    """
    return cut(_pixels(Record(read_image_file(file), 0, str(file)), config), config.height_width)


def draw_channels(
    seed: int, step: int, channels: int, sampling: ChannelSampling
) -> Int32[np.ndarray, " k"]:
    """Draw the channels that a step sees: k uniform in 1..channels, then k of them without replacement.

    Source: Bao et al., Channel Vision Transformers, section 3.3 (hierarchical channel sampling).
    """
    rng = np.random.default_rng((_CHANNEL_STREAM, seed, step))
    chosen = rng.permutation(channels)[: rng.integers(1, channels + 1)]
    return (np.sort(chosen) if sampling == "sorted" else chosen).astype(np.int32)


def take_channels(
    batch: dict[str, np.ndarray], ids: Int32[np.ndarray, " k"]
) -> dict[str, np.ndarray]:
    """Keep the channels `ids` of a batch, and note them in `channel_ids` `b k`."""
    image = np.ascontiguousarray(batch["image"][..., ids])
    return batch | {"image": image, "channel_ids": np.tile(ids, (len(image), 1))}


def cut(
    pixels: UInt8[np.ndarray, "h w c"],
    size: tuple[int, int],
    rng: np.random.Generator | None = None,
) -> UInt8[np.ndarray, "h2 w2 c"]:
    """Cut to (height, width), at random if `rng` is given, else at the centre; pad with zeros where smaller."""
    missing = [max(0, wanted - have) for wanted, have in zip(size, pixels.shape[:2], strict=True)]
    if any(missing):
        padding = [(m // 2, m - m // 2) for m in missing]
        pixels = np.pad(pixels, [*padding, (0, 0)])
    room = [have - wanted for wanted, have in zip(size, pixels.shape[:2], strict=True)]
    top, left = (r // 2 if rng is None else int(rng.integers(0, r + 1)) for r in room)
    return pixels[top : top + size[0], left : left + size[1]]


def _image_bytes(config: CellsData) -> int:
    return math.prod((*config.height_width, config.channels))


def _open(config: CellsData, split: str) -> Source:
    source = open_source(
        config.source,
        split,
        path=config.path,
        class_list=config.class_list,
        follow_links=config.follow_links,
        channels=config.channel_names,
    )
    stored = tuple(getattr(source, "channel_names", ()))
    if stored and config.channel_names and stored != config.channel_names:
        raise UserError(
            f"data.channel_names is {', '.join(config.channel_names)}, but the images hold {', '.join(stored)}: give "
            "the names in this order."
        )
    return source


def _pixels(record: Record, config: CellsData) -> UInt8[np.ndarray, "h w c"]:
    image: MultiChannel = read_channels(record.image, record.name)
    pixels = in_order(image, config.names, record.name)
    if pixels.shape[-1] != config.channels:
        raise DecodeError(
            f"{record.name}: {counted(pixels.shape[-1], 'channel')}, but data.channels is {config.channels}."
            f"{axes_hint(pixels, config.channels)}"
        )
    return to_uint8(pixels)


@dataclasses.dataclass
class _Decode:
    """Read and decode a record by its number, so that an undecodable one can be named with its cause."""

    source: Source
    config: CellsData

    def __call__(self, index: int) -> tuple[Record, UInt8[np.ndarray, "h w c"]]:
        record = read_record(self.source, index)
        return record, _pixels(record, self.config)


@dataclasses.dataclass
class _LoadForTraining(grain.transforms.RandomMap):
    """Decode and cut a record; an undecodable one is replaced by another, drawn at random."""

    source: Source
    config: CellsData

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        decode = _Decode(self.source, self.config)
        corrupt: list[int] = []
        while len(corrupt) < _REPLACEMENTS:
            try:
                record, pixels = decode(index)
            except DecodeError as error:
                reason = str(error)
                corrupt.append(index)
                index = int(rng.integers(len(self.source)))
                continue
            place = rng if self.config.crop == "random" else None
            image = cut(pixels, self.config.height_width, place)
            return {"image": image, "label": record.target, "corrupt": corrupt}
        raise UserError(
            f"{_REPLACEMENTS} records drawn one after the other are undecodable, the last because: {reason} "
            "Is data.path the right folder?"
        )


@dataclasses.dataclass
class _LoadForEvaluation(grain.transforms.Map):
    """Decode a record; positions past the end, and undecodable records, become zeros that do not count."""

    source: Source
    config: CellsData

    def map(self, index: int) -> dict[str, Any]:
        corrupt: list[int] = []
        if index < len(self.source):
            try:
                record, pixels = _Decode(self.source, self.config)(index)
                image = cut(pixels, self.config.height_width)
                return {"image": image, "label": record.target, "valid": True, "corrupt": corrupt}
            except DecodeError:
                corrupt.append(index)
        zeros = np.zeros((*self.config.height_width, self.config.channels), np.uint8)
        return {"image": zeros, "label": 0, "valid": False, "corrupt": corrupt}


@dataclasses.dataclass
class _SampleChannels(grain.transforms.MapWithIndex):
    """Keep the channels that the step draws; the index of a process's batch is the step's number."""

    seed: int
    channels: int
    sampling: ChannelSampling

    def map_with_index(self, index: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return take_channels(batch, draw_channels(self.seed, index, self.channels, self.sampling))


@dataclasses.dataclass
class _TakeChannels(grain.transforms.Map):
    """Keep the same channels of every batch."""

    ids: tuple[int, ...]

    def map(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return take_channels(batch, np.asarray(self.ids, np.int32))


def _stack(elements: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Stack a batch; the undecodable records' indices are listed, whatever their number."""
    batch = {
        "image": np.stack([e["image"] for e in elements]),
        "label": np.asarray([e["label"] for e in elements], np.int32),
        "corrupt": np.asarray([index for e in elements for index in e["corrupt"]], np.int64),
    }
    if "valid" in elements[0]:
        batch["valid"] = np.asarray([e["valid"] for e in elements], np.bool_)
    return batch

"""Make batches of images with label maps for training, and read whole images one by one for slide inference.

Batches are random access (`grain.MapDataset`), as in classification: batch i of a seed is the same for any number of
workers or processes and after any restart.

A training image passes through these steps: resize to fit (2048 r, 512 r) with a random r; crop so that no class fills
more than 75 %; flip; distort colours; pad. Pixels stay uint8: `normalise` runs on the device, and makes the padding 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from fastvim_jax.data.batches import BatchIterator, local_batch, owned
from fastvim_jax.data.decode import decode_image
from fastvim_jax.data.geometry import Scene, fitted_size, flip, pad, resize_image, resize_mask
from fastvim_jax.data.photometric import distort, draw_distortion
from fastvim_jax.data.records import DecodeError, read_record
from fastvim_jax.data.segmentation_config import SegmentationData
from fastvim_jax.data.sources import expand_path
from fastvim_jax.data.sources.mask_folder import (
    MaskFolderSource,
    counts_from_one,
    read_mask,
    segmentation_classes,
)
from fastvim_jax.data.stream import evaluation_stream, grain_stream
from fastvim_jax.errors import UserError, counted

IGNORED = 255
"""Label of pixels that do not count, whatever label the files use."""
_REPLACEMENTS = 100  # unreadable records in a row before the data set is taken for damaged
_CROPS = 10  # crops tried for one image

Draw = Callable[[int, int], tuple[int, int]]
"""Function from the largest possible offsets (rows, columns) to the drawn offsets of a crop."""


def open_masks(
    config: SegmentationData, split: str, *, allow_missing: bool = False
) -> MaskFolderSource:
    """Open one split of a folder of images and masks.

    Raises:
        UserError: the folder or the class list is missing, there is no image, images have no masks, there are more
            than 255 classes, or the class list numbers them from 1 and `zero_is_ignored` is not set.
    """
    root = expand_path(config.path)
    if not root.is_dir():
        raise UserError(f"The data folder {str(root)!r} does not exist (data.path).")
    listed = expand_path(config.class_list) if config.class_list else None
    names = segmentation_classes(root, listed, config.classes)
    if len(names) > IGNORED:
        raise UserError(
            f"{len(names)} classes: label maps are 8 bits wide here, so there are at most 255."
        )
    if counts_from_one(root, listed) and not config.zero_is_ignored:
        raise UserError(
            "the class list numbers its classes from 1, so that label 0 means unlabelled; without "
            "data.zero_is_ignored=True every label would be taken for the class after its own."
        )
    return MaskFolderSource(
        root,
        split,
        image_pattern=config.image_pattern,
        mask_pattern=config.mask_pattern,
        class_names=names,
        allow_missing=allow_missing,
        follow_links=config.follow_links,
    )


def make_train_iterator(
    config: SegmentationData, *, seed: int, process_index: int = 0, process_count: int = 1
) -> BatchIterator:
    """Return an endless iterator over augmented batches, reshuffled each epoch.

    A batch holds `image` uint8 `b h w 3`, `label` uint8 `b h w` (`IGNORED` for pixels that do not count) and `size`
    int32 `b 2`, height and width without the padding. If the training set is smaller than a batch, its images repeat.

    Raises:
        UserError: the data set cannot be found.
    """
    source = open_masks(config, config.train_split)
    local = local_batch(config.batch_size, process_count, "batch_size")
    per_epoch = len(source) * config.repeat
    steps = max(per_epoch // config.batch_size, 1)
    records = grain.MapDataset.source(range(len(source))).seed(seed).shuffle()
    passes = math.ceil(max(per_epoch, config.batch_size) / len(source))
    if passes > 1:
        records = records.repeat(passes)
    scenes = records.random_map(_LoadForTraining(source, config))
    whole = steps * config.batch_size
    batches = scenes[:whole].batch(local, batch_fn=_stack).repeat(None)
    return BatchIterator(
        grain_stream(
            batches[process_index::process_count],
            config.workers,
            batch_bytes=local * math.prod(config.height_width) * 4,  # three colours, one label
        ),
        source,
        config,
        steps_per_epoch=steps,
        identity={"seed": seed, "records": len(source), "batch_size": config.batch_size},
        reread=lambda index: load_scene(source, index, config),
    )


@dataclasses.dataclass(frozen=True)
class EvaluationImage:
    """One image of an evaluation split.

    Attributes:
        name: the file's name.
        image: the image resized for the model.
        label: label map at the original size; None if the image or the mask could not be read.
        error: the reason, if they could not be read.
    """

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    label: UInt8[np.ndarray, "m n"] | None
    error: str = ""


class EvaluationImages:
    """Iterable over the whole images of a split, in the source's order, read ahead. Every pass begins at the first.

    After a complete pass the worker processes stay for the next one.

    Raises:
        UserError: on construction, if the data set cannot be found.
    """

    def __init__(self, config: SegmentationData, split: str | None = None) -> None:
        self.source = open_masks(config, split or config.eval_split)
        images = grain.MapDataset.source(range(len(self.source)))
        load = _LoadForEvaluation(self.source, config)
        self._stream, self._endless = evaluation_stream(images.map(load), config.workers)
        self._waiting: Generator[dict[str, Any], None, None] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[EvaluationImage]:
        running, self._waiting = self._waiting or self._stream(0), None
        with contextlib.ExitStack() as unless_whole:
            unless_whole.callback(running.close)
            for item in map(owned, itertools.islice(running, len(self))):
                label = item["label"] if item["label"].size else None
                yield EvaluationImage(str(item["name"]), item["image"], label, str(item["error"]))
            if self._endless:
                unless_whole.pop_all()
                self._waiting = running

    def close(self) -> None:
        """End the worker processes. The next pass starts them again."""
        if self._waiting is not None:
            self._waiting.close()
        self._waiting = None


def load_scene(source: MaskFolderSource, index: int, config: SegmentationData) -> Scene:
    """Read an image and its label map, and check that their sizes agree and that the labels are known classes.

    Raises:
        DecodeError: a check failed, or a file cannot be read. The message names the file, the cause and the fix.
    """
    record = read_record(source, index)
    image = np.asarray(
        decode_image(record.image, channels=3, name=record.name, background=config.background)
    )
    name = source.mask_name(index)
    if record.target is None:
        raise DecodeError(f"{record.name}: there is no mask.")
    labels = read_mask(record.target, name=name)
    if labels.shape != image.shape[:2]:
        raise DecodeError(
            f"{name}: the mask has {labels.shape[1]}x{labels.shape[0]} pixels, its image {record.name} "
            f"{image.shape[1]}x{image.shape[0]}: save both at one size and orientation."
        )
    mask = relabel(
        labels, zero_is_ignored=config.zero_is_ignored, ignored_label=config.ignored_label
    )
    if problem := label_problem(mask, len(source.class_names), config):
        raise DecodeError(f"{name}: {problem}")
    return Scene(image, mask.astype(np.uint8))


def relabel(
    labels: Int[np.ndarray, "*pixels"] | UInt8[np.ndarray, "*pixels"],
    *,
    zero_is_ignored: bool = False,
    ignored_label: int = IGNORED,
) -> Int[np.ndarray, "*pixels"]:
    """Turn a file's labels into classes from 0 and `IGNORED`. With `zero_is_ignored`, label k > 0 is class k - 1."""
    classes = labels.astype(np.int32)
    ignored = classes == ignored_label
    if zero_is_ignored:
        ignored = ignored | (classes == 0)
        classes = classes - 1
    # Class 255 would be taken for ignored pixels, so make it an unknown class.
    classes = np.where(classes == IGNORED, IGNORED + 1, classes)
    return np.where(ignored, IGNORED, classes)


def label_problem(
    mask: Int[np.ndarray, "h w"], classes: int, config: SegmentationData
) -> str | None:
    """Return which labels are no known class, and the probable reason; None if all labels are known."""
    outside = np.unique(mask[(mask < 0) | (mask >= classes) & (mask != IGNORED)])
    if not outside.size:
        return None
    shift = 1 if config.zero_is_ignored else 0
    shown = ", ".join(str(value + shift) for value in outside[:5])
    text = f"labels {shown}{' ...' if outside.size > 5 else ''} outside the {counted(classes, 'class', 'classes')}"
    if not config.zero_is_ignored and outside.max() == classes:
        return f"{text}: if 0 means unlabelled and classes start at 1, set data.zero_is_ignored."
    allowed = f"{text}, which are labelled {shift} to {classes - 1 + shift}; {config.ignored_label} is ignored"
    if outside.size == 1 and outside[0] > 0:
        return f"{allowed}: if {shown} means unlabelled, set data.ignored_label={shown}."
    return f"{allowed}."


def choose_crop(
    mask: UInt8[np.ndarray, "h w"], size: tuple[int, int], max_share: float, draw: Draw
) -> tuple[int, int]:
    """Draw the offsets of a crop that holds more than one class, none of which fills `max_share` of the pixels.

    Ignored pixels do not count. After ten crops that do not meet this, the next one is used anyway.
    """
    room = max(mask.shape[0] - size[0], 0), max(mask.shape[1] - size[1], 0)
    top, left = draw(*room)
    if max_share >= 1:
        return top, left
    for _ in range(_CROPS):
        part = mask[top : top + size[0], left : left + size[1]]
        counts = np.bincount(part.ravel(), minlength=IGNORED + 1)[:IGNORED]
        if (counts > 0).sum() > 1 and counts.max() / counts.sum() < max_share:
            break
        top, left = draw(*room)
    return top, left


def train_transform(scene: Scene, config: SegmentationData, rng: np.random.Generator) -> Scene:
    """Resize, crop, flip and distort a scene. The result is smaller than the crop if the resized image is."""
    factor = rng.uniform(*config.scale)
    size = fitted_size(scene.size, config.fit[0] * factor, config.fit[1] * factor)
    assert scene.mask is not None
    mask = resize_mask(scene.mask, size)

    def draw(rows: int, columns: int) -> tuple[int, int]:
        return int(rng.integers(rows + 1)), int(rng.integers(columns + 1))

    top, left = choose_crop(mask, config.height_width, config.max_share, draw)
    height, width = (min(side, full) for side, full in zip(config.height_width, size, strict=True))
    # Resize only the crop's pixels.
    image = resize_image(scene.image, size, top=top, left=left, region=(height, width))
    cut = Scene(image, mask[top : top + height, left : left + width])
    if rng.random() < config.flip:
        cut = flip(cut)
    if config.photometric:
        cut = Scene(distort(np.ascontiguousarray(cut.image), draw_distortion(rng)), cut.mask)
    return cut


def normalise(
    images: UInt8[Array, "b h w c"],
    size: Int[Array, "b 2"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, "b h w c"]:
    """Return (pixels / 255 - mean) / std, float32, and 0 in the padding outside `size` (height, width)."""
    scale = (1.0 / (255.0 * np.asarray(std))).astype(np.float32)
    shift = (-np.asarray(mean) / np.asarray(std)).astype(np.float32)
    rows = jnp.arange(images.shape[1])[None] < size[:, :1]
    columns = jnp.arange(images.shape[2])[None] < size[:, 1:]
    inside = rows[:, :, None] & columns[:, None]
    return jnp.where(inside[..., None], images.astype(jnp.float32) * scale + shift, 0.0)


@dataclasses.dataclass
class _LoadForTraining(grain.transforms.RandomMap):
    """Load and transform a record. Replace an unreadable one by another, drawn at random."""

    source: MaskFolderSource
    config: SegmentationData

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        corrupt: list[int] = []
        while len(corrupt) < _REPLACEMENTS:
            try:
                scene = train_transform(
                    load_scene(self.source, index, self.config), self.config, rng
                )
            except DecodeError as error:
                reason = str(error)
                corrupt.append(index)
                index = int(rng.integers(len(self.source)))
                continue
            padded = pad(scene, self.config.height_width, mask=IGNORED)
            return {
                "image": padded.image,
                "label": padded.mask,
                "size": np.asarray(scene.size, np.int32),
                "corrupt": corrupt,
            }
        raise UserError(
            f"{_REPLACEMENTS} records drawn one after the other cannot be read, the last because: {reason} "
            "`fastvim data check` lists what is wrong."
        )


@dataclasses.dataclass
class _LoadForEvaluation(grain.transforms.Map):
    """Load a record and resize its image. An unreadable record has no labels."""

    source: MaskFolderSource
    config: SegmentationData

    def map(self, index: int) -> dict[str, Any]:
        try:
            scene = load_scene(self.source, index, self.config)
        except DecodeError as error:
            nothing = np.zeros((0, 0), np.uint8)
            image = np.zeros((1, 1, 3), np.uint8)
            return {"name": "", "image": image, "label": nothing, "error": str(error)}
        image = resize_image(scene.image, fitted_size(scene.size, *self.config.fit))
        name = self.source.image_name(index)
        return {"name": name, "image": image, "label": scene.mask, "error": ""}


def _stack(elements: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    batch = {key: np.stack([e[key] for e in elements]) for key in ("image", "label", "size")}
    corrupt = [index for e in elements for index in e["corrupt"]]
    return {**batch, "corrupt": np.asarray(corrupt, np.int64)}

"""Make batches of images with objects for training, and of whole images for evaluation.

Batches are random access (`grain.MapDataset`): batch i of a seed is the same for any number of workers or processes and
after any restart.

A training image passes through these steps: flip; resize to fit the model's input times a random factor; crop at a
random place; draw the masks inside the crop and compute the boxes from them; drop objects that the crop cuts off
completely; pad. Pixels stay uint8 and are padded before they are normalised. Objects are padded to `max_objects`, and
their masks are packed into bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from fastvim_jax.data.batches import BatchIterator, evaluation_batch, local_batch
from fastvim_jax.data.decode import WHITE, decode_image
from fastvim_jax.data.detection_config import DetectionData
from fastvim_jax.data.geometry import Scene, pad, resize_image
from fastvim_jax.data.records import DecodeError, read_record
from fastvim_jax.data.sources import expand_path
from fastvim_jax.data.sources.coco import CocoSource, coco_masks, draw_shape
from fastvim_jax.data.sources.coco_file import Objects
from fastvim_jax.data.stream import evaluation_stream, grain_stream
from fastvim_jax.errors import UserError

_REPLACEMENTS = 100  # unreadable records in a row before the data set is taken for damaged
_LEAST_SIDE = 0.01  # pixels; smaller boxes are dropped


def open_coco(
    config: DetectionData, split: str, *, training: bool = False, allow_missing: bool = False
) -> CocoSource:
    """Open one split of a data set in COCO's format.

    Raises:
        UserError: a missing folder, JSON file or image, or masks without pycocotools.
    """
    root = expand_path(config.path)
    if not root.is_dir():
        raise UserError(f"The data folder {str(root)!r} does not exist (data.path).")
    if config.masks:
        coco_masks()
    return CocoSource(
        root,
        split,
        annotations=config.annotations,
        images=config.images,
        training=training,
        masks=config.masks,
        least_side=config.least_side,
        allow_missing=allow_missing,
        follow_links=config.follow_links,
    )


def make_train_iterator(
    config: DetectionData, *, seed: int, process_index: int = 0, process_count: int = 1
) -> BatchIterator:
    """Return an endless iterator over augmented batches, reshuffled each epoch.

    A batch holds, for up to m = `max_objects` objects of each image:

    - `image` uint8 `b h w 3`;
    - `boxes` float32 `b m 4`, `label` int32 `b m`, and `present` bool `b m`, False for padding;
    - `masks` uint8 `b m h w/8`, with config.masks: eight pixels of a row in each byte;
    - `left_out` int32 `b`: number of objects for which there was no room.

    If the training set is smaller than a batch, its images repeat within the batch.

    Raises:
        UserError: the data set cannot be found.
    """
    source = open_coco(config, config.train_split, training=True)
    local = local_batch(config.batch_size, process_count, "batch_size")
    steps = max(len(source) // config.batch_size, 1)
    records = grain.MapDataset.source(range(len(source))).seed(seed).shuffle()
    if len(source) < config.batch_size:
        records = records.repeat(math.ceil(config.batch_size / len(source)))
    scenes = records.random_map(_LoadForTraining(source, config))
    batches = scenes[: steps * config.batch_size].batch(local, batch_fn=_stack).repeat(None)
    return BatchIterator(
        grain_stream(
            batches[process_index::process_count],
            config.workers,
            batch_bytes=local * _example_bytes(config),
        ),
        source,
        config,
        steps_per_epoch=steps,
        identity={"seed": seed, "records": len(source), "batch_size": config.batch_size},
        reread=lambda index: load(source, index),
    )


def make_eval_iterator(
    config: DetectionData,
    *,
    split: str | None = None,
    batch_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Return an iterator over one pass in the source's order: images resized to fit, padded, not augmented.

    With config.eval_sizes the images of each padded size come together, so that a batch has one size.

    A batch holds `image`, `scale` float32 `b 2` (factors by which width and height were resized), `index` int32 `b`
    (of the record) and `valid` bool `b`, False for padding and for records that cannot be read.

    Raises:
        UserError: the data set cannot be found, or a batch size below 1.
    """
    source = open_coco(config, split or config.eval_split)
    size = evaluation_batch(batch_size, config)
    local = local_batch(size, process_count, "eval_batch_size")
    plan = _plan(source, config, size)
    steps = len(plan) // size
    positions = grain.MapDataset.source(plan)
    batches = positions.map(_LoadForEvaluation(source, config)).batch(local, batch_fn=_stack)
    stream, endless = evaluation_stream(
        batches[process_index::process_count],
        config.workers,
        batch_bytes=local * math.prod(config.height_width) * 3,
    )
    return BatchIterator(
        stream,
        source,
        config,
        steps_per_epoch=steps,
        identity={"split": split or config.eval_split, "records": len(source), "batch_size": size},
        reread=lambda index: load(source, index),
        ends=endless,  # The iterator ends each pass itself.
    )


def _plan(source: CocoSource, config: DetectionData, batch: int) -> Int[np.ndarray, "n 3"]:
    """List record, height and width of every image of a pass; each size fills whole batches with records of -1.

    All processes make the same plan, from the sizes in the JSON file.
    """
    groups: dict[tuple[int, int], list[int]] = {size: [] for size in config.eval_sizes}
    groups[config.height_width] = []
    for index in range(len(source)):
        size = config.height_width
        if config.eval_sizes:
            size = config.padded_size(fit(source.size(index), config.height_width))
        groups[size].append(index)
    rows = [
        (index, *size)
        for size, members in groups.items()
        for index in [*members, *(-len(members) % batch) * [-1]]
    ]
    return np.asarray(rows, np.int32)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How an image becomes the model's input: mirror, resize to `size`, crop at `top` and `left`, in this order."""

    size: tuple[int, int]
    top: int = 0
    left: int = 0
    mirrored: bool = False


def draw_placement(
    size: tuple[int, int], config: DetectionData, rng: np.random.Generator
) -> Placement:
    """Draw the placement of an image of `size` (height, width): large-scale jitter and a flip."""
    mirrored = bool(rng.random() < config.flip)
    factor = rng.uniform(*config.scale)
    resized = fit(size, config.height_width, factor)
    room = [max(r - c, 0) for r, c in zip(resized, config.height_width, strict=True)]
    top, left = (int(rng.integers(r + 1)) for r in room)
    return Placement(resized, top, left, mirrored)


def fit(size: tuple[int, int], bounds: tuple[int, int], factor: float = 1.0) -> tuple[int, int]:
    """Return the size, aspect kept, at which an image fits into `bounds` (height, width) times `factor`."""
    ratio = min(bound * factor / side for side, bound in zip(size, bounds, strict=True))
    return max(int(size[0] * ratio + 0.5), 1), max(int(size[1] * ratio + 0.5), 1)


def place(
    image: UInt8[np.ndarray, "h w 3"],
    placement: Placement,
    config: DetectionData,
    size: tuple[int, int] | None = None,
) -> UInt8[np.ndarray, "i j 3"]:
    """Mirror, resize, crop and pad an image to `size`; None: to the config's image_size."""
    region = tuple(min(r, c) for r, c in zip(placement.size, config.height_width, strict=True))
    if placement.mirrored:
        image = image[:, ::-1]
    cropped = resize_image(
        image, placement.size, top=placement.top, left=placement.left, region=(region[0], region[1])
    )
    return pad(Scene(cropped), size or config.height_width, image=config.pad_value).image


def place_objects(
    objects: Objects, placement: Placement, config: DetectionData, name: str
) -> dict[str, np.ndarray]:
    """Move the objects of an image along with it, drop those outside the crop, and pad to `max_objects`."""
    height, width = config.height_width
    region = tuple(min(r, c) for r, c in zip(placement.size, config.height_width, strict=True))
    factor = placement.size[1] / objects.width, placement.size[0] / objects.height
    boxes = objects.boxes.astype(np.float64) * np.tile(factor, 2)
    if placement.mirrored:
        boxes[:, [0, 2]] = placement.size[1] - boxes[:, [2, 0]]
    offset = placement.left, placement.top
    boxes = np.clip(boxes - np.tile(offset, 2), 0, np.tile(region[::-1], 2))
    masks: Bool[np.ndarray, "n h w"] | None = None
    if config.masks:
        masks = np.zeros((len(boxes), *region), bool)
        for i, shape in enumerate(objects.shapes):
            # An object without a mask, or wholly outside the crop, stays empty and is dropped.
            if shape is not None and (boxes[i, 2:] > boxes[i, :2]).all():
                masks[i] = draw_shape(
                    shape, (region[0], region[1]), factor=factor, offset=offset,
                    mirrored=placement.mirrored, whole=placement.size, name=name,
                )  # fmt: skip
        boxes = boxes_of(masks)
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = np.flatnonzero((sides >= _LEAST_SIDE).all(1))
    largest = kept[np.argsort(-np.prod(sides[kept], axis=1), kind="stable")]
    chosen = np.sort(largest[: config.max_objects])
    n, room = len(chosen), config.max_objects
    result = {
        "boxes": np.zeros((room, 4), np.float32),
        "label": np.zeros(room, np.int32),
        "present": np.arange(room) < n,
        "left_out": np.asarray(len(kept) - n, np.int32),
    }
    result["boxes"][:n], result["label"][:n] = boxes[chosen], objects.labels[chosen]
    if masks is not None:
        result["masks"] = np.zeros((room, height, -(-width // 8)), np.uint8)
        bits = np.packbits(masks[chosen], axis=-1)
        result["masks"][:n, : bits.shape[1], : bits.shape[2]] = bits
    return result


def boxes_of(masks: Bool[np.ndarray, "n h w"]) -> Float[np.ndarray, "n 4"]:
    """Return the tight box of each mask, around all its pixels; zeros for an empty mask."""
    boxes = np.zeros((len(masks), 4))
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if rows.size:
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def load(
    source: CocoSource, index: int, *, background: int = WHITE
) -> tuple[UInt8[np.ndarray, "h w 3"], Objects]:
    """Read an image, on `background` where it is transparent, and its objects, and check that their sizes agree.

    Raises:
        DecodeError: the image cannot be read, or the sizes differ. The message names the file, the cause and the fix.
    """
    record = read_record(source, index)
    image = np.asarray(
        decode_image(record.image, channels=3, name=record.name, background=background)
    )
    objects: Objects = record.target
    if image.shape[:2] != (objects.height, objects.width):
        raise DecodeError(
            f"{record.name}: the image has {image.shape[1]}x{image.shape[0]} pixels, its entry in "
            f"{source.file.name} says {objects.width}x{objects.height}: boxes would be misplaced. Correct the entry or "
            "the image's orientation."
        )
    return image, objects


@dataclasses.dataclass
class _LoadForTraining(grain.transforms.RandomMap):
    """Load and transform a record. Replace an unreadable one by another, drawn at random."""

    source: CocoSource
    config: DetectionData

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        corrupt: list[int] = []
        while len(corrupt) < _REPLACEMENTS:
            try:
                image, objects = load(self.source, index, background=self.config.background)
                placement = draw_placement((image.shape[0], image.shape[1]), self.config, rng)
                moved = place_objects(objects, placement, self.config, f"record {index}")
                return {"image": place(image, placement, self.config), **moved, "corrupt": corrupt}
            except DecodeError as error:
                reason = str(error)
                corrupt.append(index)
                index = int(rng.integers(len(self.source)))
        raise UserError(
            f"{_REPLACEMENTS} records drawn one after the other cannot be read, the last because: {reason} "
            "`fastvim data check` lists what is wrong."
        )


@dataclasses.dataclass
class _LoadForEvaluation(grain.transforms.Map):
    """Load a record and resize its image. Padding and unreadable records are marked as not valid."""

    source: CocoSource
    config: DetectionData

    def map(self, planned: Int[np.ndarray, " 3"]) -> dict[str, Any]:
        index, height, width = planned.tolist()
        config, scale = self.config, np.ones(2, np.float32)
        image = np.zeros((height, width, 3), np.uint8)
        valid, corrupt = index >= 0, []
        if valid:
            try:
                pixels, _ = load(self.source, index, background=config.background)
                image, scale = fit_image(pixels, config)
            except DecodeError:
                valid, corrupt = False, [index]
        return {
            "image": image,
            "scale": scale,
            "index": np.asarray(index, np.int32),
            "valid": np.asarray(valid),
            "corrupt": corrupt,
        }


def fit_image(
    image: UInt8[np.ndarray, "h w 3"], config: DetectionData
) -> tuple[UInt8[np.ndarray, "i j 3"], Float[np.ndarray, " 2"]]:
    """Resize an image to fit, and pad it to the smallest size; also return the factors of width and height."""
    size: Int[np.ndarray, " 2"] = np.asarray(image.shape[:2])
    placement = Placement(fit((int(size[0]), int(size[1])), config.height_width))
    scale = (np.asarray(placement.size) / size)[::-1].astype(np.float32)
    return place(image, placement, config, config.padded_size(placement.size)), scale


def describe_eval_sizes(config: DetectionData) -> tuple[str, ...]:
    """Say that several sizes are compiled, in one line; () for one size."""
    if not config.eval_sizes:
        return ()
    sizes = sorted({*config.eval_sizes, config.height_width}, key=math.prod)
    shown = ", ".join(f"{height}x{width}" for height, width in sizes)
    return (f"Evaluation pads to the smallest of {shown}: one program is compiled for each size.",)


def _example_bytes(config: DetectionData) -> int:
    height, width = config.height_width
    masks = config.max_objects * height * -(-width // 8) if config.masks else 0
    return height * width * 3 + masks


def _stack(elements: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = [name for name in elements[0] if name != "corrupt"]
    corrupt = [index for e in elements for index in e["corrupt"]]
    stacked = {name: np.stack([e[name] for e in elements]) for name in names}
    return {**stacked, "corrupt": np.asarray(corrupt, np.int64)}

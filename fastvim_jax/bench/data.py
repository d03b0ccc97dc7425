"""What reading images costs: each stage by itself, the whole pipeline, and a PyTorch DataLoader on the same files.

Stages and whole are measured in processor time, so that a number of images per second is one core's, whatever else runs
on the machine. With worker processes the clock counts instead.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fastvim_jax.data import transforms
from fastvim_jax.data.batches import open_split
from fastvim_jax.data.classification import make_train_iterator, train_batches
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.decode import decode_image
from fastvim_jax.data.device_crops import crops_on_device, packed_batches
from fastvim_jax.data.randaugment import rand_augment
from fastvim_jax.data.records import Source
from fastvim_jax.data.turbo import LAZY, Picture, chosen_decoder, open_image

Row = dict[str, Any]

_RECORDS = 256  # kept decoded at once
_WINDOWS = 5  # other work on the machine disturbs some of them


def measure(
    config: ClassificationData, *, seconds: float = 2.0, workers: Sequence[int] = ()
) -> Iterator[Row]:
    """Measure the training pipeline of `config` on its files.

    Args:
        config: data and augmentation; `decoder` is measured beside Pillow.
        seconds: about how long each measurement takes.
        workers: numbers of worker processes to measure the whole with, by the clock.

    Yields:
        Rows with `what` (the stage, or whole or DataLoader), `with` (which decoder), `milliseconds` an image, and
        `per_core` or, with workers, `per_second` images. A row that cannot be measured says why in `skipped`.
    """
    source = open_split(config, config.train_split)
    decoders = dict.fromkeys((chosen_decoder(config), "pillow"))
    for decoder in decoders:
        for stage, work in _stages(source, config, decoder):
            milliseconds = _time(work, seconds)
            yield _row(stage, decoder, milliseconds)
    for count in (0, *workers):
        yield from _whole(source, dataclasses.replace(config, workers=count), decoders, seconds)


def _whole(
    source: Source, config: ClassificationData, decoders: Iterable[Any], seconds: float
) -> Iterator[Row]:
    """Measure the pipeline with each decoder, and the DataLoader.

    They take turns, so that other work disturbs all alike.
    """
    behind = f", {_processes(config.workers)}" if config.workers else ""
    torch = "PyTorch DataLoader" + behind
    running: dict[tuple[str, str], Iterator[Any]]
    if crops_on_device(config):  # The host decodes nothing.
        running = {("whole" + behind, "device"): _our_batches(source, config)}
    else:
        running = {
            ("whole" + behind, decoder): _our_batches(
                source, dataclasses.replace(config, decoder=decoder)
            )
            for decoder in decoders
        }
    ours = next(iter(running))
    missing = [m for m in ("torch", "torchvision") if importlib.util.find_spec(m) is None]
    if not missing:
        running[torch, "pillow"] = torch_loader(source, config)
    times = _time_batches(list(running.values()), config, seconds)
    found = dict(zip(running, times, strict=True))
    for (what, decoder), milliseconds in found.items():
        row = _row(what, decoder, milliseconds, workers=config.workers)
        if what == torch:
            row["ours_is_faster"] = milliseconds / found[ours]
        yield row
    if missing:
        yield {
            "what": torch,
            "with": "pillow",
            "skipped": f"{' and '.join(missing)} not installed",
        }


def _stages(
    source: Source, config: ClassificationData, decoder: str
) -> Iterator[tuple[str, Callable[[], int]]]:
    """Name of each stage, and a function that does it once for a number of records, which it returns."""
    # Spread over the source: neighbours may be of one class, or of one size.
    spread = np.unique(np.linspace(0, len(source) - 1, _RECORDS).astype(int)).tolist()
    records = [source[i] for i in spread]
    size, rng = config.height_width, np.random.default_rng(0)
    images = [r.image for r in records]

    def whole(image: bytes | np.ndarray) -> Any:
        picture = open_image(image, channels=config.channels, name=config.path, decoder=decoder)
        if isinstance(picture, LAZY):
            box = (0, 0, picture.width, picture.height)
            return picture.crop_pixels(box, (picture.height, picture.width))
        return picture

    def crop(picture: Picture) -> Any:
        if isinstance(picture, LAZY):
            box = transforms.random_box(
                picture.width, picture.height, rng, config.crop_scale, config.crop_aspect
            )
            return picture.crop_pixels(box, size)
        return transforms.random_resized_crop(
            picture, size, rng, scale=config.crop_scale, aspect=config.crop_aspect
        )

    def over(items: Sequence[Any], work: Callable[[Any], Any]) -> Callable[[], int]:
        def once() -> int:
            for item in items:
                work(item)
            return len(items)

        return once

    yield "read", over(spread, lambda i: source[i])
    yield "decode", over(images, whole)
    yield (
        "decode, crop and resize",
        over(
            images,
            lambda image: crop(
                open_image(image, channels=config.channels, name=config.path, decoder=decoder)
            ),
        ),
    )
    if decoder == "pillow":
        decoded = [decode_image(image, channels=config.channels) for image in images]
        yield "crop and resize", over(decoded, crop)
        # The stages after it are the same with every decoder.
        crops = [crop(image) for image in decoded]
        yield "flip", over(crops, lambda i: transforms.horizontal_flip(i, rng, probability=0.5))
        yield "RandAugment", over(crops, lambda image: rand_augment(image, rng))
        yield "to array", over(crops, transforms.to_array)
        arrays = [transforms.to_array(image) for image in crops]
        part = arrays[: config.batch_size]
        yield "batch", lambda: len(np.stack(part))


def _time(work: Callable[[], int], seconds: float) -> float:
    """Measure the milliseconds of processor time for one record, in the best of several windows."""
    work()
    best = float("inf")
    for _ in range(_WINDOWS):
        done, begin = 0, time.process_time()
        while (spent := time.process_time() - begin) < seconds / _WINDOWS or done == 0:
            done += work()
        best = min(best, spent / done * 1e3)
    return best


def _our_batches(source: Source, config: ClassificationData) -> Iterator[Any]:
    if config.workers:
        return make_train_iterator(config, seed=0)
    # In one thread: two on a core's two hardware threads would each look slower.
    numbered = train_batches(source, config, seed=0, batch_size=config.batch_size)
    batches = map(numbered.__getitem__, itertools.count())
    if crops_on_device(config):
        return packed_batches(batches, source, [slice(0, config.batch_size)])
    return batches


def _time_batches(
    running: Sequence[Iterator[Any]], config: ClassificationData, seconds: float
) -> list[float]:
    """Measure the milliseconds per image of each iterator, one after the other.

    With workers they are wall-clock time, otherwise processor time.
    """
    if config.workers:
        best = []
        for batches in running:
            best += _take_turns([batches], time.perf_counter, config.batch_size, seconds, least=6)
            close = getattr(batches, "close", None) or getattr(batches, "_shutdown_workers", None)
            if close is not None:
                close()
        return best
    return _take_turns(running, time.process_time, config.batch_size, seconds, least=1)


def _take_turns(
    running: Sequence[Iterator[Any]],
    clock: Callable[[], float],
    batch_size: int,
    seconds: float,
    *,
    least: int,
) -> list[float]:
    best = [float("inf")] * len(running)
    for batches in running:
        for _ in range(least):  # What was read ahead is not counted.
            next(batches)
    for _ in range(_WINDOWS):
        for i, batches in enumerate(running):
            begin, count = clock(), 0
            while (spent := clock() - begin) < seconds / _WINDOWS or count < least:
                next(batches)
                count += 1
            best[i] = min(best[i], spent / (count * batch_size) * 1e3)
    return best


def torch_loader(source: Source, config: ClassificationData) -> Iterator[Any]:
    """Read the same files through a PyTorch DataLoader: Pillow, torchvision's transforms, float32 batches."""
    import torch
    from torchvision import transforms as vision

    torch.set_num_threads(1)
    steps = [
        vision.RandomResizedCrop(
            config.height_width, config.crop_scale, config.crop_aspect,
            interpolation=vision.InterpolationMode.BICUBIC,
        ),
        vision.RandomHorizontalFlip(config.flip),
    ]  # fmt: skip
    if config.rand_augment is not None:
        steps.append(vision.RandAugment(2, int(config.rand_augment)))
    steps += [vision.ToTensor(), vision.Normalize(config.mean, config.std)]
    loader = torch.utils.data.DataLoader(
        _Endless(source, vision.Compose(steps)),
        batch_size=config.batch_size,
        num_workers=config.workers,
        sampler=_shuffled(len(source)),
        multiprocessing_context="spawn" if config.workers else None,
    )
    return iter(loader)


@dataclasses.dataclass
class _Endless:
    """A map-style data set as PyTorch wants it."""

    source: Source
    transform: Callable[[Image.Image], Any]

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: int) -> tuple[Any, int]:
        record = self.source[index]
        image = record.image
        opened = (
            Image.open(io.BytesIO(image)) if isinstance(image, bytes) else Image.fromarray(image)
        )
        return self.transform(opened.convert("RGB")), record.target


def _shuffled(count: int) -> Iterator[int]:
    rng = np.random.default_rng(0)
    while True:
        yield from rng.permutation(count).tolist()


def _processes(count: int) -> str:
    return f"{count} process" + ("es" if count > 1 else "")


def _row(what: str, decoder: str, milliseconds: float, *, workers: int = 0) -> Row:
    row: Row = {"what": what, "with": decoder, "milliseconds": milliseconds}
    row["per_second" if workers else "per_core"] = 1e3 / milliseconds
    return row

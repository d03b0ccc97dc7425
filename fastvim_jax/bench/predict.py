"""Measure `fastvim predict`: decoding alone, the model alone, both together, and which of the two limits.

There are two rows. `memory` takes images, decoded and resized before, as one array, so that the host only copies them
to the devices. `files` reads the same images from files; if processes decode, their start is included. All numbers are
images per second of wall-clock time, medians over repeats.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fastvim_jax.bench.record import Columns, Row
from fastvim_jax.errors import UserError
from fastvim_jax.inference.classifier import Classifier
from fastvim_jax.own_cores import own_cores

NEAR = 0.9
"""If both together reach this share of the slower part's rate, the slower part is what limits them."""


def rows(
    classifier: Classifier, name: str, files: Sequence[str], *, images: int, repeats: int
) -> Iterator[Row]:
    """Measure a classifier on files, taken again from the first one until there are `images`.

    Args:
        classifier: the model with its preprocessing; it is compiled first.
        name: name of the model in the table.
        files: image files.
        images: number of images per measurement, rounded up to whole batches.
        repeats: measurements of each kind.

    Raises:
        UserError: a file cannot be read.
    """
    classifier.compile()
    size = classifier.batch_size
    count = -(-images // size) * size
    given = [str(files[i % len(files)]) for i in range(count)]
    pixels: list[np.ndarray] = []
    kept: Any = None
    # Few distinct images, so that their decoded copies fit into memory.
    for _, batch, errors in classifier.decoded(list(dict.fromkeys(given))[: 4 * size]):
        if errors:
            raise UserError(f"{next(iter(errors.values()))} Leave it out of the bench.")
        kept = batch if kept is None else kept
        pixels += list(np.asarray(batch))
    pixels = pixels[: min(len(files), len(pixels))]
    # The same program without a crop: images of the model's size are only copied.
    cropped = copy.copy(classifier)
    cropped.data = dataclasses.replace(classifier.data, eval_crop=1.0)
    model = _median(lambda: _model(classifier, kept, count // size), count, repeats)
    sources: dict[str, tuple[Classifier, Any]] = {
        "memory": (cropped, np.resize(pixels, (count, *np.shape(pixels)[1:]))),
        "files": (classifier, given),
    }
    for source, (chosen, items) in sources.items():
        workers = chosen.workers if source == "files" else 0
        # Processes start anew each time, so a run of them warms nothing up.
        measure = functools.partial(_median, count=count, repeats=repeats, warm=workers == 0)
        decoding = measure(lambda: _decode(chosen, items))  # noqa: B023
        whole = measure(lambda: _whole(chosen, items))  # noqa: B023
        yield {
            "model": name,
            "images_from": source,
            "batch": size,
            "images": count,
            "cores": own_cores(),
            "workers": workers,
            "decoding_per_s": decoding,
            "model_per_s": model,
            "whole_per_s": whole,
            "limit": limit(decoding, model, whole),
            "of_slower_part": whole / min(decoding, model),
            "of_model": whole / model,
        }


def limit(decoding: float, model: float, whole: float) -> str:
    """Name what limits `whole`: "decoding", "model", or "sharing" if they hinder each other, as on a CPU's cores."""
    slower = min(decoding, model)
    if whole < NEAR * slower:
        return "sharing"
    return "decoding" if decoding < model else "model"


def _median(run: Callable[[], None], count: int, repeats: int, warm: bool = True) -> float:
    if warm:
        run()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates)


def _model(classifier: Classifier, batch: Any, batches: int) -> None:
    """Run the model on one batch that is on the devices already."""
    outputs: Any = None
    for _ in range(batches):
        outputs = classifier.forward(batch)
    jax.block_until_ready(outputs)


def _decode(classifier: Classifier, items: Any) -> None:
    """Decode and copy to the devices."""
    for _, batch, _ in classifier.decoded(items):
        jax.block_until_ready(batch)


def _whole(classifier: Classifier, items: Any) -> None:
    """Bring every batch's outputs to the host, as `fastvim predict` does."""
    for _ in classifier.each_batch(items):
        pass


COLUMNS: Columns = (
    ("model", 26, lambda r: r["model"]),
    ("images from", 11, lambda r: r["images_from"]),
    ("batch", 5, lambda r: str(r["batch"])),
    ("decoding/s", 10, lambda r: f"{r['decoding_per_s']:,.1f}"),
    ("model/s", 9, lambda r: f"{r['model_per_s']:,.1f}"),
    ("whole/s", 9, lambda r: f"{r['whole_per_s']:,.1f}"),
    ("limit", 8, lambda r: r["limit"]),
    ("of slower part", 14, lambda r: f"{r['of_slower_part']:.0%}"),
    ("of model", 8, lambda r: f"{r['of_model']:.0%}"),
)

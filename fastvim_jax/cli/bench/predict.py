"""`fastvim bench predict RUN IMAGE...`: images per second of prediction, and what limits them."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from fastvim_jax.cli.bench.options import Options, on_gpu
from fastvim_jax.cli.usage import UsageError, as_usage_error, parse


@dataclasses.dataclass(frozen=True)
class Predict(Options):
    """Measure `fastvim predict`: decoding alone, the model alone, both together, and which of the two limits.

    Images come from memory, already decoded, and then from the files. The column `of model` is the speed of both
    together as a share of the model's speed alone. `limit` names the slower part, or says `sharing` if both
    together are more than a tenth slower than it, because decoding and the model need the same cores.
    """

    zero: ClassVar = ("workers",)

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, a folder of `save_pretrained`, or hf://owner/name."""
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image files, folders, tar files, patterns in quotes, or @FILE with one name per line."""
    batch_size: int | None = None
    """Images per batch; by default 128 on a GPU, 16 elsewhere."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype; by default as `fastvim predict` chooses."""
    images: int | None = None
    """Images per measurement; the given ones are repeated if they are fewer. By default 64 batches on a GPU, 4
    elsewhere."""
    workers: int | None = None
    """Processes that decode files; by default as `fastvim predict` chooses for that many images. 0: threads."""
    repeats: int = 3
    """Measurements of each kind; the median is shown."""
    json: Path | None = None
    """Write all rows to this file, with device, versions and commit."""


def predict(arguments: Sequence[str]) -> int:
    """Measure prediction."""
    chosen = parse(Predict, "bench predict", arguments, f"{Predict.__doc__}")
    if not chosen.paths:
        raise UsageError("name at least one image file: fastvim bench predict RUN IMAGE...")
    from fastvim_jax.bench import predict as bench
    from fastvim_jax.bench.record import show
    from fastvim_jax.inference.classifier import Classifier
    from fastvim_jax.inference.decoding import decoding_workers
    from fastvim_jax.inference.image_files import find_images

    gpu = on_gpu()
    with as_usage_error():
        files = find_images(chosen.paths)
        size = chosen.batch_size or (128 if gpu else 16)
        images = chosen.images or (64 if gpu else 4) * size
        workers = decoding_workers(images, chosen.workers)
        classifier = Classifier.load(
            chosen.run,
            batch_size=size,
            dtype=chosen.dtype,
            outputs=("probabilities",),
            workers=workers,
        )
    name = Path(chosen.run).name or chosen.run
    rows = bench.rows(classifier, name, files, images=images, repeats=chosen.repeats)
    command = shlex.join(["fastvim", "bench", "predict", *arguments])
    show("predict", rows, bench.COLUMNS, command=command, file=chosen.json)
    return 0

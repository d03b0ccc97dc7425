"""`fastvim predict RUN IMAGE...`."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastvim_jax.cli.records import complain, write_results
from fastvim_jax.cli.usage import UsageError, as_usage_error, parse


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The images to predict, and the model."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, a folder of `save_pretrained`, or hf://owner/name."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files of any size and kind, folders, tar files, patterns in quotes, or @FILE with one name per line."""
    top_k: int = 5
    """Classes to show for each image."""
    weights: Literal["raw", "ema"] | None = None
    """raw: the trained weights; ema: their average. By default the average, unless raw scored better in the run's
    log."""
    step: int | Literal["best"] | None = None
    """Which checkpoint: its step, or best for the one with the best score; by default the last."""
    batch_size: int = 32
    """Images per batch."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype of classifiers, with the model's own activations. By default the model's own dtype; on a GPU
    its fast mode, in bfloat16."""
    workers: int | None = None
    """Processes that decode images of classifiers; 0: threads of this process. By default one per core, at most 16, for
    5,000 files or more, and threads for fewer."""
    json: bool = False
    """Print JSON: one object per file."""
    out: Path | None = None
    """For classifiers: a file for all predictions, ending in .jsonl, .csv or .parquet. After an interruption the same
    command continues it. For segmentation and detection (required): the folder for drawings and masks."""


def run(arguments: Sequence[str]) -> int:
    """Predict image files: print the most probable classes of each, or write drawings and masks to the folder --out.

    Files that are not images are reported and left out; the exit status is then 1.
    """
    chosen = parse(Arguments, "predict", arguments, f"{run.__doc__}")
    if not chosen.images:
        raise UsageError("name at least one image file: fastvim predict RUN IMAGE...")
    from fastvim_jax.inference.classifier import Classifier
    from fastvim_jax.inference.decoding import decoding_workers
    from fastvim_jax.inference.drawings import draws
    from fastvim_jax.inference.image_files import find_images
    from fastvim_jax.models.pretrained import is_pretrained
    from fastvim_jax.training import load_run

    _refuse_cells(chosen.run)
    with as_usage_error():
        files = find_images(chosen.images)
        if chosen.top_k < 1 or chosen.batch_size < 1:
            raise UsageError(
                f"--top-k {chosen.top_k} and --batch-size {chosen.batch_size} must be at least 1"
            )
    options: dict[str, Any] = {
        "batch_size": min(chosen.batch_size, len(files)),
        "dtype": chosen.dtype,
        "outputs": ("probabilities",),
        "workers": decoding_workers(len(files), chosen.workers),
    }
    if is_pretrained(chosen.run):
        options |= {"weights": chosen.weights, "step": chosen.step}
        return _classify(Classifier.load(chosen.run, **options), files, chosen)
    loaded = load_run(chosen.run, weights=chosen.weights, step=chosen.step)
    if draws(loaded):
        if chosen.dtype:
            raise UsageError(f"--dtype is of classifiers; {chosen.run} draws pictures.")
        return _draw(loaded, files, chosen)
    return _classify(Classifier.of_run(loaded, **options), files, chosen)


def _refuse_cells(source: str) -> None:
    """Raise UserError for a run of cell images, before the images, which are of other kinds, are looked for."""
    from fastvim_jax.data import CellsData
    from fastvim_jax.errors import UserError
    from fastvim_jax.models.pretrained import is_pretrained
    from fastvim_jax.training.run_folder import read_config

    if is_pretrained(source):
        return
    if not isinstance(getattr(read_config(source), "data", None), CellsData):
        return
    raise UserError(
        f"{source} was trained on images of named channels, and predict reads photographs. Use\n"
        f"  fastvim channels {source} IMAGE    # class of an image, and what each channel contributes\n"
        f"  fastvim embed {source} PATH...     # features of many images"
    )


def _classify(classifier: Any, files: list[str], chosen: Arguments) -> int:
    """Print predictions, or write them to a file."""
    from fastvim_jax.inference.predict import COLUMNS, iter_predictions

    if chosen.out is not None:
        make = functools.partial(iter_predictions, classifier, top_k=chosen.top_k)
        made_by = {"model": classifier.fingerprint(), "top_k": chosen.top_k}
        return write_results(files, make, chosen.out, COLUMNS, "predicting", made_by)
    failed = 0
    predictions = list(iter_predictions(classifier, files, top_k=chosen.top_k))
    if chosen.json:
        print(json.dumps([p.to_dict() for p in predictions], indent=2, ensure_ascii=False))
    for prediction in predictions:
        failed += complain(prediction)
        if prediction.error is None and not chosen.json:
            print(prediction.file)
            for name, probability in zip(
                prediction.class_names, prediction.probabilities, strict=True
            ):
                print(f"  {probability:>7.2%}  {name}")
    return int(failed > 0)


def _draw(loaded: Any, files: list[str], chosen: Arguments) -> int:
    """Write drawings and say what they show."""
    if chosen.out is None:
        raise UsageError("this run's predictions are pictures: name their folder with --out FOLDER")
    from fastvim_jax.cli.progress import progress_bar
    from fastvim_jax.inference.drawings import draw_files

    with progress_bar("predicting", quiet=chosen.json) as progress:
        drawings = draw_files(loaded, files, chosen.out, progress=progress)
    if chosen.json:
        print(json.dumps([dataclasses.asdict(d) for d in drawings], indent=2, ensure_ascii=False))
    for drawing in drawings:
        if drawing.error is not None:
            print(f"fastvim: {drawing.error}", file=sys.stderr)
        elif not chosen.json:
            print(f"{drawing.file}: {drawing.text}")
            for written in drawing.written:
                print(f"  {written}")
    return int(any(drawing.error is not None for drawing in drawings))

"""`fastvim predict RUN IMAGE...`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastvim_jax.cli.usage import UsageError, parse


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to predict with what."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder; nothing else is needed."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files of any size and kind."""
    top_k: int = 5
    """Classes to show for each image."""
    weights: Literal["raw", "ema"] | None = None
    """The trained weights or their average; by default the average, if the run kept one."""
    step: int | None = None
    """Which checkpoint; by default the last."""
    batch_size: int = 32
    """Images at a time."""
    json: bool = False
    """Print JSON: one object a file."""
    out: Path | None = None
    """Folder of drawings and masks, which runs of segmentation and detection need."""


def run(arguments: Sequence[str]) -> int:
    """Predict image files: the most probable classes of each, best first; or drawings and masks in the folder --out.

    A file that is no image is reported and the others are classified; the exit status is then 1.
    """
    chosen = parse(Arguments, "predict", arguments, f"{run.__doc__}")
    if not chosen.images:
        raise UsageError("name at least one image file: fastvim predict RUN IMAGE...")
    from fastvim_jax.inference.drawings import draws
    from fastvim_jax.inference.predict import predict_files
    from fastvim_jax.training import load_run

    loaded = load_run(chosen.run, weights=chosen.weights, step=chosen.step)
    if draws(loaded):
        return _draw(loaded, chosen)
    predictions = predict_files(
        loaded, chosen.images, top_k=chosen.top_k, batch_size=chosen.batch_size
    )
    if chosen.json:
        print(json.dumps([p.to_dict() for p in predictions], indent=2, ensure_ascii=False))
    for prediction in predictions:
        if prediction.error is not None:
            print(f"fastvim: {prediction.error}", file=sys.stderr)
        elif not chosen.json:
            print(prediction.file)
            for name, probability in zip(
                prediction.class_names, prediction.probabilities, strict=True
            ):
                print(f"  {probability:>7.2%}  {name}")
    return int(any(p.error is not None for p in predictions))


def _draw(loaded: Any, chosen: Arguments) -> int:
    """Write drawings and say what they show."""
    if chosen.out is None:
        raise UsageError("this run's predictions are pictures: name their folder with --out FOLDER")
    from fastvim_jax.inference.drawings import draw_files

    drawings = draw_files(loaded, chosen.images, chosen.out)
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

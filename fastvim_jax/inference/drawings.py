"""Draw predictions of segmentation and detection runs on image files. The run's config decides the task.

A drawer is a module with `draw_files(run, files, out, *, progress) -> list[Drawing]`. A new task is one more line in
`DRAWERS`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from fastvim_jax.data.config import DataConfig
from fastvim_jax.data.decode import decode_image
from fastvim_jax.data.prepare.shards import Progress
from fastvim_jax.data.records import DecodeError
from fastvim_jax.data.tar_members import read_image_file
from fastvim_jax.errors import UserError, one_or_several
from fastvim_jax.training.run_folder import Run

DRAWERS = {
    "DetectionConfig": "fastvim_jax.inference.detect",
    "SegmentationConfig": "fastvim_jax.inference.segment",
}
"""The module that draws the predictions of a run, by the name of its config's class."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The drawing of one image file.

    Attributes:
        file: the file as it was named.
        written: files written: drawings, masks, boxes.
        found: what was found, JSON-able, for example each class's share of the pixels.
        text: the same in a line.
        error: why nothing was drawn, or None.
    """

    file: str
    written: tuple[str, ...] = ()
    found: Any = None
    text: str = ""
    error: str | None = None


def draws(run: Run) -> bool:
    """Tell whether the run's predictions are pictures."""
    return type(run.config).__name__ in DRAWERS


def draw_files(
    run: Run,
    files: Sequence[str | Path] | str | Path,
    out: Path,
    *,
    progress: Progress | None = None,
) -> list[Drawing]:
    """Predict image files and write drawings to the folder `out`. A file that is no image has its `error` set.

    Args:
        run: a trained model whose task `draws`.
        files: image files of any size and kind.
        out: a folder, made if it is missing; files of the same names in it are replaced.
        progress: called with the files done and their number.
    """
    out.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(DRAWERS[type(run.config).__name__])
    drawn: list[Drawing] = module.draw_files(run, one_or_several(files), out, progress=progress)
    return drawn


def read_files(
    files: Sequence[str | Path],
    data: DataConfig,
    drawings: list[Drawing],
    progress: Progress | None = None,
) -> Iterator[tuple[str | Path, str, UInt8[np.ndarray, "h w 3"]]]:
    """Yield each file, the name of its drawings and its pixels, read as training reads them.

    Args:
        files: image files.
        data: its background lies behind transparent pixels.
        drawings: gets a `Drawing` with an `error` for each file that cannot be read.
        progress: called with the files done and their number, when the next one is asked for.
    """
    for done, (file, name) in enumerate(zip(files, output_names(files), strict=True), 1):
        try:
            encoded = read_image_file(file)
            image = decode_image(encoded, channels=3, name=str(file), background=data.background)
        except DecodeError as error:
            drawings.append(Drawing(str(file), error=str(error)))
        else:
            yield file, name, np.asarray(image)
        if progress is not None:
            progress(done, len(files))


def require_pixels(image: Any) -> UInt8[np.ndarray, "h w 3"]:
    """Return `image`, once it is what the runs were trained on before they normalised it; grey becomes RGB.

    Raises:
        UserError: floats, which would be taken for nearly black pixels; another shape; no array.
    """
    if isinstance(image, np.ndarray) and image.ndim == 2:
        image = np.stack([image] * 3, axis=-1)
    if (
        not isinstance(image, np.ndarray)
        or image.dtype != np.uint8
        or image.shape[2:] != (3,)
        or not image.size
    ):
        found = (
            f"{image.dtype} of shape {image.shape}"
            if isinstance(image, np.ndarray)
            else f"a {type(image).__name__}"
        )
        raise UserError(
            f"the image is {found}, but must be a NumPy array h w 3 of uint8 RGB pixels, from 0 to 255. Pixels are "
            "normalised here, so give them as they are."
        )
    return image


def output_names(files: Sequence[str | Path]) -> list[str]:
    """Return a name for each file's drawings: its stem, numbered where stems repeat.

    No two names differ in upper and lower case alone, because some file systems take these for one.
    """
    stems = [Path(file).stem for file in files]
    counts = Counter(stem.lower() for stem in stems)
    taken = {stem for stem, count in counts.items() if count == 1}
    names = []
    for i, stem in enumerate(stems):
        if counts[stem.lower()] > 1:
            stem = f"{stem}_{i}"
            while stem.lower() in taken:
                stem += f"_{i}"
            taken.add(stem.lower())
        names.append(stem)
    return names

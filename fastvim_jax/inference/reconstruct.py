"""Draw image files as a masked autoencoder reconstructs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.data import DecodeError, load_image
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.device_transforms import make_preprocess
from fastvim_jax.errors import UserError, one_or_several
from fastvim_jax.models import MaskedAutoencoderConfig
from fastvim_jax.models.pretrained import is_pretrained, load_pretrained, refuse_choice
from fastvim_jax.training.masked.config import PretrainConfig
from fastvim_jax.training.masked.evaluation import to_pixels
from fastvim_jax.training.masked.pictures import draw_grid, make_reconstruct
from fastvim_jax.training.run_folder import Run, load_run


def load_masked(
    source: Path | str,
    *,
    weights: Literal["raw", "ema"] | None = None,
    step: int | None = None,
) -> Run:
    """Load a masked pre-training run, or wrap a saved masked autoencoder as one.

    Args:
        source: a run folder, a folder of `save_pretrained`, or `hf://owner/name`.
        weights: for a run folder, see `load_run`.
        step: for a run folder, see `load_run`.

    Raises:
        UserError: the folder does not exist, or holds a saved model of another kind; weights or a step are
            asked of a saved model.
    """
    if not is_pretrained(source):
        return load_run(source, weights=weights, step=step)
    refuse_choice(source, weights, step)
    found = load_pretrained(source)
    config: Any = found.model.config  # type: ignore[attr-defined]
    if not isinstance(config, MaskedAutoencoderConfig):
        raise UserError(f"{source} holds a {type(found.model).__name__}, no masked autoencoder.")
    images = found.preprocessing
    data = ClassificationData(
        source="digits",  # No records are read.
        image_size=images.image_size,
        channels=config.channels,  # type: ignore[arg-type]  # Checked by the class.
        mean=images.mean,
        std=images.std,
        eval_crop=images.crop,
        random_erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
    )
    return Run(
        found.model,
        PretrainConfig(model=config, data=data, normalise_pixels=images.normalise_pixels),
        (),
        0,
        "raw",
    )


def reconstruct_files(
    run: Run,
    files: Sequence[str | Path] | str | Path,
    out: Path,
    *,
    mask_ratio: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Write a PNG with one row per image: original, masked, reconstructed and pasted.

    Args:
        run: a masked pre-training run, from `load_run`.
        files: image files of any size and kind.
        out: the PNG file.
        mask_ratio: share of patches to remove; None: that of the run.
        seed: seed of the choice of patches.

    Returns:
        One message for each file that could not be read.

    Raises:
        UserError: a run of another task; no readable file; a bad mask ratio; `out` cannot be written.
    """
    config = run.config
    if not isinstance(config, PretrainConfig):
        raise UserError(
            f"the run has a {type(config).__name__}, so its model reconstructs nothing: name a masked pre-training run "
            "(with a PretrainConfig)."
        )
    graphdef, params = nnx.split(run.model)
    if mask_ratio is not None:
        model: Any = nnx.merge(graphdef, params)
        model.config = dataclasses.replace(config.model, mask_ratio=mask_ratio)
        graphdef, params = nnx.split(model)
    images, problems = [], []
    for file in one_or_several(files):
        try:
            images.append(load_image(file, config.data))
        except DecodeError as error:
            problems.append(str(error))
    if not images:
        raise UserError("no image could be read: " + " ".join(problems))
    pixels = np.stack(images)
    rows, columns = config.model.grid
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} must be at least 0 and less than 2**63.")
    noise = jax.random.uniform(jax.random.key(seed), (len(pixels), rows * columns))
    reconstruct = jax.jit(make_reconstruct(graphdef, normalise=config.normalise_pixels))
    parts = reconstruct(params, make_preprocess(config.data)(jnp.asarray(pixels)), noise)
    try:
        draw_grid(Path(out), [pixels, *(to_pixels(config, np.asarray(part)) for part in parts)])
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}.") from error
    return problems

"""Save a model as a folder that others can load (`pretrained`).

A folder holds `model.safetensors` (unstacked parameters under this library's names), `config.json` (the model's config,
preprocessing and class names) and `README.md`, the model card. No file holds code or a pickle. Models have
`save_pretrained` as a method: `model.save_pretrained(folder)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.errors import UserError, counted, require_texts
from fastvim_jax.models.model_card import CARD_FILE, card_text
from fastvim_jax.models.parameters import count_parameters, named_parameters
from fastvim_jax.models.safetensors_file import write_safetensors
from fastvim_jax.serialise import to_dict
from fastvim_jax.version import __version__

FORMAT = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Say how an image becomes the model's input: it is resized, cropped in the centre, and normalised.

    Attributes:
        image_size: height and width of the crop in pixels.
        crop: side of the crop divided by the shorter side of the resized image, from 0 to 1.
        mean: mean of each channel, for pixels from 0 to 1.
        std: standard deviation of each channel, for pixels from 0 to 1.
        channel_names: names of the channels in order, for a model of microscope images; else empty.
        normalise_pixels: whether a masked autoencoder predicts pixels that are normalised patch by patch.
    """

    image_size: tuple[int, int]
    crop: float = 0.875
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channel_names: tuple[str, ...] = ()
    normalise_pixels: bool = True


def default_preprocessing(config: Any) -> Preprocessing:
    """Return a model's image size with ImageNet's mean and standard deviation, or 0 and 1 unless it has 3 channels."""
    size, channels = tuple(config.image_size), config.channels
    if channels == len(IMAGENET_MEAN):
        return Preprocessing(size)
    return Preprocessing(size, mean=(0.0,) * channels, std=(1.0,) * channels)


def save_pretrained(
    model: nnx.Module,
    folder: Path | str,
    *,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] = (),
    card: Mapping[str, str] | None = None,
    dtype: str = "float32",
) -> Path:
    """Write a model's weights, config and card to a folder.

    Args:
        model: a model of `create_model` or of a run, with its `config`.
        folder: is made if it is missing. A model that is there already is replaced.
        preprocessing: how images become the model's input; by default `default_preprocessing(model.config)`.
        class_names: names of the classes in order, or none.
        card: sections of the model card, text by heading, for example {"Data": ..., "Results": ..., "Licence": ...}.
            The hub shows the licence if the section is its name, such as "CC BY 4.0" or "apache-2.0".
        dtype: "float32", or "bfloat16", which rounds the weights and halves the file.

    Raises:
        UserError: `dtype` is another one; the number of class names is not the model's number of classes.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r}: weights are saved as float32 or bfloat16.")
    config: Any = model.config  # type: ignore[attr-defined]
    class_names = require_texts(class_names, "class_names")
    check_class_names(class_names, config)
    preprocessing = preprocessing or default_preprocessing(config)
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: np.asarray(jnp.asarray(value, dtype) if _is_float(value) else value)
        for name, value in named_parameters(nnx.state(model)).items()
    }
    about = {
        "format": FORMAT,
        "fastvim_jax": __version__,
        "model": to_dict(config),
        "preprocessing": to_dict(preprocessing),
        "class_names": list(class_names),
    }
    # The weights are written last, because a folder without them does not count as a model.
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    (folder / CONFIG_FILE).write_text(
        json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8"
    )
    text = card_text(about, count_parameters(nnx.state(model)), card or {}, dtype)
    (folder / CARD_FILE).write_text(text, "utf-8")
    write_safetensors(arrays, folder / WEIGHTS_FILE, format="np", library="fastvim-jax")
    return folder


def check_class_names(names: Sequence[str], config: Any, where: str = "") -> None:
    """Check that there are as many names as a model has classes, or none.

    Args:
        names: names of the classes in order, or none.
        config: config of the model.
        where: text for the message that says where the names come from.

    Raises:
        UserError: there are more or fewer names.
    """
    classes = getattr(config, "num_classes", len(names))
    if names and len(names) != classes:
        raise UserError(
            f"{counted(len(names), 'class name is', 'class names are')} given{where} for "
            f"{counted(classes, 'class', 'classes')}."
        )


def _is_float(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)

"""Save a model as a folder that others can load, and load one from a folder or the Hugging Face hub.

A folder holds `model.safetensors` (unstacked parameters under this library's names), `config.json` (the model's config,
preprocessing and class names) and `README.md`, the model card. No file holds code or a pickle.
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
from fastvim_jax.json_text import parse_json
from fastvim_jax.models.model_card import CARD_FILE, card_text, read_licence
from fastvim_jax.models.parameters import (
    check_numbers,
    count_parameters,
    named_parameters,
    replace_parameters,
)
from fastvim_jax.models.registry import build_model, config_class
from fastvim_jax.models.safetensors_file import read_safetensors, write_safetensors
from fastvim_jax.regular_file import read_regular_file
from fastvim_jax.serialise import from_dict, to_dict
from fastvim_jax.version import __version__

FORMAT = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
HUB = "hf://"
"""Prefix that tells the name of a repository on the Hugging Face hub from a folder."""
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


@dataclass(frozen=True)
class Pretrained:
    """Hold a model that was loaded from a folder.

    Attributes:
        model: the NNX model with its weights.
        preprocessing: how images become its input.
        class_names: names of the classes in order; empty for a model without classes.
        licence: licence of the weights, as the model card names it; empty if it names none.
    """

    model: nnx.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    licence: str = ""


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
    folder = Path(folder)
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


def load_pretrained(
    source: Path | str, *, revision: str | None = None, offline: bool = False
) -> Pretrained:
    """Load a model, its preprocessing and its class names.

    Args:
        source: a folder of `save_pretrained`, or the name of a repository on the Hugging Face hub, `owner/name` or
            `hf://owner/name`.
        revision: branch, tag or commit of a repository.
        offline: take a repository from the local cache, where an earlier call left it, and do not use the network.

    Raises:
        UserError: there is no such folder or repository; a file is damaged or of a newer format; weights do not fit.
    """
    folder = _folder_of(source, revision, offline)
    about = _read_config(folder / CONFIG_FILE)
    config = read_model_config(folder)
    preprocessing = from_dict(Preprocessing, about["preprocessing"], "preprocessing")
    weights = folder / WEIGHTS_FILE
    if not weights.exists():
        raise UserError(f"{folder} holds no model: it has no {WEIGHTS_FILE}.")
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    arrays = read_safetensors(weights)
    check_numbers(arrays, str(weights))
    params = replace_parameters(nnx.state(model), arrays)
    names = tuple(map(str, about["class_names"]))
    check_class_names(names, config, f" by {folder / CONFIG_FILE}")
    model = nnx.merge(nnx.graphdef(model), params)
    return Pretrained(model, preprocessing, names, read_licence(folder))


def from_pretrained(source: Path | str, **options: Any) -> Any:
    """Load a model alone; see `load_pretrained`."""
    return load_pretrained(source, **options).model


def read_model_config(source: Path | str) -> Any:
    """Read the config of the model in a folder of `save_pretrained` or a repository, as `load_pretrained` takes them.

    Raises:
        UserError: the file is missing, damaged or of a newer format; there is no such repository.
    """
    values = _read_config(_folder_of(source) / CONFIG_FILE)["model"]
    return from_dict(config_class(values.get("class", "")), values, "model")


def read_preprocessing(source: Path | str) -> Preprocessing:
    """Read how images become the model's input, as `read_model_config` reads the model's config.

    Raises:
        UserError: as `read_model_config`.
    """
    about = _read_config(_folder_of(source) / CONFIG_FILE)
    return from_dict(Preprocessing, about["preprocessing"], "preprocessing")


def is_pretrained(source: Path | str) -> bool:
    """Return whether `source` names a saved model: a folder of `save_pretrained`, or `hf://owner/name`.

    A folder whose weights are missing, as after a full disk, is one, too: loading it says what is missing.
    """
    folder = Path(source).expanduser()
    if str(source).startswith(HUB) or not (folder / CONFIG_FILE).is_file():
        return str(source).startswith(HUB)
    if (folder / WEIGHTS_FILE).is_file():
        return True
    try:
        about = parse_json(read_regular_file(folder / CONFIG_FILE))
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and {"format", "model", "preprocessing"} <= about.keys()


def require_room(folder: Path, *, overwrite: bool) -> None:
    """Raise a `UserError` unless a saved model may be written to `folder`.

    A missing or empty folder is free. With `overwrite` a saved model is replaced. Other files never are.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not is_pretrained(folder):
        raise UserError(f"{folder} exists and holds no saved model: name another folder.")
    if not overwrite:
        raise UserError(
            f"{folder} holds a saved model: name another folder, or replace the model by --overwrite (overwrite=True)."
        )


def refuse_choice(source: Path | str, weights: object, step: object) -> None:
    """Raise a `UserError` if weights or a step are asked of a source that holds one set of weights: no run folder."""
    if weights is not None or step is not None:
        raise UserError(
            f"{source} holds one set of weights: only run folders take weights and step."
        )


def _folder_of(source: Path | str, revision: str | None = None, offline: bool = False) -> Path:
    """Return `source` itself if it is a folder, else the folder in the cache that holds a repository's files."""
    name = str(source)
    folder = Path(source).expanduser()
    if not name.startswith(HUB) and folder.is_dir():
        return folder
    try:
        return _from_hub(name.removeprefix(HUB), revision, offline)
    except UserError as error:
        if name.startswith(HUB) or "there is no folder" in str(error):
            raise
        raise UserError(
            f"there is no folder {name}; as the name of a repository, {error}"
        ) from error


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


def _read_config(path: Path) -> dict[str, Any]:
    try:
        about = parse_json(read_regular_file(path))
        found = about["format"]
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no model: it has no {CONFIG_FILE}.") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} describes no model of save_pretrained: {error}.") from error
    if found != FORMAT:
        raise UserError(
            f"{path} has format {found!r}; this version reads {FORMAT}: use a newer fastvim-jax."
        )
    model, names = about.get("model"), about.get("class_names")
    if not isinstance(model, dict) or not isinstance(model.get("class"), str):
        raise UserError(f"{path} describes no model of save_pretrained: 'model' names no class.")
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise UserError(f"{path} describes no model of save_pretrained: class_names is no list.")
    if "preprocessing" not in about:
        raise UserError(f"{path} describes no model of save_pretrained: it has no preprocessing.")
    return about


def _from_hub(name: str, revision: str | None, offline: bool) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"there is no folder {name}, and a repository on the Hugging Face hub would be called owner/name."
        )
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise UserError(
            f"loading {name} from the hub needs huggingface_hub: pip install 'fastvim-jax[hub]'."
        ) from None
    try:
        wanted = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
        return Path(
            snapshot_download(
                name, revision=revision, local_files_only=offline, allow_patterns=wanted
            )
        )
    except LocalEntryNotFoundError as error:
        offline = offline or constants.HF_HUB_OFFLINE
        why = "it is not in the cache" if offline else "the hub cannot be reached"
        raise UserError(
            f"{name}: {why}, and no earlier copy is here. Load it once with a network, or copy its folder from another "
            "machine and name that folder. Later calls find it in the cache; with offline=True (HF_HUB_OFFLINE=1) they "
            "do not use the network."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{name} cannot be loaded from the hub: {first}") from error

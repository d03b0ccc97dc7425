"""Load a model from a folder of `saving.save_pretrained`, or from the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from fastvim_jax.errors import UserError
from fastvim_jax.json_text import parse_json
from fastvim_jax.models.model_card import CARD_FILE, read_licence
from fastvim_jax.models.parameters import check_numbers, replace_parameters
from fastvim_jax.models.registry import build_model, config_class
from fastvim_jax.models.safetensors_file import read_safetensors
from fastvim_jax.models.saving import (
    CONFIG_FILE,
    FORMAT,
    WEIGHTS_FILE,
    Preprocessing,
    check_class_names,
)
from fastvim_jax.regular_file import read_regular_file
from fastvim_jax.serialise import from_dict

HUB = "hf://"
"""Prefix that tells the name of a repository on the Hugging Face hub from a folder."""


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
    repository = name.removeprefix(HUB)
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise UserError(
            f"there is no folder {repository}, and a repository on the Hugging Face hub would be called owner/name."
        )
    try:
        return _from_hub(repository, revision, offline)
    except UserError as error:
        if name.startswith(HUB):
            raise
        raise UserError(
            f"there is no folder {name}; as the name of a repository, {error}"
        ) from error


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

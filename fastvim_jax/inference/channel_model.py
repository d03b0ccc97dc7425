"""Load models of images with named channels (microscopy), from runs and from saved models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvim_jax.data import CellsData
from fastvim_jax.errors import UserError
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.models.pretrained import (
    is_pretrained,
    load_pretrained,
    read_model_config,
    refuse_choice,
)
from fastvim_jax.training.run_folder import load_run, read_config


def has_channels(source: Path | str) -> bool:
    """Return whether the model of a run or of a folder of `save_pretrained` takes images with named channels.

    Raises:
        UserError: the folder is neither of these, or damaged.
    """
    if is_pretrained(source):
        return isinstance(read_model_config(source), ChannelMambaConfig | ChannelViTConfig)
    return isinstance(getattr(read_config(source), "data", None), CellsData)


def load_channel_model(source: Path | str, *, weights: str | None = None) -> tuple[Any, CellsData]:
    """Load a model of images with named channels, and the data config that says how its images are normalised.

    Args:
        source: the folder of a run on `CellsData`, or of `save_pretrained`.
        weights: for a run, `raw` or `ema`; None: what `load_run` takes.

    Raises:
        UserError: there is no such folder, or its model takes other images.
    """
    if not is_pretrained(source):
        run = load_run(source, weights=weights)
        return run.model, channel_data(run.config, source)
    refuse_choice(source, weights, None)
    found = load_pretrained(source)
    config: Any = found.model.config  # type: ignore[attr-defined]
    images = found.preprocessing
    if not isinstance(config, ChannelMambaConfig | ChannelViTConfig):
        raise UserError(
            f"{source} holds a {type(found.model).__name__}, not a model of images with named channels."
        )
    data = CellsData(
        source="digits",  # No records are read.
        image_size=images.image_size,
        channels=config.channels,
        channel_names=images.channel_names,
        mean=images.mean,
        std=images.std,
        flip=0.0,  # Images need not be square to be embedded.
    )
    return found.model, data


def channel_data(config: Any, run_dir: Path | str) -> CellsData:
    """Return the data config of a run.

    Raises:
        UserError: the run was not trained on images with named channels.
    """
    if not isinstance(getattr(config, "data", None), CellsData):
        raise UserError(f"{str(run_dir)!r} was not trained on images of many channels (CellsData).")
    return config.data

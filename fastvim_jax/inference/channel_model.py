"""Load models of images with channels by name, from runs and from saved models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvim_jax.data import CellsData
from fastvim_jax.errors import UserError
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.models.pretrained import is_pretrained, load_pretrained, read_model_config
from fastvim_jax.training.run_folder import load_run, read_config


def has_channels(source: Path | str) -> bool:
    """Return whether the model of a run or of a folder of `save_pretrained` is one of images with channels by name.

    Raises:
        UserError: neither of these, or a damaged one.
    """
    if is_pretrained(source):
        return isinstance(read_model_config(source), ChannelMambaConfig | ChannelViTConfig)
    return isinstance(getattr(read_config(source), "data", None), CellsData)


def load_channel_model(source: Path | str, *, weights: str | None = None) -> tuple[Any, CellsData]:
    """Load a model of images with channels by name, and the data that say how its images are normalised.

    Args:
        source: the folder of a run on `CellsData`, or of `save_pretrained`.
        weights: of a run, `raw` or `ema`; None: the average if the run kept one.

    Raises:
        UserError: no such folder, or a model of other images.
    """
    if not is_pretrained(source):
        run = load_run(source, weights=weights)
        return run.model, channel_data(run.config, source)
    found = load_pretrained(source)
    config: Any = found.model.config  # type: ignore[attr-defined]
    images = found.preprocessing
    if not isinstance(config, ChannelMambaConfig | ChannelViTConfig):
        raise UserError(
            f"{source} holds a {type(found.model).__name__}, no model of images with channels by name."
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
    """Return the data of a run's config.

    Raises:
        UserError: the run was not trained on data with channels by name.
    """
    if not isinstance(getattr(config, "data", None), CellsData):
        raise UserError(f"{str(run_dir)!r} was not trained on images of many channels (CellsData).")
    return config.data

"""Name the command that uses a saved model, by the kind of the model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.models.config import BackboneConfig
from fastvim_jax.models.mae_config import MaskedAutoencoderConfig


def next_command(folder: Path | str, config: Any) -> str:
    """Return the arguments of `fastvim` that use a saved model.

    Args:
        folder: folder of the saved model; it is quoted for a shell.
        config: config of the model.

    Returns:
        For example `predict FOLDER PHOTO`; empty for segmentation models and detectors, whose run folders alone tell
        how images are fitted.
    """
    name = shlex.quote(str(folder))
    if isinstance(config, MaskedAutoencoderConfig):
        return f"reconstruct {name} PHOTO"
    if isinstance(config, ChannelMambaConfig | ChannelViTConfig):
        return f"embed {name} FIELD --out features.parquet"
    if not isinstance(config, BackboneConfig):
        return ""
    return (
        f"predict {name} PHOTO" if config.num_classes else f"embed {name} PHOTO --out features.csv"
    )

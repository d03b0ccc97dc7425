"""Choose the pooling scale of a model that starts from the weights of a masked run.

Masked pre-training divides a row's sum by the length of the whole row, although a row then holds only 1 - mask_ratio
of its tokens. A model that sees whole rows gets means that are larger by 1 / (1 - mask_ratio), unless they are scaled.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastvim_jax.models import MaskedAutoencoderConfig
from fastvim_jax.models.pretrained import is_pretrained, read_model_config
from fastvim_jax.training.run_folder import CONFIG_FILE, has_checkpoint, read_config


def with_scale_of_init(config: Any, run_dir: Path | str) -> Any:
    """Return a run's config with model.pool_scale set to 1 - mask_ratio of the masked run that it starts from.

    Only a pool_scale of 1 over pooled means is changed, and only if `config.scale_from_init` is set. A resumed run
    keeps the scale that it began with, so that it does not need the masked run any more.

    Args:
        config: of a classifier's, a probe's, a segmenter's or a detector's run, with `init`, `scale_from_init` and
            `model`; the scale is that of `model`, or of `model.backbone`.
        run_dir: the run folder, which may exist.
    """
    model = getattr(config.model, "backbone", config.model)
    pools = getattr(model, "pooling", None) == "mean" and getattr(model, "pool_scale", None) == 1.0
    if not (config.init and config.scale_from_init and pools):
        return config
    # Without a checkpoint the run starts anew, perhaps after a start without the scale.
    if (Path(run_dir) / CONFIG_FILE).is_file() and has_checkpoint(Path(run_dir)):
        saved = read_config(run_dir)
        if saved.init == config.init and type(saved.model) is type(config.model):
            return _scaled(config, getattr(saved.model, "backbone", saved.model).pool_scale)
    folder = Path(config.init).expanduser()
    if is_pretrained(config.init):
        source = read_model_config(config.init)
    elif (folder / CONFIG_FILE).is_file():
        source = read_config(folder).model
    else:
        return config
    masked = isinstance(source, MaskedAutoencoderConfig) and source.divisor == "row_length"
    return _scaled(config, 1 - source.mask_ratio) if masked else config


def _scaled(config: Any, scale: float) -> Any:
    model = config.model
    if hasattr(model, "backbone"):
        model = dataclasses.replace(
            model, backbone=dataclasses.replace(model.backbone, pool_scale=scale)
        )
    else:
        model = dataclasses.replace(model, pool_scale=scale)
    return dataclasses.replace(config, model=model)

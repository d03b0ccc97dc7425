"""List the tasks that can be trained, by the class of their config.

A task is a folder beside this file. Its `config` module holds the config's class, a `RunConfig`; its `train` module
holds `train(config, call) -> RunResult`, which ends in `loop.run_loop`. A new task is one more line in `TASKS`.
"""

from __future__ import annotations

import importlib
import json
from types import ModuleType
from typing import Any

from fastvim_jax import serialise
from fastvim_jax.errors import UserError, suggest
from fastvim_jax.json_text import parse_json
from fastvim_jax.training.config import RunConfig

TASKS = {
    "TrainConfig": "fastvim_jax.training.classification",
    "DetectionConfig": "fastvim_jax.training.detection",
    "PretrainConfig": "fastvim_jax.training.masked",
    "ProbeConfig": "fastvim_jax.training.masked",
    "SegmentationConfig": "fastvim_jax.training.segmentation",
}
"""The folder of each task, by the name of its config's class."""


def trainer_of(config: RunConfig) -> ModuleType:
    """Return the module whose `train` trains by this config.

    Raises:
        UserError: the config's class belongs to no task.
    """
    return importlib.import_module(f"{folder_of(config)}.train")


def folder_of(config: RunConfig) -> str:
    """Return the package of a config's task."""
    return _folder(type(config).__name__)


def config_from_json(text: str) -> RunConfig:
    """Read the config of a run of any task, as `RunConfig.to_json` of this version or an earlier one wrote it.

    Raises:
        UserError: the text is no JSON, names no task's config, or a field is unknown, missing or mistyped.
    """
    try:
        values = parse_json(text)
        name = str(values["class"])
        text = json.dumps(_as_written_today(values))
    except (ValueError, TypeError, KeyError):
        name = "TrainConfig"  # Reading the text as one says what is wrong.
    module = importlib.import_module(f"{_folder(name)}.config")
    config: RunConfig = serialise.from_json(getattr(module, name), text)
    return config


def _as_written_today(values: dict[str, Any]) -> dict[str, Any]:
    """Rename what earlier versions called otherwise.

    Classification's data were of class DataConfig. They had a `mix_mode`, which was "batch", in place of `mix_group`:
    whole batches were mixed.
    """
    data = values.get("data")
    if not isinstance(data, dict) or data.get("class") != "DataConfig":
        return values
    data = {**data, "class": "ClassificationData"}
    if data.get("mix_mode") == "batch":
        del data["mix_mode"]
        if data.get("mixup") or data.get("cutmix"):
            data["mix_group"] = max(128, data["batch_size"])
    return {**values, "data": data}


def _folder(name: str) -> str:
    if name not in TASKS:
        raise UserError(
            f"no task has a config of class {name}; known are {', '.join(TASKS)}.{suggest(name, TASKS)}"
        )
    return TASKS[name]

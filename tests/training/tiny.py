"""The smallest real run: a FastVim of one block on the digits, 11 steps per epoch, seconds of compute.

A second block pools the other axis and compiles half as long again: ask for it where a test is about several blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastvim_jax.data import ClassificationData
from fastvim_jax.models import VisionMambaConfig
from fastvim_jax.training import OptimizerConfig, TrainConfig

STEPS_PER_EPOCH = 11
EVAL_IMAGES = 360


def tiny_model(**changes: Any) -> VisionMambaConfig:
    options: dict[str, Any] = {
        "image_size": 8,
        "patch_size": 4,
        "channels": 1,
        "num_classes": 10,
        "embed_dim": 8,
        "depth": 1,
        "state_size": 4,
        "drop_path": 0.3,
        "blocks": "unroll",
    }
    return VisionMambaConfig(**{**options, **changes})


def tiny_config(*, model: Any = None, optimizer: Any = None, **changes: Any) -> TrainConfig:
    data = ClassificationData(
        source="digits",
        image_size=8,
        channels=1,
        batch_size=128,
        eval_batch_size=100,
        crop="pad_shift",
        pad=1,
        flip=0.0,
        eval_crop=1.0,
        mean=(0.3,),
        std=(0.4,),
    )
    options: dict[str, Any] = {
        "model": model or tiny_model(),
        "data": data,
        "optimizer": optimizer
        or OptimizerConfig(
            learning_rate=2e-3,
            learning_rate_scaling="none",
            warmup_epochs=0.5,
            weight_decay_end=0.4,
        ),
        "epochs": 2,
        "ema_decay": 0.9,
        "checkpoint_every_steps": 4,
        "log_every_steps": 3,
    }
    return TrainConfig(**{**options, **changes})


def tiny_batch(rng: np.random.Generator, size: int = 6) -> dict[str, np.ndarray]:
    return {
        "image": rng.normal(size=(size, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 10, size).astype(np.int32),
    }

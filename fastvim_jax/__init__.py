"""FastVim: vision Mamba models whose scan runs over pooled tokens, in JAX and Flax NNX.

The names below are the public API; they are imported on first use, so that `import fastvim_jax` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastvim_jax.version import __version__

_HOMES = {
    "Classifier": "fastvim_jax.inference",
    "UserError": "fastvim_jax.errors",
    "VisionMambaConfig": "fastvim_jax.models",
    "ViTConfig": "fastvim_jax.models",
    "build_model": "fastvim_jax.models",
    "create_model": "fastvim_jax.models",
    "from_pretrained": "fastvim_jax.models.pretrained",
    "jvp": "fastvim_jax.forward_mode",
    "list_models": "fastvim_jax.models",
    "load_pretrained": "fastvim_jax.models.pretrained",
    "save_pretrained": "fastvim_jax.models.saving",
    "model_config": "fastvim_jax.models",
    "from_torch_state_dict": "fastvim_jax.interop",
    "to_torch_state_dict": "fastvim_jax.interop",
    "TrainConfig": "fastvim_jax.training",
    "evaluate": "fastvim_jax.training",
    "load_experiment": "fastvim_jax.training",
    "load_run": "fastvim_jax.training",
    "load_weights": "fastvim_jax.training",
    "train": "fastvim_jax.training",
}

__all__ = [
    "Classifier",
    "TrainConfig",
    "UserError",
    "ViTConfig",
    "VisionMambaConfig",
    "__version__",
    "build_model",
    "create_model",
    "evaluate",
    "from_pretrained",
    "from_torch_state_dict",
    "jvp",
    "list_models",
    "load_experiment",
    "load_pretrained",
    "load_run",
    "load_weights",
    "model_config",
    "save_pretrained",
    "to_torch_state_dict",
    "train",
]

if TYPE_CHECKING:
    from fastvim_jax.errors import UserError
    from fastvim_jax.forward_mode import jvp
    from fastvim_jax.inference import Classifier
    from fastvim_jax.interop import from_torch_state_dict, to_torch_state_dict
    from fastvim_jax.models import (
        VisionMambaConfig,
        ViTConfig,
        build_model,
        create_model,
        list_models,
        model_config,
    )
    from fastvim_jax.models.pretrained import from_pretrained, load_pretrained
    from fastvim_jax.models.saving import save_pretrained
    from fastvim_jax.training import (
        TrainConfig,
        evaluate,
        load_experiment,
        load_run,
        load_weights,
        train,
    )


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastvim_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""FastVim and its relatives in JAX: models, training, weights in and out.

The names below are the public interface. They are imported when first used, so that data-loading processes, which import
`fastvim_jax.data` only, start without JAX's models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastvim_jax.errors import UserError

if TYPE_CHECKING:
    from fastvim_jax.models import (
        VisionMambaConfig,
        ViTConfig,
        build_model,
        create_model,
        list_models,
        model_config,
    )

__version__ = "0.1.0"

_HOME = {
    "VisionMambaConfig": "fastvim_jax.models",
    "ViTConfig": "fastvim_jax.models",
    "build_model": "fastvim_jax.models",
    "create_model": "fastvim_jax.models",
    "list_models": "fastvim_jax.models",
    "model_config": "fastvim_jax.models",
}

__all__ = [
    "UserError",
    "ViTConfig",
    "VisionMambaConfig",
    "__version__",
    "build_model",
    "create_model",
    "list_models",
    "model_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__

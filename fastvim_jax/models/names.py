"""Translate option names known from timm to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvim_jax.errors import UserError
from fastvim_jax.precision import dtype_name

ALIASES = {
    "in_chans": "channels",
    "img_size": "image_size",
    "drop_path_rate": "drop_path",
    "global_pool": "head_pool",
}
"""timm's names of options, and ours."""
POOLS = {"avg": "mean", "": "all"}
"""timm's values of `global_pool`, and ours where they differ."""
REFUSED = {
    "pretrained": "No weights are downloaded. Load them with fastvim_jax.from_torch_state_dict.",
    "checkpoint_path": "Load weights with fastvim_jax.from_torch_state_dict.",
    "features_only": "Use out_indices=(...) for dense features.",
    "drop_rate": "These models have no dropout; drop_path is the rate of stochastic depth.",
    "attn_drop_rate": "These models have no dropout; drop_path is the rate of stochastic depth.",
}
"""timm's options that mean nothing here, and what to do instead."""


def understood(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` under our names, with dtypes as names.

    Raises:
        UserError: an option under both names, or one of timm's that means nothing here (unless it is off).
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name in REFUSED:
            if value:
                raise UserError(f"{name}={value!r}: {REFUSED[name]}")
            continue
        ours = ALIASES.get(name, name)
        if ours in found or (ours != name and ours in options):
            raise UserError(f"{name} and {ours} are the same option; give one of them.")
        if name == "global_pool":
            value = POOLS.get(value, value)
        found[ours] = dtype_name(value) if ours in ("dtype", "param_dtype") else value
    return found

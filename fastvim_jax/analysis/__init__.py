"""Compute what a model costs, and draw pictures of a run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastvim_jax.analysis.flops import (
        ModelCost,
        activations,
        count_parameters,
        gmacs,
        model_cost,
        parallel_steps,
        scan_steps,
    )
    from fastvim_jax.analysis.plots import Sample, plot_run

_HOMES = {
    "ModelCost": "flops",
    "activations": "flops",
    "count_parameters": "flops",
    "gmacs": "flops",
    "model_cost": "flops",
    "parallel_steps": "flops",
    "scan_steps": "flops",
    "Sample": "plots",
    "plot_run": "plots",
}

__all__ = [
    "ModelCost",
    "Sample",
    "activations",
    "count_parameters",
    "gmacs",
    "model_cost",
    "parallel_steps",
    "plot_run",
    "scan_steps",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The implementations by name, and the rule behind `"auto"`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import jax

from pallas_kernels.selective_scan import vjp
from pallas_kernels.selective_scan.types import Backend, ScanForward, ScanInputs, ScanOptions

_MODULES = {
    "pallas": "pallas_kernels.selective_scan.mosaic",
    "xla_associative": "pallas_kernels.selective_scan.xla_associative",
    "xla_sequential": "pallas_kernels.selective_scan.xla_sequential",
    "reference": "pallas_kernels.selective_scan.reference",
}

IMPLEMENTATIONS: tuple[str, ...] = ("auto", "xla", *_MODULES)
"""Every name that `selective_scan(..., implementation=...)` takes; a later version may add some."""


@dataclasses.dataclass(frozen=True)
class ByPlatform:
    """One backend on CPUs, another elsewhere, chosen when the program is lowered."""

    cpu: Backend
    default: Backend

    def forward(self, inputs: ScanInputs, options: ScanOptions) -> ScanForward:
        """See `types.Backend`."""
        return jax.lax.platform_dependent(
            inputs,
            cpu=lambda x: self.cpu.forward(x, options),
            default=lambda x: self.default.forward(x, options),
        )

    def backward(self, inputs, options, boundaries, y_bar, last_state_bar) -> ScanInputs:
        """See `types.Backend`."""
        return jax.lax.platform_dependent(
            (inputs, boundaries, y_bar, last_state_bar),
            cpu=lambda x: self.cpu.backward(x[0], options, *x[1:]),
            default=lambda x: self.default.backward(x[0], options, *x[1:]),
        )


def xla_backend(batch: int, length: int, channels: int, states: int) -> Backend:
    """The faster of the two XLA backends for a scan of this size, on the platform lowered for."""
    return ByPlatform(cpu=_module("xla_sequential"), default=_module("xla_associative"))


def get(name: str, inputs: ScanInputs) -> Callable[[ScanInputs, ScanOptions], tuple]:
    """The function that runs `inputs`.

    Raises:
        ValueError: no implementation has this name.
        NotImplementedError: this version or this shape has none of this name.
    """
    if name not in IMPLEMENTATIONS:
        choices = ", ".join(repr(choice) for choice in IMPLEMENTATIONS)
        raise ValueError(f"selective_scan: implementation must be one of {choices}; got {name!r}")
    if name == "reference":
        return _module(name).scan
    if name in ("auto", "xla"):
        backend = xla_backend(*inputs.u.shape, inputs.A.shape[1])
    else:
        backend = _module(name)
    return lambda inputs, options: vjp.scan(backend, options, inputs)


def _module(name: str) -> ModuleType:
    path = _MODULES[name]
    if importlib.util.find_spec(path) is None:
        raise NotImplementedError(
            f"selective_scan: there is no {name!r} implementation in this version; "
            "use implementation='auto', which picks the fastest one there is"
        )
    return importlib.import_module(path)

"""The implementations by name, and the rule behind `"auto"`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import jax

from pallas_kernels import gpu
from pallas_kernels.selective_scan import vjp
from pallas_kernels.selective_scan.each_direction import DIRECTIONS, EachDirection, of_direction
from pallas_kernels.selective_scan.sharded import Sharded
from pallas_kernels.selective_scan.types import Backend, ScanForward, ScanInputs, ScanOptions
from pallas_kernels.sharding import varying

_MODULES = {
    "pallas": "pallas_kernels.selective_scan.mosaic",
    "xla_associative": "pallas_kernels.selective_scan.xla_associative",
    "xla_sequential": "pallas_kernels.selective_scan.xla_sequential",
    "reference": "pallas_kernels.selective_scan.reference",
}

_PAIR = "pallas_kernels.selective_scan.mosaic_pair"

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


@dataclasses.dataclass(frozen=True)
class KernelOnCuda:
    """The Mosaic kernels where the program is lowered for CUDA, XLA elsewhere."""

    kernel: ModuleType
    other: Backend

    def forward(self, inputs: ScanInputs, options: ScanOptions) -> ScanForward:
        """See `types.Backend`."""
        other = lambda x: self.other.forward(x, options)  # noqa: E731
        if (
            self.kernel.unsupported(inputs) is not None
        ):  # a device's share may be, of a whole that is not
            return other(inputs)
        return jax.lax.platform_dependent(
            inputs, cuda=lambda x: varying(self.kernel.forward(x, options), x), default=other
        )

    def backward(self, inputs, options, boundaries, y_bar, last_state_bar) -> ScanInputs:
        """See `types.Backend`."""
        other = lambda x: self.other.backward(x[0], options, *x[1:])  # noqa: E731
        arrays = (inputs, boundaries, y_bar, last_state_bar)
        if self.kernel.unsupported(inputs) is not None:
            return other(arrays)
        return jax.lax.platform_dependent(
            arrays,
            cuda=lambda x: varying(self.kernel.backward(x[0], options, *x[1:]), x),
            default=other,
        )


# Of the two XLA backends: on a CPU the loop of steps wins at every size, since it works on what the cache holds
# and does half the arithmetic. Fastest of five, ms, 2 cores of an AMD EPYC (busy), JAX 0.12.0, float32, n = 16,
# what is `fastvim bench scan` now, 2026-11-23:
#     batch, length, channels        64,7,384  64,8,128  64,14,384  16,32,384  8,64,384  4,196,384  1,1024,384
#     forward           associative     96.8      10.7      182.5      100.5      95.6      135.5       258.6
#                       sequential       6.0       1.9       10.0        4.7       2.9        6.6        12.6
#     forward+backward  associative    165.8      68.7      352.4      223.3     417.3      459.4       807.2
#                       sequential      31.2       8.2       95.5       17.3      45.0       22.5       127.7
# On a GPU every step is a launch: on an H100, forward, 1.20 against 1.62 ms at (128, 196, 384), 1.59
# against 12.9 at (32, 1024, 384). Shorter scans have not been measured there.
def xla_backend() -> Backend:
    """The faster of the two XLA backends on the platform lowered for."""
    return ByPlatform(cpu=_module("xla_sequential"), default=_module("xla_associative"))


def get(name: str, inputs: ScanInputs) -> Callable[[ScanInputs, ScanOptions], tuple]:
    """The function that runs `inputs`: one scan, or those of both directions if u is `d b l e`.

    Raises:
        ValueError: no implementation has this name.
        NotImplementedError: this version or this shape has none of this name.
    """
    if name not in IMPLEMENTATIONS:
        choices = ", ".join(repr(choice) for choice in IMPLEMENTATIONS)
        raise ValueError(f"selective_scan: implementation must be one of {choices}; got {name!r}")
    pair = inputs.u.ndim == 4
    one = lambda backend: EachDirection(backend) if pair else backend  # noqa: E731
    if name == "reference":
        scan = _module(name).scan
        if not pair:
            return scan
        return lambda x, options: (
            tuple(scan(*of_direction(x, options, d))[0] for d in DIRECTIONS),
            None,
        )
    xla = one(xla_backend())
    if name in ("auto", "pallas"):
        missing = gpu.kernels_missing()
        kernel = None if missing else _module("pallas_pair" if pair else "pallas")
        reason = missing or kernel.unsupported(inputs)
        if reason is None:
            backend = Sharded(
                kernel if name == "pallas" else KernelOnCuda(kernel, xla),
                opaque=not kernel.interpreted(),
            )
            chunk = kernel.chunk_length(inputs)
            return lambda inputs, options: vjp.scan(
                backend, dataclasses.replace(options, chunk=chunk), inputs
            )
        if name == "pallas":
            raise NotImplementedError(f"selective_scan: 'pallas' cannot run here: {reason}")
        if missing != "there is no GPU":
            gpu.log_once(f"selective_scan: using XLA and not the GPU kernels, since {reason}")
    chosen = xla if name in ("auto", "xla") else one(_module(name))
    chosen = Sharded(chosen, opaque=False)
    return lambda inputs, options: vjp.scan(chosen, options, inputs)


def _module(name: str) -> ModuleType:
    path = _PAIR if name == "pallas_pair" else _MODULES[name]
    if importlib.util.find_spec(path) is None:
        raise NotImplementedError(
            f"selective_scan: there is no {name!r} implementation in this version; "
            "use implementation='auto', which picks the fastest one there is"
        )
    return importlib.import_module(path)

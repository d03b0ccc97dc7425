"""The implementations by name, and the rule behind `"auto"`."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from types import ModuleType

import jax

from pallas_kernels import gpu
from pallas_kernels.selective_scan import vjp
from pallas_kernels.selective_scan.bidirectional_xla import (
    DIRECTIONS,
    Bidirectional,
    of_direction,
    rounded,
)
from pallas_kernels.selective_scan.sharded import Sharded
from pallas_kernels.selective_scan.types import (
    Backend,
    ScanForward,
    ScanInputs,
    ScanOptions,
    ScanOutput,
)
from pallas_kernels.sharding import on_cuda
from pallas_kernels.trial import Trial

_MODULES = {
    "pallas": "pallas_kernels.selective_scan.mosaic",
    "triton": "pallas_kernels.selective_scan.triton",
    "xla_associative": "pallas_kernels.selective_scan.xla_associative",
    "xla_sequential": "pallas_kernels.selective_scan.xla_sequential",
    "reference": "pallas_kernels.selective_scan.reference",
}

_BIDIRECTIONAL = "pallas_kernels.selective_scan.mosaic_bidirectional"

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
    """Kernels where the program is lowered for CUDA, XLA elsewhere."""

    kernel: ModuleType
    other: Backend

    def forward(self, inputs: ScanInputs, options: ScanOptions) -> ScanForward:
        """See `types.Backend`."""
        other = lambda x: self.other.forward(x, options)  # noqa: E731
        if (
            self.kernel.unsupported(inputs) is not None
        ):  # a device's share may be, of a whole that is not
            return other(inputs)
        return on_cuda(lambda x: self.kernel.forward(x, options), other, inputs)

    def backward(self, inputs, options, boundaries, y_bar, last_state_bar) -> ScanInputs:
        """See `types.Backend`."""
        other = lambda x: self.other.backward(x[0], options, *x[1:])  # noqa: E731
        arrays = (inputs, boundaries, y_bar, last_state_bar)
        if self.kernel.unsupported(inputs) is not None:
            return other(arrays)
        return on_cuda(lambda x: self.kernel.backward(x[0], options, *x[1:]), other, arrays)


# Of the two XLA backends: on a CPU the loop of steps wins at every size, since it works on what the cache holds
# and does half the arithmetic. Fastest of five, ms, 2 cores of an AMD EPYC (busy), JAX 0.12.0, float32, n = 16,
# what is `fastvim bench scan` now, 2026-11-23:
#     batch, length, channels        64,7,384  64,8,128  64,14,384  16,32,384  8,64,384  4,196,384  1,1024,384
#     forward           associative     96.8      10.7      182.5      100.5      95.6      135.5       258.6
#                       sequential       6.0       1.9       10.0        4.7       2.9        6.6        12.6
#     forward+backward  associative    165.8      68.7      352.4      223.3     417.3      459.4       807.2
#                       sequential      31.2       8.2       95.5       17.3      45.0       22.5       127.7
# On a GPU every step is a launch. On an H100 the loop against the associative scan, forward, ms
# (benchmarks/results/h100/scan_lengths.json): 0.09 and 0.13 at (128, 14, 384), 1.32 and 2.52 at (128, 196, 384), 5.33
# and 3.62 at (32, 1024, 384), 51.8 and 4.5 at (8, 4096, 384).
SHORT = 256


def xla_backend(length: int) -> Backend:
    """Return the faster of the two XLA backends at this length on the platform lowered for."""
    elsewhere = "xla_sequential" if length <= SHORT else "xla_associative"
    return ByPlatform(cpu=_module("xla_sequential"), default=_module(elsewhere))


def get(name: str, inputs: ScanInputs) -> Callable[[ScanInputs, ScanOptions], tuple]:
    """Return the function that runs `inputs`: one scan, or those of both directions if u is `d b l e`.

    Raises:
        ValueError: no implementation has this name.
        NotImplementedError: the kernels, asked for by name, cannot run.
    """
    if name not in IMPLEMENTATIONS:
        choices = ", ".join(repr(choice) for choice in IMPLEMENTATIONS)
        raise ValueError(f"selective_scan: implementation must be one of {choices}; got {name!r}")
    both = inputs.u.ndim == 4
    if name == "reference":
        return _reference(both)
    one_or_both = lambda backend: Bidirectional(backend) if both else backend  # noqa: E731
    xla = one_or_both(xla_backend(inputs.u.shape[-2]))
    if gpu.choose_triton(name, "selective_scan", lambda: _module("triton").unsupported(inputs)):
        kernel = _module("triton")
        backend = one_or_both(KernelOnCuda(kernel, xla_backend(inputs.u.shape[-2])))
        chunk = kernel.chunk_length(inputs)
        return lambda inputs, options: vjp.scan(
            Sharded(backend, opaque=True), dataclasses.replace(options, chunk=chunk), inputs
        )
    if name == "triton":  # what its kernels do not cover
        name = "xla_associative"
    kernel_name = "pallas_bidirectional" if both else "pallas"

    def run(inputs: ScanInputs) -> ScanOutput:
        kernel = _module(kernel_name)
        options = ScanOptions(True, False, False, kernel.chunk_length(inputs))
        return vjp.scan(Sharded(kernel, opaque=True), options, inputs)[0]

    unsupported = lambda: _module(kernel_name).unsupported(inputs)  # noqa: E731
    if gpu.choose(name, "selective_scan", unsupported, Trial(run, (inputs,), kernel_name)):
        kernel = _module(kernel_name)
        backend = kernel if name == "pallas" else KernelOnCuda(kernel, xla)
        chunk = kernel.chunk_length(inputs)
        return lambda inputs, options: vjp.scan(
            Sharded(backend, opaque=True), dataclasses.replace(options, chunk=chunk), inputs
        )
    chosen = xla if name in ("auto", "xla") else one_or_both(_module(name))
    return lambda inputs, options: vjp.scan(Sharded(chosen, opaque=False), options, inputs)


def _reference(both: bool) -> Callable[[ScanInputs, ScanOptions], tuple]:
    """Return the reference of one scan or of both directions' scans."""
    scan = _module("reference").scan
    if not both:
        return scan
    return lambda x, options: (
        rounded((scan(*of_direction(x, options, d))[0] for d in DIRECTIONS), options),
        None,
    )


def _module(name: str) -> ModuleType:
    path = _BIDIRECTIONAL if name == "pallas_bidirectional" else _MODULES[name]
    return importlib.import_module(path)

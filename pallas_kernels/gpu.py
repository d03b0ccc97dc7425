"""Decide whether an operation runs as Mosaic GPU or Triton kernels, without importing any of them."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from pallas_kernels.trial import Trial, compile_failure

logger = logging.getLogger("pallas_kernels")

OLDEST_JAX = (0, 11, 1)
NO_GPU = "there is no GPU"
T = TypeVar("T")
_interpret = False


def interpret(on: bool) -> None:
    """Make the kernels run in the CPU interpreter from the next trace on, or stop that (for tests)."""
    global _interpret
    _interpret = on


def interpreted() -> bool:
    """Return whether kernels are traced for the CPU interpreter."""
    return _interpret


_off: contextvars.ContextVar[bool] = contextvars.ContextVar("off", default=False)


@contextlib.contextmanager
def kernels_off() -> Iterator[None]:
    """Trace programs without kernels (cuDNN's attention included), as FASTVIM_KERNELS=off does for a process."""
    before = _off.set(True)
    try:
        yield
    finally:
        _off.reset(before)


def switched_off() -> str | None:
    """Return the reason why all kernels are turned off, or None if they are on."""
    if os.environ.get("FASTVIM_KERNELS") == "off":
        return "FASTVIM_KERNELS=off"
    return "the program is to be portable" if _off.get() else None


def choose(
    implementation: str,
    operation: str,
    unsupported: Callable[[], str | None],
    trial: Trial | None = None,
) -> bool:
    """Return whether `operation` runs as kernels.

    Args:
        implementation: kernels run only for "auto" and "pallas".
        operation: name of the operation, for messages.
        unsupported: returns why the kernels cannot take this call, or None. It is called, and may import the kernels,
            only where kernels can run.
        trial: the kernels of this call. On devices other than Hopper GPUs nobody has tried them, so with "auto" they
            are first compiled there.

    Raises:
        NotImplementedError: the implementation is "pallas", and the kernels cannot run. With "auto" the reason is
            logged once, except that there is no GPU.
    """
    if implementation not in ("auto", "pallas"):
        return False
    missing = kernels_missing()
    reason = missing or unsupported()
    if reason is None and implementation == "auto" and trial is not None:
        reason = trial_failure(operation, trial)
    if reason is None:
        return True
    if implementation == "pallas":
        raise NotImplementedError(f"{operation}: 'pallas' cannot run here: {reason}")
    if missing != NO_GPU:
        log_once(f"{operation}: using XLA and not the GPU kernels, since {reason}")
    return False


def trial_failure(operation: str, trial: Trial) -> str | None:
    """Return why the kernels of a call do not compile for the local GPUs, or None; on Hopper nothing is compiled."""
    return None if _tried() else compile_failure(operation, trial)


def kernels_missing() -> str | None:
    """Return why programs traced now cannot hold Mosaic GPU kernels, or None if they can.

    The kernels run on NVIDIA's data centre GPUs from Hopper on (compute capabilities 9 and 10). To lower for such a GPU
    on a machine without one, trace under `jax.sharding.use_abstract_mesh` with an abstract device. The environment
    variable FASTVIM_KERNELS=off turns all kernels off.
    """
    off = switched_off()
    if off is not None:
        return off
    if jax.__version_info__ < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        return f"JAX {jax.__version__} is older than {oldest}"
    device = _abstract_gpu()
    if device is not None:
        new = _after_ada(device.device_kind.removeprefix("NVIDIA "))
        return None if new else f"the abstract device is an {device.device_kind}"
    return _no_device()


def _abstract_gpu() -> Any:
    """Return the abstract GPU that programs are traced for (`jax.sharding.use_abstract_mesh`), or None."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device if device is not None and device.platform in ("gpu", "cuda") else None


def _after_ada(name: str) -> bool:
    old = ("K", "M", "P", "V", "T", "A", "L", "RTX", "GeForce", "Quadro", "Tesla")
    return not name.startswith(old)


def wgmma_missing() -> str | None:
    """Return why kernels with Hopper's matrix instructions (WGMMA) cannot run here, or None if they can.

    Ask only if `kernels_missing` is None. Later generations of GPUs do not have these instructions.
    """
    device = _abstract_gpu()
    if device is not None:
        hopper = device.device_kind.removeprefix("NVIDIA ").startswith(("H", "GH"))
    else:
        hopper = _all_hopper()
    return None if hopper else f"{device_kind()} does not have Hopper's matrix instructions"


def _tried() -> bool:
    """Return whether no trial is needed: programs are traced for Hopper GPUs, an abstract device or the interpreter."""
    if interpreted() or _abstract_gpu() is not None:
        return True
    return _all_hopper()


def _all_hopper() -> bool:
    return all(9.0 <= version < 10.0 for version in _capabilities())


def device_kind() -> str:
    """Return the kind of device that programs are traced for, such as "NVIDIA H100 80GB HBM3"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.device_kind if device is not None else jax.local_devices()[0].device_kind


@functools.cache
def _no_device() -> str | None:
    devices = [d for d in jax.local_devices() if d.platform in ("gpu", "cuda")]
    if not devices:
        return NO_GPU
    for device in devices:
        capability = getattr(device, "compute_capability", None)
        name = f"{device.device_kind} (compute capability {capability})"
        version = _capability(device)
        if version < 9.0:
            return f"{name} is older than Hopper"
        if version >= 11.0:
            return f"{name} has less shared memory than the 227 KB that the kernels are cut for"
    return None


def choose_triton(
    implementation: str, operation: str, unsupported: Callable[[], str | None]
) -> bool:
    """Return whether `operation` runs as Triton kernels: if asked for by name, or with "auto" on Ampere and Ada GPUs.

    Args:
        implementation: the name that the caller gave.
        operation: name of the operation, for messages.
        unsupported: returns why the kernels cannot take this call, or None. It may import jax_triton.

    Raises:
        NotImplementedError: the implementation is "triton", and this machine cannot run it. A call that the kernels do
            not support only logs a warning, once.
    """
    if implementation == "triton":
        missing = triton_missing()
        if missing is not None:
            raise NotImplementedError(f"{operation}: 'triton' cannot run here: {missing}")
    elif implementation == "auto" and _before_hopper():
        missing = triton_missing()
        if missing is not None:
            log_once(f"{operation}: using XLA and not the Triton kernels, since {missing}")
            return False
    else:
        return False
    reason = unsupported()
    if reason is not None:
        log_once(f"{operation}: using XLA and not the Triton kernels, since {reason}")
    return reason is None


def triton_missing() -> str | None:
    """Return why programs traced now cannot hold Triton kernels, or None if they can. Then jax_triton is imported.

    The kernels run on NVIDIA GPUs from Ampere on (compute capability 8.0), with the extra `triton` installed.
    FASTVIM_KERNELS=off turns these kernels off, too.
    """
    off = switched_off()
    if off is not None:
        return off
    if not _capabilities():
        return NO_GPU
    oldest = oldest_capability()
    if oldest < 8.0:
        return f"compute capability {oldest} is older than Ampere's 8.0"
    return _jax_triton_missing()


def oldest_capability() -> float:
    """Return the lowest compute capability of the local GPUs, such as 9.0; 0 without GPUs or if one is not NVIDIA's."""
    return min(_capabilities(), default=0.0)


def lowering_capability() -> float:
    """Return the compute capability of the GPUs that programs are traced for; 0 if there are none.

    For an abstract device it is derived from the generation in its name: 9 (Hopper or later), 8 (Ampere, Ada) or 0.
    """
    device = _abstract_gpu()
    if device is None:
        return oldest_capability()
    name = device.device_kind.removeprefix("NVIDIA ")
    return 9.0 if _after_ada(name) else 8.0 if name.startswith(("A", "L")) else 0.0


def _before_hopper() -> bool:
    """Return whether all GPUs are of compute capability 8: Ampere and Ada."""
    return bool(_capabilities()) and all(8.0 <= c < 9.0 for c in _capabilities())


@functools.cache
def _capabilities() -> tuple[float, ...]:
    """Return the compute capabilities of the local GPUs, 0 for those that are not NVIDIA's."""
    devices = [d for d in jax.local_devices() if d.platform in ("gpu", "cuda")]
    return tuple(map(_capability, devices))


def _capability(device: Any) -> float:
    try:
        return float(getattr(device, "compute_capability", None))
    except (TypeError, ValueError):  # not NVIDIA's
        return 0.0


@functools.cache
def _jax_triton_missing() -> str | None:
    install = "install it with: pip install 'fastvim-jax[triton]'"
    try:
        importlib.import_module("jax_triton")
    except ImportError as error:
        return f"jax-triton cannot be imported ({error}); {install}"
    version = importlib.metadata.version("jax-triton")
    # 0.4 renames `out_shape`, and its rule for dead code fails under JAX 0.12 ("takes 2 positional arguments").
    if not version.startswith("0.3."):
        return f"jax-triton {version} is not of the series 0.3; {install}"
    return None


@functools.cache
def log_once(message: str) -> None:
    """Log a warning once per process."""
    logger.warning(message)


def run_once(results: T) -> T:
    """Return kernels' results behind an optimization barrier, because XLA would otherwise run the kernels twice.

    Where `lax.scan` keeps a result for the gradient, XLA lets the kernel write into the stack of results, and runs it
    again for the other operations that read the result.
    """
    return jax.lax.optimization_barrier(results)

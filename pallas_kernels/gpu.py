"""Whether the Mosaic GPU kernels can run, found out without importing any of them."""

from __future__ import annotations

import functools
import logging
from typing import TypeVar

import jax

logger = logging.getLogger("pallas_kernels")

OLDEST_JAX = (0, 11, 1)
T = TypeVar("T")


def kernels_missing() -> str | None:
    """Why programs traced now cannot hold Mosaic GPU kernels; None if they can.

    They can on NVIDIA's data centre GPUs from Hopper on, compute capabilities 9 and 10.  On a machine without one,
    trace under `jax.sharding.use_abstract_mesh` with an abstract such device to lower for it.
    """
    if jax.__version_info__ < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        return f"JAX {jax.__version__} is older than {oldest}"
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None and device.platform in ("gpu", "cuda"):
        old = ("K", "M", "P", "V", "T", "A", "L", "RTX", "GeForce", "Quadro", "Tesla")
        name = device.device_kind.removeprefix("NVIDIA ")
        return f"the abstract device is an {device.device_kind}" if name.startswith(old) else None
    return _no_device()


def device_kind() -> str:
    """Of the device that programs traced now are for, such as "NVIDIA H100 80GB HBM3"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.device_kind if device is not None else jax.local_devices()[0].device_kind


@functools.cache
def _no_device() -> str | None:
    devices = [d for d in jax.local_devices() if d.platform in ("gpu", "cuda")]
    if not devices:
        return "there is no GPU"
    for device in devices:
        capability = getattr(device, "compute_capability", None)
        name = f"{device.device_kind} (compute capability {capability})"
        try:
            version = float(capability)
        except (TypeError, ValueError):  # not NVIDIA's
            version = 0.0
        if version < 9.0:
            return f"{name} is older than Hopper"
        if version >= 11.0:
            return f"{name} has less shared memory than the 227 KB that the kernels are cut for"
    return None


@functools.cache
def log_once(message: str) -> None:
    """Say something once per process."""
    logger.warning(message)


def run_once(results: T) -> T:
    """What kernels return on the way forward, behind a barrier.

    Where `lax.scan` keeps a result for the gradient, XLA would have the kernel write it into the stack, and run the
    kernel a second time for whoever else reads the result.
    """
    return jax.lax.optimization_barrier(results)

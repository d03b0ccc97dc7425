"""Make the mesh: all devices as `data × fsdp`. A batch is split over both axes, parameters over `fsdp` alone.

With N devices, data=N, fsdp=1 keeps all parameters, moments and averaged weights on every device; data=1, fsdp=N keeps
1/N of them on each. In between, each group of `fsdp` devices holds one copy. The mesh does not change a run's result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal, TypeVar, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, Sharding
from jax.sharding import PartitionSpec as P

from fastvim_jax.config_checks import PositiveInt, check_fields
from fastvim_jax.errors import UserError
from pallas_kernels.sharding import batch_over

DATA, FSDP = "data", "fsdp"

Reduction = Literal["computed", "float32", "bfloat16"]
Step = TypeVar("Step", bound=Callable[..., Any])


@dataclass(frozen=True)
class MeshConfig:
    """Say how the devices are used.

    Raises:
        UserError: on construction, for an impossible value; the message names the field.
    """

    data: PositiveInt | None = None
    """Groups of devices; each group holds all parameters and its share of the batch. None: use all devices."""
    fsdp: PositiveInt = 1
    """Devices per group; a group's parameters, optimizer state and averaged weights are spread over them (FSDP)."""
    reduction: Reduction = "computed"
    """Dtype in which the devices' gradients are summed. computed: each in its own; float32; bfloat16: half the bytes,
    rounded. The last two are for classification and masked pre-training with fsdp=1."""

    def __post_init__(self) -> None:
        check_fields(self, "mesh.")
        if self.reduction != "computed" and self.fsdp > 1:
            raise UserError(
                f"mesh.reduction={self.reduction!r} sums whole gradients, but mesh.fsdp={self.fsdp} spreads them over "
                "devices: set mesh.fsdp=1, or leave mesh.reduction out."
            )


def make_mesh(
    config: MeshConfig = MeshConfig(),
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Make the mesh over `devices`, by default all devices of all processes. A smaller mesh takes the first devices.

    Devices are sorted by process, so that each process holds a contiguous share of a batch.

    Raises:
        UserError: there are fewer devices than asked for, or some process would be left without one.
    """
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    data = config.data or len(devices) // config.fsdp
    wanted = data * config.fsdp
    sizes = f"mesh.data={config.data}, mesh.fsdp={config.fsdp}"
    if not 1 <= wanted <= len(devices):
        raise UserError(
            f"{sizes} needs {max(wanted, config.fsdp)} devices, but there are {len(devices)}: "
            "choose a mesh whose product is their number."
        )
    several = devices[-1].process_index > 0
    if wanted < len(devices) and (several or config.data is None):
        raise UserError(
            f"{sizes} would use {wanted} of {len(devices)} devices: choose a mesh whose product is their number."
        )
    grid = np.array(devices[:wanted]).reshape(data, config.fsdp)
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto))


def connect(place: Sharding) -> None:
    """Let all devices of a mesh over several processes meet once, while the processes are in step.

    On CPUs a group of devices connects at its first work together, and waits no longer than 30 s: a process that reads
    or compiles longer than the others would end the run. GPUs wait longer.

    Args:
        place: a sharding over the mesh.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu" or place.is_fully_addressable:
        return
    mesh: Mesh = place.mesh  # type: ignore[attr-defined]
    for axes in ((DATA, FSDP), (DATA,), (FSDP,)):
        together = partial(jax.lax.psum, axis_name=axes)
        on_each = jax.shard_map(together, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        jax.block_until_ready(jax.jit(on_each)(np.ones(1, np.float32)))


def describe_idle(config: MeshConfig) -> str | None:
    """Say how many devices a run with this mesh leaves idle; None if it uses all of them."""
    used = (config.data or 0) * config.fsdp
    if not used or used >= jax.device_count():
        return None
    return (
        f"mesh.data={config.data}, mesh.fsdp={config.fsdp} uses {used} of {jax.device_count()} devices, and the others "
        "do nothing: leave mesh.data out to use all."
    )


def on_mesh(mesh: Mesh, step: Step) -> Step:
    """Wrap a compiled `step` so that it is traced and run with `mesh` as the ambient mesh.

    The mesh is ambient only during the step: what one process computes alone cannot use a mesh of all processes.
    """

    @wraps(step)
    def run(*arguments: Any, **keywords: Any) -> Any:
        with jax.set_mesh(mesh), batch_over(DATA, FSDP):
            return step(*arguments, **keywords)

    return cast(Step, run)


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Refuse a batch that the devices cannot share evenly.

    Raises:
        UserError: naming the fields.
    """
    if batch_size % (mesh.size * accumulate):
        raise UserError(
            f"data.batch_size={batch_size} cannot be shared evenly by {mesh.size} devices in accumulate="
            f"{accumulate} parts: make it a multiple of {mesh.size * accumulate}, or change mesh or accumulate."
        )


def round_up(size: int, mesh: Mesh) -> int:
    """Round a batch size up to a multiple of the devices. Use it for evaluation, which does not count padding."""
    return -(-size // mesh.size) * mesh.size

"""The mesh: all devices as `data × fsdp`. A batch is split over both axes, parameters over `fsdp` alone.

data=N, fsdp=1 keeps everything on every device; data=1, fsdp=N keeps 1/N of the parameters, moments and average on
each; between the two, groups of fsdp devices hold one copy. The result of a run does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from fastvim_jax.config_checks import PositiveInt, check_fields
from fastvim_jax.errors import UserError
from pallas_kernels.sharding import batch_over

DATA, FSDP = "data", "fsdp"

Step = TypeVar("Step", bound=Callable[..., Any])


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are used.

    Raises:
        UserError: on construction, for an impossible value; the message names the field.
    """

    data: PositiveInt | None = None
    """Groups of devices, each of which holds all parameters and its share of the batch; None: as many as there are."""
    fsdp: PositiveInt = 1
    """Devices in a group, over which its parameters, optimizer state and average are spread (FSDP)."""

    def __post_init__(self) -> None:
        check_fields(self, "mesh.")


def make_mesh(
    config: MeshConfig = MeshConfig(),
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Make the mesh over `devices`, by default all of all processes; a smaller mesh takes the first.

    Devices are in the order of their processes, so that each process holds a contiguous share of a batch.

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


def on_mesh(mesh: Mesh, step: Step) -> Step:
    """Wrap a compiled `step` so that it is traced and run with `mesh` as the ambient mesh.

    Only for its time: computations of one process alone have no place on a mesh of all processes.
    """

    @wraps(step)
    def run(*arguments: Any) -> Any:
        with jax.set_mesh(mesh), batch_over(DATA, FSDP):
            return step(*arguments)

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
    """Round a batch size up to one that the devices can share evenly: for evaluation, whose padding is not counted."""
    return -(-size // mesh.size) * mesh.size

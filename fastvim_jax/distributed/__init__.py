"""Use many devices and processes: start processes, build the mesh, place arrays on it, and agree among processes."""

from fastvim_jax.distributed.mesh import (
    MeshConfig,
    Reduction,
    check_batch,
    describe_idle,
    make_mesh,
    on_mesh,
    round_up,
)
from fastvim_jax.distributed.processes import (
    all_gather_set,
    arrays_of_first_process,
    barrier,
    fail_at_once,
    is_first_process,
    lost_process,
    on_any_process,
    on_first_process,
    require_same,
    require_same_program,
)
from fastvim_jax.distributed.sharding import (
    gather,
    on_every_device,
    place_batch,
    place_whole,
    replicated,
    split_batch,
    state_shardings,
    with_auto_axes,
)
from fastvim_jax.distributed.start import Launch, detect, initialize_distributed
from fastvim_jax.distributed.watch import Watch, leave_watch, start_watch

__all__ = [
    "Launch",
    "MeshConfig",
    "Reduction",
    "Watch",
    "all_gather_set",
    "arrays_of_first_process",
    "barrier",
    "check_batch",
    "describe_idle",
    "detect",
    "fail_at_once",
    "gather",
    "initialize_distributed",
    "is_first_process",
    "leave_watch",
    "lost_process",
    "make_mesh",
    "on_any_process",
    "on_every_device",
    "on_first_process",
    "on_mesh",
    "place_batch",
    "place_whole",
    "replicated",
    "require_same",
    "require_same_program",
    "round_up",
    "split_batch",
    "start_watch",
    "state_shardings",
    "with_auto_axes",
]

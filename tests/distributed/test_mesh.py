"""The mesh and the rules of what lies where; on one device, so shapes and specs only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fastvim_jax.distributed import (
    MeshConfig,
    all_gather_set,
    check_batch,
    describe_idle,
    gather,
    make_mesh,
    place_batch,
    round_up,
    split_batch,
)
from fastvim_jax.distributed.sharding import parameter_spec
from fastvim_jax.errors import UserError
from tests.support import checked


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((192, 768), 4, P(None, "fsdp")),
        ((768, 192), 4, P("fsdp")),
        ((1536, 50), 8, P("fsdp")),
        ((16, 16, 3, 192), 8, P(None, None, None, "fsdp")),
        ((10, 9998), 4, P()),  # nothing divides evenly
        ((9998, 12), 4, P(None, "fsdp")),
        ((384,), 4, P()),  # too small to spread
        ((192, 768), 1, P()),
        ((), 4, P()),
    ],
)
def test_the_largest_axis_that_divides_evenly_is_split(shape, fsdp, spec):
    assert parameter_spec(shape, fsdp) == spec


def test_the_mesh_of_one_device():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == ("data", "fsdp") and mesh.size == 1
    assert (round_up(100, mesh), check_batch(mesh, 6, 3)) == (100, None)
    batch = place_batch(mesh, {"image": np.ones((4, 2, 2, 1), np.uint8), "label": np.arange(4)})
    assert isinstance(batch["image"], jax.Array) and batch["label"].shape == (4,)


def test_too_large_a_mesh_is_refused():
    with pytest.raises(
        UserError, match=r"mesh.data=None, mesh.fsdp=3 needs 3 devices.*there are 1"
    ):
        make_mesh(MeshConfig(fsdp=3), jax.devices()[:1])
    with pytest.raises(UserError, match=r"mesh.data=2, mesh.fsdp=1 needs 2 devices"):
        make_mesh(MeshConfig(data=2), jax.devices()[:1])


def test_a_small_mesh_says_what_it_leaves_idle(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    idle = describe_idle(MeshConfig(data=2))
    assert idle is not None and "mesh.data=2, mesh.fsdp=1 uses 2 of 4 devices" in idle
    for whole in (MeshConfig(), MeshConfig(data=4), MeshConfig(data=2, fsdp=2), MeshConfig(fsdp=4)):
        assert describe_idle(whole) is None


def test_an_uneven_batch_is_refused_by_its_fields():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(UserError, match=r"data.batch_size=128.*accumulate=3.*multiple of 3"):
        check_batch(mesh, 128, 3)


@pytest.mark.parametrize("change", [{"data": 0}, {"fsdp": -1}, {"fsdp": None}, {"fsdp": True}])
def test_impossible_meshes_are_refused_by_field(change):
    (name,) = change
    with pytest.raises(UserError, match=f"mesh.{name}=.*must be"):
        checked(MeshConfig(), **change)


def test_without_a_mesh_nothing_is_placed():
    x = jnp.ones((8, 4))
    assert gather(x) is x and split_batch(x) is x
    assert all_gather_set([3, 1, 3]) == {1, 3} and all_gather_set([]) == set()

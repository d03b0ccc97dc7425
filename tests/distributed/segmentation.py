"""Run as a program: a step of UPerHead, or a whole segmentation run, on one and on two devices.

python tests/distributed/segmentation.py head OUT.npz
python tests/distributed/segmentation.py run FOLDER
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.distributed import MeshConfig, make_mesh, on_mesh, place_batch, split_batch
from fastvim_jax.models.segmentation.heads import UPerHead
from fastvim_jax.precision import Precision
from fastvim_jax.training import train
from fastvim_jax.training.segmentation.losses import pixel_loss
from tests.training.segmentation.tiny import draw_scenes, tiny_config


def head_step(devices: int) -> dict[str, np.ndarray]:
    """Return loss, gradients and running statistics of one step in float64 on a mesh of this many devices."""
    mesh = make_mesh(MeshConfig(data=devices))
    rng = np.random.default_rng(5)
    batch = {
        "maps": rng.normal(size=(4, 6, 6, 8)) * np.arange(1, 5)[:, None, None, None],
        "label": rng.integers(0, 3, (4, 12, 12)).astype(np.int32),
    }
    head = UPerHead(
        (8,) * 4, features=8, classes=3, pool_scales=(1, 2), precision=Precision("float64", "float64"),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    graphdef, params, statistics = nnx.split(head, nnx.Param, nnx.BatchStat)

    def loss_of(params, statistics, batch):
        head = nnx.merge(graphdef, params, jax.tree.map(jnp.copy, statistics))
        logits = head([batch["maps"]] * 4, train=True)
        return pixel_loss(logits, batch["label"]), nnx.state(head, nnx.BatchStat)

    def step(params, statistics, batch):
        return jax.value_and_grad(loss_of, has_aux=True)(params, statistics, split_batch(batch))

    placed = place_batch(mesh, batch)
    assert len(placed["maps"].sharding.device_set) == devices
    result = on_mesh(mesh, jax.jit(step))(params, statistics, placed)
    leaves = jax.tree_util.tree_leaves_with_path(result)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def whole_runs(folder: Path) -> None:
    """Train the tiny run on a mesh of one device and on one of two."""
    draw_scenes(folder / "scenes", np.random.default_rng(0))
    for devices in (1, 2):
        config = tiny_config(folder / "scenes", epochs=1)
        wide = dataclasses.replace(config.model.backbone, dtype="float64", param_dtype="float64")
        config = dataclasses.replace(
            config,
            mesh=MeshConfig(data=devices),
            model=dataclasses.replace(config.model, backbone=wide),
        )
        train(config, folder / f"run{devices}", progress=False)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if sys.argv[1] == "head":
        one, two = head_step(1), head_step(2)
        np.savez(
            sys.argv[2], **{f"{n}:{k}": v for n, x in ((1, one), (2, two)) for k, v in x.items()}
        )
    else:
        whole_runs(Path(sys.argv[2]))

"""Run as a program: the losses of the first steps on different meshes, processes and in different numbers of parts.

    python tests/distributed/curves.py OUT.json NAME ...

A name says dtype, data × fsdp, parts, blocks' mode and recomputation: `float64-2x4-accumulate2`, `float32-1x8-remat`.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from fastvim_jax.data import ClassificationData
from fastvim_jax.data.device_transforms import make_augment
from fastvim_jax.distributed import (
    MeshConfig,
    initialize_distributed,
    make_mesh,
    on_mesh,
    place_batch,
    sharding,
)
from fastvim_jax.models import VisionMambaConfig, ViTConfig, build_model
from fastvim_jax.training import OptimizerConfig
from fastvim_jax.training.classification.train import make_draw, make_loss
from fastvim_jax.training.optimizer import learning_rate_schedule, make_optimizer
from fastvim_jax.training.reduction import runs_by_device
from fastvim_jax.training.steps import build_state, init_state, make_train_step, state_shapes

STEPS, BATCH, CLASSES = 10, 32, 16
DATA = ClassificationData(
    image_size=16, batch_size=BATCH, mixup=0.8, cutmix=1.0, random_erasing=0.25, crop="resize"
)
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3, learning_rate_scaling="none", warmup_epochs=0.2, clip_grad_norm=1.0
)
sharding.SMALLEST = 64  # So that nearly everything of a tiny model is spread.


def model_of(parts: list[str]) -> VisionMambaConfig | ViTConfig:
    common = {
        "image_size": 16,
        "patch_size": 4,
        "num_classes": CLASSES,
        "embed_dim": 16,
        "depth": 2,
        "drop_path": 0.4,
        "dtype": parts[0],
        "param_dtype": parts[0],
        "blocks": "unroll" if "unroll" in parts else "scan",
        "remat": "block" if "remat" in parts else "none",
    }
    if "vit" in parts:
        return ViTConfig(num_heads=2, **common)
    return VisionMambaConfig(state_size=8, **common)


def batches(step: int) -> dict[str, np.ndarray]:
    """Return this process's share of a global batch that depends on the step alone."""
    label = np.random.default_rng(step).integers(0, CLASSES, BATCH).astype(np.int32)
    classes = np.random.default_rng(99).integers(0, 256, (CLASSES, 16, 16, 3), np.uint8)
    batch = {"image": classes[label], "label": label}
    share = BATCH // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    return {key: value[mine] for key, value in batch.items()}


def largest_gather(program: str) -> int:
    """Count the entries of the largest array in double precision that a compiled program gathers."""
    shapes = re.findall(r"= f64\[([\d,]*)\]\S* all-gather\(", program)
    return max((math.prod(map(int, shape.split(","))) for shape in shapes), default=0)


def curve(name: str) -> tuple[list[float], float, int]:
    """Return losses, the share of the state that the first device holds, and the largest gather of a step."""
    parts = name.split("-")
    data, fsdp = map(int, parts[1].split("x"))
    accumulate = next((int(p.removeprefix("accumulate")) for p in parts if "acc" in p), 1)
    config = model_of(parts)
    devices = MeshConfig(data=data, fsdp=fsdp)
    mesh = make_mesh(devices)

    def build() -> nnx.Module:
        return build_model(config, rngs=nnx.Rngs(0))

    graphdef, params = nnx.split(nnx.eval_shape(build))
    rate = learning_rate_schedule(OPTIMIZER, batch_size=BATCH, steps_per_epoch=STEPS, epochs=1)
    optimizer = make_optimizer(OPTIMIZER, params, learning_rate=rate, total_steps=STEPS)

    def begin():
        return init_state(nnx.state(build()), optimizer)

    shapes = state_shapes(mesh, begin)
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    state = build_state(begin, shapes)
    step = make_train_step(
        make_loss(graphdef),
        optimizer,
        draw=make_draw(graphdef),
        ema_decay=0.9,
        augment=make_augment(DATA, CLASSES, label_smoothing=0.1),
        accumulate=accumulate,
        shardings=places,
        by_device=runs_by_device(config, devices, averages_images=True),
    )
    step = jax.jit(step, out_shardings=(places, None))
    lower = on_mesh(mesh, lambda *given: step.lower(*given))
    compiled = lower(state, place_batch(mesh, batches(0))).compile()
    losses = []
    for i in range(STEPS):
        state, metrics = compiled(state, place_batch(mesh, batches(i)))
        losses.append(metrics["loss"])
    leaves = jax.tree.leaves(state)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    share = held / sum(leaf.nbytes for leaf in leaves)
    return [float(loss) for loss in losses], share, largest_gather(compiled.as_text())


def main(out: str, *names: str) -> None:
    jax.config.update("jax_enable_x64", any(name.startswith("float64") for name in names))
    initialize_distributed()
    results = {name: curve(name) for name in names}
    if jax.process_index() == 0:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Count what devices send each other in a train step: the collectives of the compiled program, with their bytes.

The step is compiled for any number of simulated devices and never run, so a laptop shows what 64 GPUs would send.
A collective's bytes are the size of its result on one device. A collective inside a loop counts once per iteration.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from fastvim_jax.data.labelled import make_augment
from fastvim_jax.distributed import make_mesh, on_mesh
from fastvim_jax.distributed.sharding import BATCH
from fastvim_jax.models import build_model
from fastvim_jax.training import TrainConfig
from fastvim_jax.training.classification.train import make_draw, make_loss
from fastvim_jax.training.optimizer import learning_rate_schedule, make_optimizer
from fastvim_jax.training.steps import init_state, make_train_step, state_shapes

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind in a step.

    Attributes:
        count: number of collectives that run.
        bytes: sum of their results' sizes on one device.
    """

    count: int
    bytes: int


def compile_step(config: TrainConfig, classes: int) -> tuple[Any, Mesh]:
    """Compile the train step of a supervised run, augmentation included, for the mesh of `config`."""
    mesh = make_mesh(config.mesh)

    def build() -> nnx.Module:
        return build_model(config.model, rngs=nnx.Rngs(0))

    graphdef, params = nnx.split(nnx.eval_shape(build))
    rate = learning_rate_schedule(
        config.optimizer,
        batch_size=config.data.batch_size,
        steps_per_epoch=100,
        epochs=config.epochs,
    )
    total = 100 * config.epochs
    optimizer = make_optimizer(config.optimizer, params, learning_rate=rate, total_steps=total)

    def begin() -> Any:
        return init_state(nnx.state(build()), optimizer, ema=config.ema_decay is not None)

    shapes = state_shapes(mesh, begin)
    step: Any = make_train_step(
        make_loss(graphdef, label_smoothing=config.label_smoothing),
        optimizer,
        draw=make_draw(graphdef),
        augment=make_augment(config.data, classes, label_smoothing=config.label_smoothing),
        ema_decay=config.ema_decay,
        accumulate=config.accumulate,
        shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
        by_device=config.runs_by_device,
    )
    size, split = config.data.batch_size, NamedSharding(mesh, BATCH)
    batch = {
        "image": jax.ShapeDtypeStruct(
            (size, *config.data.height_width, config.data.channels), jnp.uint8, sharding=split
        ),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split),
    }
    lower = on_mesh(mesh, lambda *given: jax.jit(step, donate_argnums=0).lower(*given))
    return lower(shapes, batch).compile(), mesh


def traffic(program: str) -> dict[str, Traffic]:
    """Count the collectives in the text of a compiled program (`compiled.as_text()`), by kind."""
    bodies, entry = _computations(program)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            found = _COLLECTIVE.search(line)
            if found:
                counts[found[2]] += times
                sizes[found[2]] += times * _size(found[1])
            trips = _TRIPS.search(line)
            for called in _CALLED.findall(line):
                visit(called, times * (int(trips[1]) if trips and " while(" in line else 1))

    visit(entry, 1)
    return {kind: Traffic(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Split a program into the lines of its computations by name, and name its entry."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in program.splitlines():
        begun = _COMPUTATION.match(line)
        if begun and not line.startswith("HloModule"):
            name = begun[2]
            bodies[name] = []
            entry = name if begun[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _size(shape: str) -> int:
    """Return the bytes of a shape such as `(f32[2,3]{1,0}, bf16[4])`."""
    return sum(
        _BYTES.get(kind, 4) * math.prod(map(int, filter(None, sizes.split(","))))
        for kind, sizes in _ARRAY.findall(shape)
    )

"""Measure masked pre-training: training steps of FastMaskVim, Vim and ViT, and the cost of the masked encoder.

    python benchmarks/masked_speed.py --json benchmarks/results/CARD/family/masked_speed.json
    python benchmarks/peers/mae_vit.py --json ...    the same step in PyTorch, in the same session on the same GPU

- `step`: forward, backward and AdamW of a batch that is on the device.
- `encoder`: forward pass of the encoder under a mask; `unmasked` is the time of the same backbone over all patches.

All in bf16 at 224 px, mask ratio 0.75, with random weights. If several such programs share $FASTVIM_BENCH_LOCK, they
compile side by side and are timed in turn.

Required: FastMaskVim's step is faster than Vim's; its images per second are at least 0.9 x those of the compiled
PyTorch ViT-B (aim: 1.2 x); the masked encoder takes at most 0.4 x the time of the unmasked one.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastvim_jax.bench.record import show
from fastvim_jax.data import ClassificationData
from fastvim_jax.models import build_model, model_config
from fastvim_jax.models.parameters import round_products
from fastvim_jax.training.masked.config import PRETRAINING, PretrainConfig
from fastvim_jax.training.masked.pretrain import make_draw, make_loss
from fastvim_jax.training.optimizer import make_optimizer
from fastvim_jax.training.steps import init_state, make_train_step
from pallas_kernels import timing

MODELS = ("mae_fastvim_base_patch16_224", "mae_vim_base_patch16_224", "mae_vit_base_patch16_224")


def config_of(name: str, **options: Any) -> Any:
    """Return the model's config in bfloat16 with activations "compute" and blocks unrolled."""
    return model_config(name, dtype="bfloat16", activations="compute", blocks="unroll", **options)


def measure(one: Any) -> dict[str, float]:
    """Time a step by wall-clock time and, on a GPU, by the profiler."""
    gpu = jax.default_backend() == "gpu"
    if gpu:
        median, fastest, slowest, _ = timing.steady_clock(one)
    else:
        median, fastest, slowest = timing.clock(one, steps=2, repeats=2)
    found = {"ms": median, "fastest_ms": fastest, "slowest_ms": slowest}
    if gpu:
        device = timing.profile(one, 5)
        found |= {"device_ms": device.median, "kernels": device.kernels}
    return found


def draw_images(model: Any, batch: int) -> jax.Array:
    """Draw a batch of images of the model's size, float32 `b h w c`."""
    height, width = (g * p for g, p in zip(model.grid, model.patch, strict=True))
    return jax.random.normal(jax.random.key(1), (batch, height, width, model.channels))


def step_case(name: str, batch: int, **options: Any) -> timing.Case:
    """Compile the pre-training step, then measure it."""
    model = config_of(name, **options)
    config = PretrainConfig(
        model=model, data=ClassificationData(image_size=model.image_size, batch_size=batch)
    )
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build_model(model, rngs=nnx.Rngs(0))))

    def initial() -> tuple[Any, Any]:
        params = nnx.state(build_model(model, rngs=nnx.Rngs(0)))
        return init_state(params, optimizer, ema=False), {"image": draw_images(model, batch)}

    params = jax.eval_shape(lambda: nnx.state(build_model(model, rngs=nnx.Rngs(0))))
    optimizer = make_optimizer(PRETRAINING, params, learning_rate=lambda step: 1e-4, total_steps=1)
    step = make_train_step(make_loss(graphdef, config), optimizer, draw=make_draw(graphdef))
    program = timing.Program(partial(step, norms=False), *jax.eval_shape(initial), donate=(0,))
    yield None
    state, images = jax.jit(initial)()
    losses = []

    def one(_: int) -> jax.Array:
        nonlocal state
        state, metrics = program(state, images)
        losses.append(metrics["loss"])
        return metrics["loss"]

    found = measure(one)
    first, last = float(losses[0]), float(losses[-1])
    yield {
        **found, "images_per_s": 1e3 * batch / found["ms"], "first_loss": first, "last_loss": last,
        "correct": bool(all(map(jnp.isfinite, losses)) and last < first), **program.costs(),
    }  # fmt: skip


def encoder_case(name: str, batch: int, **options: Any) -> timing.Case:
    """Compile the encoder's forward pass under a mask and without one, then measure both."""
    model = config_of(name, **options)
    graphs = [
        nnx.graphdef(nnx.eval_shape(lambda c=config: build_model(c, rngs=nnx.Rngs(0))))
        for config in (model, model.encoder)
    ]

    def initial() -> tuple[Any, ...]:
        masked = build_model(model, rngs=nnx.Rngs(0))
        noise = masked.draw_noise(jax.random.key(2), batch)
        whole = build_model(model.encoder, rngs=nnx.Rngs(0))
        # Round the weights of products once, as `fastvim bench model` does, and not at every call.
        params = (
            round_products(nnx.state(each), model.precision.compute) for each in (masked, whole)
        )
        return *params, draw_images(model, batch), noise

    def encode(params: Any, images: jax.Array, noise: jax.Array) -> jax.Array:
        # XLA leaves the decoder out, because its result is not used.
        return nnx.merge(graphs[0], params)(images, noise=noise).latent

    def all_patches(params: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graphs[1], params).features(images)

    masked, whole, images, noise = jax.eval_shape(initial)
    programs = (
        timing.Program(encode, masked, images, noise),
        timing.Program(all_patches, whole, images),
    )
    yield None
    masked, whole, images, noise = jax.jit(initial)()
    found = measure(lambda _: programs[0](masked, images, noise))
    other = measure(lambda _: programs[1](whole, images))
    time = "device_ms" if "device_ms" in found else "ms"
    yield {
        **found, "images_per_s": 1e3 * batch / found["ms"], "unmasked": other,
        "ratio": found[time] / other[time],
    }  # fmt: skip


CASES = {"step": step_case, "encoder": encoder_case}


def main() -> None:
    """Measure all rows, print them and write them to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rows", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--depth", type=int, help="fewer blocks, for a trial")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    options = {} if chosen.depth is None else {"depth": chosen.depth}
    cases = [
        (
            {"row": row, "model": name, "batch": chosen.batch},
            CASES[row](name, chosen.batch, **options),
        )
        for name in chosen.models
        for row in chosen.rows
    ]
    number = lambda key, digits: lambda row: f"{row[key]:.{digits}f}" if key in row else ""  # noqa: E731
    columns: Any = (
        ("row", 8, lambda row: row["row"]),
        ("model", 30, lambda row: row["model"]),
        ("batch", 6, lambda row: str(row["batch"])),
        ("images/s", 9, number("images_per_s", 0)),
        ("ms", 9, number("ms", 2)),
        ("device ms", 9, number("device_ms", 2)),
        ("masked/unmasked", 15, number("ratio", 3)),
        ("", 0, lambda row: row.get("failed", "")),
    )
    show("masked_speed", timing.run(cases), columns, command=" ".join(sys.argv), file=chosen.json)


if __name__ == "__main__":
    main()

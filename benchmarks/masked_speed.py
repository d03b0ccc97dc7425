"""Measures masked pre-training: steps of FastMaskVim, Vim and ViT, and what the masked encoder costs.

    python benchmarks/masked_speed.py --json benchmarks/results/h100/masked_speed.json
    python benchmarks/peers/mae_vit.py --json ...    the same step in PyTorch, in the same session on the same GPU

Rows: `step`, forward, backward and AdamW of a batch on the device; `encoder`, the forward pass of the encoder under a
mask, and of the same backbone over all patches. bf16, mask ratio 0.75, 224 px, random weights.

Required: FastMaskVim's step ahead of Vim's; images a second at least 0.9 x those of the compiled PyTorch ViT-B (aim
1.2); the masked encoder at most 0.4 x the time of the unmasked one.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastvim_jax.data import ClassificationData
from fastvim_jax.models import build_model, model_config
from fastvim_jax.training.masked.config import PRETRAINING, PretrainConfig
from fastvim_jax.training.masked.pretrain import make_draw, make_loss
from fastvim_jax.training.optimizer import make_optimizer
from fastvim_jax.training.steps import init_state, make_train_step
from pallas_kernels import timing

MODELS = ("mae_fastvim_base_patch16_224", "mae_vim_base_patch16_224", "mae_vit_base_patch16_224")


def config_of(name: str, **options: Any) -> Any:
    """Return the model's config in bfloat16, unrolled."""
    narrow = {} if "_vit_" in name else {"activations": "compute"}
    return model_config(name, dtype="bfloat16", blocks="unroll", **narrow, **options)


def measure(one: Any) -> dict[str, float]:
    """Time a step by the clock and, on a GPU, by the profiler."""
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


def step_row(name: str, batch: int, **options: Any) -> dict[str, Any]:
    """Measure the pre-training step."""
    model = config_of(name, **options)
    config = PretrainConfig(
        model=model, data=ClassificationData(image_size=model.image_size, batch_size=batch)
    )
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build_model(model, rngs=nnx.Rngs(0))))
    params = jax.jit(lambda: nnx.state(build_model(model, rngs=nnx.Rngs(0))))()
    optimizer = make_optimizer(PRETRAINING, params, learning_rate=lambda step: 1e-4, total_steps=1)
    step = make_train_step(make_loss(graphdef, config), optimizer, draw=make_draw(graphdef))
    state = init_state(params, optimizer, ema=False)
    height, width = (g * p for g, p in zip(model.grid, model.patch, strict=True))
    images = {"image": jax.random.normal(jax.random.key(1), (batch, height, width, model.channels))}
    losses = []

    def one(i: int) -> jax.Array:
        nonlocal state
        state, metrics = step(state, images)
        losses.append(metrics["loss"])
        return metrics["loss"]

    found = measure(one)
    losses_seen = [float(losses[0]), float(losses[-1])]
    return {
        "row": "step", "model": name, "batch": batch, **found,
        "images_per_s": 1e3 * batch / found["ms"], "first_loss": losses_seen[0], "last_loss": losses_seen[1],
        "correct": all(map(jnp.isfinite, losses)) and losses_seen[1] < losses_seen[0],
    }  # fmt: skip


def encoder_rows(name: str, batch: int, **options: Any) -> list[dict[str, Any]]:
    """Measure the encoder's forward pass under a mask, and without one."""
    model = config_of(name, **options)
    masked = build_model(model, rngs=nnx.Rngs(0))
    whole = build_model(model.encoder, rngs=nnx.Rngs(0))
    height, width = (g * p for g, p in zip(model.grid, model.patch, strict=True))
    images = jax.random.normal(jax.random.key(1), (batch, height, width, model.channels))
    noise = masked.draw_noise(jax.random.key(2), batch)
    masked_graph, masked_params = nnx.split(masked)
    whole_graph, whole_params = nnx.split(whole)

    @jax.jit
    def encode(params: Any, images: jax.Array, noise: jax.Array) -> jax.Array:
        # What decodes is not read, and XLA leaves it out.
        return nnx.merge(masked_graph, params)(images, noise=noise).latent

    @jax.jit
    def all_patches(params: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(whole_graph, params).features(images)

    runs = {
        "masked": partial(encode, masked_params, images, noise),
        "unmasked": partial(all_patches, whole_params, images),
    }
    found = {kind: measure(lambda i, run=run: run()) for kind, run in runs.items()}
    time = "device_ms" if "device_ms" in found["masked"] else "ms"
    ratio = found["masked"][time] / found["unmasked"][time]
    return [
        {"row": f"encoder {kind}", "model": name, "batch": batch, **each, "ratio": ratio}
        for kind, each in found.items()
    ]


def main() -> None:
    """Measure all rows, print them and keep them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--depth", type=int, help="fewer blocks, for a trial")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    options = {} if chosen.depth is None else {"depth": chosen.depth}
    rows = []
    for name in chosen.models:
        for found in (
            [step_row(name, chosen.batch, **options)],
            encoder_rows(name, chosen.batch, **options),
        ):
            for row in found:
                rows.append(row)
                shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
                print(json.dumps({k: v for k, v in shown.items() if k != "kernels"}), flush=True)
    device = jax.devices()[0].device_kind
    record = {"device": device, "jax": jax.__version__, "rows": rows}
    if chosen.json:
        chosen.json.write_text(json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()

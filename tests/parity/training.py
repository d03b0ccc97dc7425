"""Schedules and whole training steps against their fixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.interop import to_torch_names
from fastvim_jax.training.classification.train import make_loss
from fastvim_jax.training.optimizer import adamw, layer_decay_factor
from fastvim_jax.training.schedules import (
    Schedule,
    epoch_cosine,
    scaled_learning_rate,
    warmup_cosine,
)
from fastvim_jax.training.steps import init_state, make_train_step
from tests.parity.compare import Comparison
from tests.parity.golden import Golden
from tests.parity.models import load_model
from tests.support import x64

Spec = dict[str, Any]


def steps_per_epoch(spec: Spec) -> int:
    """Count whole global batches in one epoch, however the spec counts them."""
    if "dataset" in spec:
        return spec["dataset"] // spec["batch_size"] // spec["world"]
    return spec["train_batches"] // spec["world"]


def learning_rate(spec: Spec) -> tuple[Schedule, int]:
    """Return the schedule by step and the number of steps of supervised and cell recipes."""
    per_epoch = steps_per_epoch(spec)
    total = spec["scheduling_epochs"] * per_epoch
    peak = scaled_learning_rate(
        spec["lr"], spec["batch_size"] * spec["world"], spec["scaling_rule"]
    )
    schedule = warmup_cosine(
        peak=peak,
        total_steps=total,
        warmup_steps=spec["warmup_epochs"] * per_epoch,
        start=spec["warmup_initial_lr"],
        final=spec["min_lr"],
    )
    return schedule, total


def weight_decay(spec: Spec) -> tuple[Schedule, int]:
    """Return the cells' rising weight decay."""
    total = spec["scheduling_epochs"] * steps_per_epoch(spec)
    schedule = warmup_cosine(
        peak=spec["weight_decay"], final=spec["weight_decay_end"], total_steps=total
    )
    return schedule, total


def by_epoch(spec: Spec) -> tuple[Schedule, int]:
    """Return the schedule by batch and the number of batches of pretraining, finetuning and linear-probe recipes."""
    accumulation = spec.get("accum_iter", 1)
    batch = spec["batch_size"] * accumulation * spec["world"]
    schedule = epoch_cosine(
        peak=scaled_learning_rate(spec["blr"], batch, "linear"),
        epochs=spec["scheduling_epochs"],
        steps_per_epoch=spec["batches_per_epoch"],
        warmup_epochs=spec["warmup_epochs"],
        final=spec["min_lr"],
        accumulation=accumulation,
    )
    return schedule, spec["scheduling_epochs"] * spec["batches_per_epoch"]


KINDS: dict[str, Callable[[Spec], tuple[Schedule, int]]] = {
    "supervised": learning_rate,
    "cell_lr": learning_rate,
    "cell_wd": weight_decay,
    "pretrain": by_epoch,
    "finetune": by_epoch,
    "linear": by_epoch,
}


def compare_schedules(golden: Golden) -> Comparison:
    """Compare every output array by its own spec, at the steps that go with it, in NumPy's float64."""
    comparison = Comparison(golden.name, golden.kind, "float64")
    specs = golden.meta["specs"]
    values = {name: scheduled(name, golden) for name in specs}
    for name, expected in golden.outputs.items():
        if name in values:
            comparison.output(name, values[name], expected)
        elif name.endswith("_by_group"):
            base = name.removesuffix("_by_group")
            scale = golden.outputs[f"{base}_group_scale"]
            comparison.output(name, values[base][:, None] * scale, expected)
        elif name.endswith("_group_scale"):
            compare_group_scales(
                comparison, name, specs[name.removesuffix("_group_scale")], expected
            )
        elif not name.endswith(("_steps", "_epoch_batch")):
            comparison.missing(f"a schedule for {name}")
    return comparison


def scheduled(name: str, golden: Golden) -> np.ndarray:
    """Return the values of one spec at all its steps, or at those the fixture lists."""
    specs = golden.meta["specs"]
    # A weight-decay spec may leave its length to the learning rate of the same run.
    spec = specs.get(name.replace("_wd_", "_lr_"), {}) | specs[name]
    kind = max((k for k in KINDS if name.startswith(k)), key=len)
    schedule, total = KINDS[kind](spec)
    for listed in (f"{name}_steps", f"{name.replace('_wd_', '_lr_')}_steps"):
        if listed in golden.outputs:
            return schedule(golden.outputs[listed])
    if f"{name}_epoch_batch" in golden.outputs:
        epoch, batch = golden.outputs[f"{name}_epoch_batch"].T
        return schedule(epoch * spec["batches_per_epoch"] + batch)
    return schedule(np.arange(total))


def compare_group_scales(
    comparison: Comparison, name: str, spec: Spec, expected: np.ndarray
) -> None:
    """Compare every group's factor is a layer's, and every layer has its group."""
    depth, decay = spec["depth"], spec["layer_decay"]
    ours = {layer_decay_factor(layer, depth, decay) for layer in range(depth + 2)}
    comparison.output(name, sorted(ours), np.unique(expected))


def compare_train_steps(golden: Golden, blocks: str) -> Comparison:
    """Compare five optimizer steps through the compiled train step, in float64."""
    comparison = Comparison(golden.name, golden.kind, "float64", blocks)
    with x64():
        run_train_steps(comparison, golden, blocks)
    return comparison


def run_train_steps(comparison: Comparison, golden: Golden, blocks: str) -> None:
    """Return losses and gradient norms of every step, then the weights and their averages after the last."""
    recipe = golden.meta["optimizer"]
    if recipe["name"] != "AdamW":
        comparison.missing(f"the optimizer {recipe['name']}")
        return
    model = load_model(golden, "float64", blocks)
    graphdef, params = nnx.split(model)
    rates = jnp.asarray(recipe["lr"], jnp.float64)
    optimizer = adamw(
        params,
        learning_rate=lambda step: rates[step],
        weight_decay=recipe["weight_decay"],
        groups="supervised",
        beta1=recipe["betas"][0],
        beta2=recipe["betas"][1],
        eps=recipe["eps"],
    )
    step = make_train_step(make_loss(graphdef), optimizer, ema_decay=golden.meta["ema_decay"])
    state = init_state(params, optimizer)
    losses, norms = [], []
    for images, targets in zip(golden.inputs["x"], golden.inputs["targets"], strict=True):
        batch = {
            "image": jnp.asarray(images.transpose(0, 2, 3, 1), jnp.float64),
            "label": jnp.asarray(targets, jnp.float64),
        }
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    results = {"loss": np.array(losses), "grad_norm": np.array(norms)}
    for prefix, tree in (("final", state.params), ("ema", state.ema)):
        results |= {
            f"{prefix}/{k}": v for k, v in to_torch_names(model, jax.device_get(tree)).items()
        }
    for name, expected in golden.outputs.items():
        if name in results:
            comparison.output(name, results[name], expected)
        else:
            comparison.missing(f"output {name}")

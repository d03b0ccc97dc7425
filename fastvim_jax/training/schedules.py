"""Define the recipes' schedules of learning rate and weight decay, as pure functions of the step.

A schedule is called with an integer, a NumPy array (then everything is computed in float64) or a traced
JAX array (float32, inside the train step). Three families exist in the recipes:

- `warmup_cosine` counts whole steps: the supervised and the cell-imaging recipes;
- `warmup_linear` counts whole steps too: segmentation;
- `epoch_cosine` counts fractional epochs: masked pre-training, fine-tuning and the linear probe.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[Any], Any]
Number = int | float

_REFERENCE_BATCH = {"deit": 512, "linear": 256, "sqrt": 1024}


def scaled_learning_rate(base: Number, batch_size: int, rule: str) -> Number:
    """Compute the peak learning rate for an effective batch of `batch_size` images.

    `deit`: base · batch/512; `linear`: base · batch/256; `sqrt`: base · √(batch/1024); `none`: base.

    Raises:
        ValueError: on an unknown rule.
    """
    if rule == "none":
        return base
    if rule not in _REFERENCE_BATCH:
        raise ValueError(f"unknown learning-rate scaling rule {rule!r}: deit, linear, sqrt or none")
    ratio = batch_size / _REFERENCE_BATCH[rule]
    return base * (ratio**0.5 if rule == "sqrt" else ratio)


def warmup_cosine(
    *,
    peak: Number,
    total_steps: int,
    warmup_steps: int = 0,
    start: Number = 0.0,
    final: Number = 0.0,
) -> Schedule:
    """Warm up linearly from `start` to `peak`, both included; then follow half a cosine towards `final`.

    The warm-up's last step and the cosine's first both hold `peak`; the last step is one short of
    `final`, which is returned from `total_steps` on. `final` above `peak` rises (the cells' weight decay).

    Raises:
        ValueError: the warm-up leaves no step for the cosine.
    """
    _require(0 <= warmup_steps < total_steps, f"warm-up of {warmup_steps} in {total_steps} steps")
    cosine_steps = total_steps - warmup_steps

    def schedule(step: Any) -> Any:
        xp, step = _namespace(step)
        warm = start + (peak - start) * (step / max(warmup_steps - 1, 1))
        phase = xp.clip((step - warmup_steps) / cosine_steps, 0.0, 1.0)
        return xp.where(step < warmup_steps, warm, _half_cosine(xp, peak, final, phase))

    return schedule


def epoch_cosine(
    *,
    peak: Number,
    epochs: Number,
    steps_per_epoch: int,
    warmup_epochs: Number = 0.0,
    final: Number = 0.0,
    accumulation: int = 1,
) -> Schedule:
    """Warm up linearly from zero; then follow half a cosine to `final`, over the fractional epoch of each batch.

    With `accumulation` > 1 the value stays the same for this number of batches, counted anew in every epoch. The step
    is then the number of the batch, not of the optimizer's update.

    Raises:
        ValueError: the warm-up leaves nothing for the cosine.
    """
    _require(0 <= warmup_epochs < epochs, f"warm-up of {warmup_epochs} in {epochs} epochs")

    def schedule(step: Any) -> Any:
        xp, step = _namespace(step)
        batch = step % steps_per_epoch
        held = step - batch + (batch // accumulation) * accumulation
        epoch = held / steps_per_epoch
        warm = peak * epoch / (warmup_epochs or 1.0)
        phase = xp.clip((epoch - warmup_epochs) / (epochs - warmup_epochs), 0.0, 1.0)
        return xp.where(epoch < warmup_epochs, warm, _half_cosine(xp, peak, final, phase))

    return schedule


def warmup_linear(
    *, peak: Number, total_steps: int, warmup_steps: int = 0, start: Number = 0.0
) -> Schedule:
    """Warm up linearly from `start` to `peak`, both included; then fall linearly to exactly 0 at the last step.

    The warm-up's last step and the line's first both hold `peak` (segmentation: 1500 of 160,000 steps).

    Raises:
        ValueError: the warm-up leaves no step for the line.
    """
    _require(0 <= warmup_steps < total_steps, f"warm-up of {warmup_steps} in {total_steps} steps")

    def schedule(step: Any) -> Any:
        xp, step = _namespace(step)
        warm = start + (peak - start) * (step / max(warmup_steps - 1, 1))
        phase = xp.clip((step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1), 0.0, 1.0)
        return xp.where(step < warmup_steps, warm, peak * (1.0 - phase))

    return schedule


def warmup_step(
    *,
    peak: Number,
    total_steps: int,
    warmup_steps: int = 0,
    start: Number = 0.0,
    milestones: tuple[float, ...] = (),
) -> Schedule:
    """Warm up linearly from `start` to `peak`, both included; then hold `peak`, and divide by 10 at each milestone.

    Args:
        peak: rate after the warm-up.
        total_steps: number of steps of the run.
        warmup_steps: number of steps of the warm-up.
        start: rate of the first step.
        milestones: shares of the run (detection: 8/9 and 26/27 of 184,375 steps), rounded to steps.
    """
    places = [round(share * total_steps) for share in milestones]

    def schedule(step: Any) -> Any:
        xp, step = _namespace(step)
        warm = start + (peak - start) * (step / max(warmup_steps - 1, 1))
        rate = xp.where(step < warmup_steps, warm, peak)
        for place in places:
            rate = xp.where(step < place, rate, rate / 10)
        return rate

    return schedule


def constant(value: Number) -> Schedule:
    """Build the schedule with the same value at every step."""

    def schedule(step: Any) -> Any:
        xp, step = _namespace(step)
        return xp.full(step.shape, value)

    return schedule


def _half_cosine(xp: ModuleType, first: Number, last: Number, phase: Any) -> Any:
    return last + (first - last) * (1.0 + xp.cos(np.pi * phase)) / 2.0


def _namespace(step: Any) -> tuple[ModuleType, Any]:
    """Choose NumPy in float64 for numbers known on the host, and JAX for traced ones."""
    if isinstance(step, jax.Array):
        return jnp, step
    return np, np.asarray(step)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"{what} leaves nothing to decay over: shorten it or train longer")

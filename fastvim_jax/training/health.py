"""Watch a run: fetch its metrics in windows, and stop the run at the first value that is not finite.

Fetching after every step would leave the device idle while the host reads a number. Metrics therefore stay on the
device until they are logged or saved. Each is kept with its step, so the error still names the step at fault.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median
from typing import Any

import jax

from fastvim_jax.errors import UserError
from fastvim_jax.training.config import RunConfig
from fastvim_jax.training.steps import Metrics

_WATCHED = ("loss", "grad_norm", "update_norm")
_NOT_MEANT = ("step", "finite_input")
_IN_FLIGHT = 4


class NonFiniteError(UserError):
    """Training stopped at a loss, gradient or update that is NaN or infinite.

    Attributes:
        step: the update at fault, counted from 1.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Window:
    """Hold the metrics of the steps since the last line of the log.

    Args:
        config: the run's config, for the explanation of a failure.
        records: metrics of earlier steps of this window, if the run resumes from a checkpoint inside it.
    """

    def __init__(self, config: RunConfig, records: Iterable[dict[str, Any]] = ()) -> None:
        self._config = config
        self._fetched: list[dict[str, Any]] = list(records)
        self._waiting: list[tuple[int, Metrics]] = []
        self._recent: deque[dict[str, Any]] = deque(self._fetched, maxlen=50)
        self._norms: dict[str, Any] = {}

    def add(self, step: int, metrics: Metrics) -> None:
        """Add the metrics of update `step`, without waiting for this update to finish."""
        metrics = dict(metrics)
        self._norms = metrics.pop("norms", {})  # Those of earlier steps are not logged any more.
        self._waiting.append((step, metrics))
        if len(self._waiting) > _IN_FLIGHT:
            # Wait for a step `_IN_FLIGHT` behind: the device always has work queued, but batches do not pile up on it.
            jax.block_until_ready(self._waiting[-_IN_FLIGHT][1]["loss"])

    def fetch(self, last_checkpoint: Callable[[], str]) -> list[dict[str, Any]]:
        """Fetch and check the metrics still on the device, and return all records of the window as numbers.

        Raises:
            NonFiniteError: a loss or norm is not finite. The message names the first such step, the last good
                checkpoint (from `last_checkpoint`) and the likely cause.
        """
        steps = [step for step, _ in self._waiting]
        for step, metrics in zip(steps, jax.device_get([m for _, m in self._waiting]), strict=True):
            record = {"step": step, **{key: value.item() for key, value in metrics.items()}}
            if not all(math.isfinite(record[key]) for key in _WATCHED if key in record):
                raise NonFiniteError(
                    _message(record, list(self._recent), self._config, last_checkpoint()), step
                )
            self._fetched.append(record)
            self._recent.append(record)
        self._waiting.clear()
        return list(self._fetched)

    def summarise(self, last_checkpoint: Callable[[], str]) -> dict[str, float]:
        """Average the metrics of the last step over the steps that have them. Start a new window.

        On GPUs only some steps measure all norms. Raises what `fetch` raises.
        """
        records = self.fetch(last_checkpoint)
        self._fetched.clear()
        names = [key for key in records[-1] if key not in _NOT_MEANT]
        return {key: fmean(record[key] for record in records if key in record) for key in names}

    def norms(self, names: Sequence[str]) -> dict[str, float]:
        """Return the last step's norms of the parameters `names`, as `grad/NAME`, `param/NAME` and `update/NAME`."""
        return {
            f"{kind}/{name}": norm
            for kind, norms in jax.device_get(self._norms).items()
            for name, norm in zip(names, norms.tolist(), strict=True)
        }


def likely_cause(record: dict[str, Any], before: list[dict[str, Any]], config: RunConfig) -> str:
    """Explain what probably made `record` non-finite, judging by `record` and the steps `before` it."""
    if not record["finite_input"]:
        return (
            "the batch itself holds NaN or infinite pixels: check data.mean, data.std and the records. If the records "
            "hold integers, continue the run: if it stops at another step, or at none, the device computed wrongly"
        )
    if not before and not math.isfinite(record["loss"]):
        return (
            f"the first loss is already not finite: the model's numbers overflow in model.dtype="
            f"{config.compute_dtype}; try float32, or check weights that were loaded"
        )
    norms = [r["grad_norm"] for r in before]
    remedy = "lower optimizer.learning_rate, lengthen optimizer.warmup_epochs or set optimizer.clip_grad_norm"
    if len(norms) >= 2 and norms[-1] > 10 * median(norms[:-1]):
        return (
            f"gradients grew from a norm of {median(norms[:-1]):.3g} to {norms[-1]:.3g} just before, so the "
            f"learning rate is too high: {remedy}"
        )
    if math.isfinite(record["loss"]):
        what = "gradient" if not math.isfinite(record["grad_norm"]) else "update"
        other = ", or use model.dtype=float32" if config.compute_dtype == "bfloat16" else ""
        return f"the loss is finite but its {what} overflowed: {remedy}{other}"
    return f"the weights went astray, most often because the learning rate is too high: {remedy}"


def _message(
    record: dict[str, Any],
    before: list[dict[str, Any]],
    config: RunConfig,
    last_checkpoint: str,
) -> str:
    numbers = ", ".join(f"{key} {record[key]:.4g}" for key in _WATCHED if key in record)
    return (
        f"Training stopped at step {record['step']}: {numbers}. "
        f"Last good checkpoint: {last_checkpoint}. "
        f"Likely cause: {likely_cause(record, before, config)}."
    )

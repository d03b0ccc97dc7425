"""Define the head that a linear probe trains: batch norm without parameters, then a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float

from fastvim_jax.distributed import on_every_device
from fastvim_jax.layers.head import make_head
from fastvim_jax.precision import Precision
from fastvim_jax.training.label_rank import label_rank
from fastvim_jax.training.masked.config import ProbeConfig
from fastvim_jax.training.schedules import Schedule
from fastvim_jax.training.steps import Batch, Loss, LossOf, Metrics

EPS = 1e-6
MOMENTUM = 0.1


class ProbeHead(nnx.Module):
    """Batch norm without scale and shift, and a linear layer; float32 or wider."""

    def __init__(self, width: int, classes: int, *, precision: Precision, rngs: nnx.Rngs):
        self.mean = nnx.BatchStat(jnp.zeros(width, precision.wide))
        self.variance = nnx.BatchStat(jnp.ones(width, precision.wide))
        self.head = make_head(
            width, classes, kernel_init=normal(0.01), precision=precision, rngs=rngs
        )

    def __call__(
        self, features: Float[Array, "b d"], *, train: bool = False
    ) -> Float[Array, "b classes"]:
        """Classify features. With `train`, normalise by the batch and update the running statistics in place.

        As in PyTorch, the running variance takes in the unbiased variance of the batch.
        """
        x = features.astype(self.mean.dtype)
        mean, variance = self.mean[...], self.variance[...]
        if train:
            batch_mean, batch_variance = x.mean(axis=0), x.var(axis=0)
            unbiased = batch_variance * (len(x) / max(len(x) - 1, 1))
            self.mean[...] = mean + MOMENTUM * (batch_mean - mean)
            self.variance[...] = variance + MOMENTUM * (unbiased - variance)
            mean, variance = batch_mean, batch_variance
        return self.head((x - mean) / jnp.sqrt(variance + EPS))


def make_probe_optimizer(
    config: ProbeConfig, learning_rate: Schedule
) -> optax.GradientTransformation:
    """Return SGD with momentum, or LARS; biases are neither decayed nor adapted."""
    decay = config.optimizer.weight_decay
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    if config.algorithm == "lars":
        return optax.lars(
            learning_rate,
            weight_decay=decay,
            weight_decay_mask=matrices,
            trust_ratio_mask=matrices,
            momentum=config.momentum,
        )
    return optax.chain(
        optax.add_decayed_weights(decay, matrices),
        optax.trace(decay=config.momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def make_probe_loss(graphdef: nnx.GraphDef) -> LossOf:
    """Return the `loss_of` of `make_train_step`: cross entropy of batches of `feature` `b d` and `label` `b`."""

    def loss_of(params: Any, batch: Batch, drawn: None, model_state: Any) -> Loss:
        model = nnx.merge(graphdef, params, model_state)
        logits = model(batch["feature"], train=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return Loss(loss, model_state=nnx.state(model, nnx.BatchStat))

    return loss_of


def make_counts(graphdef: nnx.GraphDef) -> Callable[[Any, Any, Batch], Metrics]:
    """Compile `counts(params, model_state, batch)`: sums over valid features of `count`, `top1`, `top5`, `loss`."""

    @jax.jit
    def counts(params: Any, model_state: Any, batch: Batch) -> Metrics:
        logits = nnx.merge(graphdef, params, model_state)(batch["feature"])
        label, valid = batch["label"], batch["valid"]
        rank = label_rank(logits, label)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        found = {
            "count": valid.sum(dtype=jnp.int32),
            "top1": (valid & (rank < 1)).sum(dtype=jnp.int32),
            "top5": (valid & (rank < 5)).sum(dtype=jnp.int32),
            "loss": jnp.where(valid, loss, 0).sum(),
        }
        return on_every_device(found)

    return counts

"""Build AdamW with the recipes' weight-decay groups and layer-wise learning rates.

Every rule here is about the *unstacked* parameter, the one of a single block: a norm scale stored as
`depth d` is one-dimensional and is not decayed, and a layer-wise rate is a vector over the depth axis.

PyTorch's decoupled decay, `p ← p − lr·wd·p` before `p ← p − lr·m̂/(√v̂ + ε)`, is the same update as optax's
`p ← p − lr·(m̂/(√v̂ + ε) + wd·p)`; a group's rate scales both terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fastvim_jax.models.parameters import (
    STACK,
    ParameterInfo,
    map_parameters,
    named_parameters,
    parameter_infos,
)
from fastvim_jax.training.config import DecayGroups, LayerRule, OptimizerConfig
from fastvim_jax.training.schedules import (
    Schedule,
    constant,
    epoch_cosine,
    scaled_learning_rate,
    warmup_cosine,
    warmup_linear,
    warmup_step,
)

_INPUT_NAMES = ("pos_embed", "class_token")
_EMBEDDING = "patch_embed"
_SPARED = (*_INPUT_NAMES, "A_log", "D")


def is_decayed(name: str, ndim: int, groups: DecayGroups) -> bool:
    """Return whether a recipe decays the unstacked parameter `name` of rank `ndim`.

    `supervised` and `cell` spare one-dimensional parameters and biases (A_log, the position embedding and
    the class token are decayed); `finetune` spares one-dimensional parameters, the position embedding and
    the class token; `pretrain` spares nothing; `segmentation` spares, of the backbone, norms, A_log, D, position
    embedding and class token, and decays biases and the heads' batch norms; `detection` spares norms of blocks and
    the position embedding, `detection_released` the position embedding alone.
    """
    if groups == "pretrain":
        return True
    if groups == "segmentation":
        backbone, *parts = name.split(".")
        spared = any(part in _SPARED or "norm" in part for part in parts)
        return not (backbone == "backbone" and spared)
    if groups in ("detection", "detection_released"):
        parts = name.split(".")
        norm_of_block = STACK in parts and any("norm" in part for part in parts)
        return parts[-1] != "pos_embed" and not (groups == "detection" and norm_of_block)
    if groups == "finetune":
        return ndim > 1 and name.split(".")[-1] not in _INPUT_NAMES
    return ndim > 1 and not name.endswith(".bias")


_RELEASED_DEPTH = 12
"""Depth that the released detectors' rule was told, whatever the backbone's."""


def layer_decay_factor(layer: int, depth: int, decay: float, rule: LayerRule = "pairs") -> float:
    """Compute the learning-rate factor of a layer.

    One factor of `decay` for every two layers below the head ("pairs"), or for every layer ("blocks"). The rule of the
    released detectors looked for names that their backbone does not have: only the embeddings have a factor, that of
    depth 12 ("detection_released").

    `layer` is 0 for the embeddings, i + 1 for block i and depth + 1 for the final norm and the head.
    """
    if rule == "blocks":
        return decay ** (depth + 1 - layer)
    if rule == "detection_released":
        return decay ** (_RELEASED_DEPTH + 1) if layer == 0 else 1.0
    return decay ** -((layer - depth - 1) // 2)


def weight_decay_mask(params: Any, groups: DecayGroups) -> Any:
    """Build a tree like `params` of booleans: True where weight decay applies."""
    return map_parameters(lambda info, leaf: is_decayed(info.name, info.ndim, groups), params)


def learning_rate_scales(params: Any, decay: float, rule: LayerRule = "pairs") -> Any:
    """Return a tree like `params` of layer-wise factors: scalars, or vectors over the depth axis for stacked leaves.

    Each backbone in the model counts its own layers: a stack `blocks` with a `patch_embed` beside it, at the root or
    at any depth of the model. All that stands behind a backbone has factor 1: norms, heads, and stacks of blocks
    without an embedding of their own, such as a decoder.

    Args:
        params: the model's parameters.
        decay: the factor per layer or two, 0 < decay ≤ 1.
        rule: see `layer_decay_factor`.
    """
    depths = _backbone_depths(params)

    def scale(info: ParameterInfo, leaf: Any) -> np.ndarray:
        prefix = next((p for p in depths if info.name.startswith(p)), None)
        if prefix is None:  # no backbone around it
            return np.asarray(1.0, leaf.dtype)
        depth, local = depths[prefix], info.name.removeprefix(prefix).split(".")[0]
        if local == STACK:
            by_block = np.array(
                [layer_decay_factor(i + 1, depth, decay, rule) for i in range(depth)]
            )
            return by_block.reshape((depth,) + (1,) * info.ndim).astype(leaf.dtype)
        layer = 0 if local in (_EMBEDDING, *_INPUT_NAMES) else depth + 1
        return np.asarray(layer_decay_factor(layer, depth, decay, rule), leaf.dtype)

    return map_parameters(scale, params)


def _backbone_depths(params: Any) -> dict[str, int]:
    """Find the depth of every backbone by the prefix of its parameters' names (empty at the root), longest first."""
    infos = parameter_infos(params)
    names = [info.name for info in infos]
    depths = {
        info.stack.removesuffix(STACK): info.depth for info in infos if info.depth is not None
    }
    return {
        prefix: depths[prefix]
        for prefix in sorted(depths, key=len, reverse=True)
        if any(name.startswith(f"{prefix}{_EMBEDDING}.") for name in names)
    }


class ParameterGroup(NamedTuple):
    """How a recipe treats one unstacked parameter."""

    learning_rate_scale: float
    decayed: bool


def parameter_groups(
    params: Any,
    groups: DecayGroups,
    *,
    layer_decay: float | None = None,
    layer_rule: LayerRule = "pairs",
) -> dict[str, ParameterGroup]:
    """Return the group of every parameter by its unstacked name, e.g. `blocks.3.mixer.D`: for logs and tests."""
    ones = jax.tree.map(lambda p: np.ones(p.shape, np.float64), params)
    scales = learning_rate_scales(ones, 1.0 if layer_decay is None else layer_decay, layer_rule)
    mask = weight_decay_mask(ones, groups)
    scaled = named_parameters(jax.tree.map(np.multiply, ones, scales))
    decayed = named_parameters(jax.tree.map(lambda one, m: one * m, ones, mask))
    return {
        name: ParameterGroup(float(np.ravel(scale)[0]), bool(np.ravel(decayed[name])[0]))
        for name, scale in scaled.items()
    }


def learning_rate_schedule(
    config: OptimizerConfig, *, batch_size: int, steps_per_epoch: int, epochs: int
) -> Schedule:
    """Build the learning rate by optimizer step, its peak scaled to the effective batch."""
    peak = scaled_learning_rate(config.learning_rate, batch_size, config.learning_rate_scaling)
    if config.schedule == "constant":
        return constant(peak)
    if config.schedule == "warmup_linear":
        return warmup_linear(
            peak=peak,
            total_steps=epochs * steps_per_epoch,
            warmup_steps=round(config.warmup(epochs) * steps_per_epoch),
            start=config.warmup_start,
        )
    if config.schedule == "warmup_step":
        return warmup_step(
            peak=peak,
            total_steps=epochs * steps_per_epoch,
            warmup_steps=round(config.warmup(epochs) * steps_per_epoch),
            start=config.warmup_start,
            milestones=config.milestones,
        )
    if config.schedule == "epoch_cosine":
        return epoch_cosine(
            peak=peak,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            warmup_epochs=config.warmup(epochs),
            final=config.final_learning_rate,
        )
    return warmup_cosine(
        peak=peak,
        total_steps=epochs * steps_per_epoch,
        warmup_steps=round(config.warmup(epochs) * steps_per_epoch),
        start=config.warmup_start,
        final=config.final_learning_rate,
    )


def weight_decay_schedule(config: OptimizerConfig, *, total_steps: int) -> Schedule:
    """Build the weight decay by optimizer step: constant, or half a cosine to `weight_decay_end`."""
    if config.weight_decay_end is None:
        return constant(config.weight_decay)
    return warmup_cosine(
        peak=config.weight_decay, final=config.weight_decay_end, total_steps=total_steps
    )


def adamw(
    params: Any,
    *,
    learning_rate: Schedule,
    weight_decay: float | Schedule,
    groups: DecayGroups = "supervised",
    layer_decay: float | None = None,
    layer_rule: LayerRule = "pairs",
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    clip_grad_norm: float | None = None,
) -> optax.GradientTransformation:
    """Build AdamW, in the order clip → Adam → decay → layer-wise factors → learning rate.

    Args:
        params: the parameters to train; only their names and shapes are used.
        learning_rate: the schedule of the learning rate.
        weight_decay: decoupled decay, a number or a schedule.
        groups: recipe whose parameters are decayed.
        layer_decay: layer-wise factor, or None.
        layer_rule: layers to which it is applied; see `layer_decay_factor`.
        beta1, beta2, eps: Adam's; ε is added outside the square root.
        clip_grad_norm: largest global gradient norm, or None.
    """
    stages: list[optax.GradientTransformation] = []
    if clip_grad_norm is not None:
        stages.append(optax.clip_by_global_norm(clip_grad_norm))
    stages.append(optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps))
    stages.append(optax.add_decayed_weights(weight_decay, weight_decay_mask(params, groups)))
    if layer_decay is not None:
        stages.append(_scale_leaves(learning_rate_scales(params, layer_decay, layer_rule)))
    stages.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*stages)


def make_optimizer(
    config: OptimizerConfig,
    params: Any,
    *,
    learning_rate: Schedule,
    total_steps: int,
) -> optax.GradientTransformation:
    """Build the `adamw` that a run's config describes."""
    decay: float | Schedule = config.weight_decay
    if config.weight_decay_end is not None:
        decay = weight_decay_schedule(config, total_steps=total_steps)
    return adamw(
        params,
        learning_rate=learning_rate,
        weight_decay=decay,
        groups=config.decay_groups,
        layer_decay=config.layer_decay,
        layer_rule=config.layer_rule,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        clip_grad_norm=config.clip_grad_norm,
    )


def _scale_leaves(scales: Any) -> optax.GradientTransformation:
    update: Callable[..., Any] = lambda updates, _: jax.tree.map(  # noqa: E731
        lambda u, s: u * jnp.asarray(s, u.dtype), updates, scales
    )
    return optax.stateless(update)

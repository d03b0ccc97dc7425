"""Losses of the detectors: proposals, boxes and masks, and the training pass that joins them.

Sums are divided by counts over the whole batch, plus float32's epsilon as in the reference. The random choice of
anchors and boxes is handed in as numbers (`Draws`), so that a step is a function of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt8

from fastvim_jax.models.detection.boxes import encode_deltas
from fastvim_jax.models.detection.cascade import CascadeRCNN, deltas_of, refine
from fastvim_jax.models.detection.config import DetectorConfig, ProposalConfig, StageConfig
from fastvim_jax.models.detection.masks import mask_targets
from fastvim_jax.models.detection.matching import Sample, assign, sample
from fastvim_jax.models.detection.rpn import AnchorTargets, anchor_targets, propose

EPSILON = 1.1920929e-7


class Objects(NamedTuple):
    """Ground truth of a batch, padded to a common number of objects.

    Attributes:
        boxes: in pixels of the padded image.
        labels: classes from 0.
        present: marks the objects that are not padding.
        masks: bits along the width (`numpy.packbits`), or None without masks.
    """

    boxes: Float[Array, "b m 4"]
    labels: Int[Array, "b m"]
    present: Bool[Array, "b m"]
    masks: UInt8[Array, "b m h w8"] | None


class Draws(NamedTuple):
    """Random priorities for sampling: boxes with the lowest are drawn. One number as a positive, one as a negative."""

    anchors: Float[Array, "b 2 n"]
    boxes: Sequence[Float[Array, "b 2 _k"]]


class Sampled(NamedTuple):
    """The training sample of one stage: `k` boxes per image, positives first.

    Attributes:
        boxes: sampled boxes.
        labels: their classes; background is the number of classes.
        targets: box of the object of each positive.
        objects: index of the object of each positive.
        positive: marks positives.
        valid: marks used slots.
        is_object: marks the slots that hold ground truth itself.
    """

    boxes: Float[Array, "b k 4"]
    labels: Int[Array, "b k"]
    targets: Float[Array, "b k 4"]
    objects: Int[Array, "b k"]
    positive: Bool[Array, "b k"]
    valid: Bool[Array, "b k"]
    is_object: Bool[Array, "b k"]


def draw_priorities(
    key: jax.Array, config: DetectorConfig, batch: int, anchors: int, objects: int
) -> Draws:
    """Draw the random numbers of one step: of `batch` images with `anchors` anchors and room for `objects` objects."""
    anchor_key, *stage_keys = jax.random.split(key, len(config.stages) + 1)
    sizes = [objects + config.rpn.train_after] + [objects + config.samples] * (
        len(config.stages) - 1
    )
    return Draws(
        jax.random.uniform(anchor_key, (batch, 2, anchors)),
        [
            jax.random.uniform(stage_key, (batch, 2, size))
            for stage_key, size in zip(stage_keys, sizes, strict=True)
        ],
    )


def detection_loss(
    model: CascadeRCNN,
    images: Float[Array, "b h w c"],
    objects: Objects,
    draws: Draws,
    size: Float[Array, "b 2"] | None = None,
    **drawn: Any,
) -> dict[str, Float[Array, ""]]:
    """Return every weighted loss of one batch, by name: rpn_cls, rpn_box, and per stage s0_cls, s0_box, s0_mask, ...

    Args:
        model: The detector.
        images: Normalised, padded.
        objects: Ground truth.
        draws: From `draw_priorities`.
        size: Height and width of each image that boxes are clipped to and anchors must lie in; None: the padded size.
        **drawn: Goes to the backbone (`key` or `drop_path_keep`).
    """
    config, rpn = model.config, model.config.rpn
    padded = (images.shape[1], images.shape[2])
    if size is None:
        size = jnp.broadcast_to(jnp.asarray(padded, objects.boxes.dtype), (len(images), 2))
    levels = model.features(images, **drawn)

    # 1) Proposals
    anchors = model.anchors(levels, padded)
    scores, deltas = model.rpn(levels)
    targets = jax.vmap(partial(anchor_targets, anchors, config=rpn))(
        size, objects.boxes, objects.present, draws.anchors
    )
    losses = rpn_losses(jnp.concatenate(scores, 1), jnp.concatenate(deltas, 1), targets, rpn)
    proposals = propose(
        scores, deltas, anchors, size,
        before=rpn.train_before, after=rpn.train_after, threshold=rpn.nms,
    )  # fmt: skip

    # 2) Stages, each on the boxes that the one before has refined
    boxes, valid = proposals.boxes, proposals.valid
    for i, stage in enumerate(config.stages):
        sampled = sample_boxes(boxes, valid, objects, draws.boxes[i], stage, config)
        stage_losses, logits, offsets = losses_of_stage(model, i, levels, sampled, objects, padded)
        losses |= stage_losses
        if i < len(config.stages) - 1:
            boxes, valid = boxes_of_next_stage(sampled, logits, offsets, stage, size)
    return losses


def boxes_of_next_stage(
    sampled: Sampled,
    logits: Float[Array, "b k classes"],
    deltas: Float[Array, "b k sets 4"],
    stage: StageConfig,
    size: Float[Array, "b 2"],
) -> tuple[Float[Array, "b k 4"], Bool[Array, "b k"]]:
    """Refine a stage's boxes, and mark those that the next stage samples from: all but ground truth itself.

    A box that is moved out of the image has no area left and stays, as in the reference: the next stage takes it for
    background.
    """
    boxes = refine(sampled.boxes, logits, deltas, stage, size, sampled.labels)
    return boxes, sampled.valid & ~sampled.is_object


def rpn_losses(
    scores: Float[Array, "b n"],
    deltas: Float[Array, "b n 4"],
    targets: AnchorTargets,
    config: ProposalConfig,
) -> dict[str, Float[Array, ""]]:
    """Sum cross-entropy over sampled anchors and smooth L1 over positives, and divide by the number sampled.

    An image without positives, or without negatives, counts as if it had one, as in the reference.
    """
    negative = targets.sampled & ~targets.positive
    count = jnp.sum(sum(jnp.maximum(jnp.sum(x, -1), 1) for x in (targets.positive, negative)))
    count = count + EPSILON
    entropy = optax.sigmoid_binary_cross_entropy(scores, targets.positive.astype(scores.dtype))
    distance = smooth_l1(deltas - targets.deltas.astype(deltas.dtype), config.beta).sum(-1)
    return {
        "rpn_cls": jnp.sum(jnp.where(targets.sampled, entropy, 0)) / count,
        "rpn_box": jnp.sum(jnp.where(targets.positive, distance, 0)) / count,
    }


def sample_boxes(
    boxes: Float[Array, "b n 4"],
    valid: Bool[Array, "b n"],
    objects: Objects,
    priorities: Float[Array, "b 2 k"],
    stage: StageConfig,
    config: DetectorConfig,
) -> Sampled:
    """Assign boxes to objects, put the objects' own boxes before them, and sample."""

    def one(boxes, valid, truth, labels, present, priority) -> Sampled:
        matched = assign(
            boxes, valid, truth, present, positive=stage.overlap, negative=stage.overlap
        ).objects
        m = len(truth)
        object_numbers = jnp.where(present, jnp.arange(1, m + 1), -1).astype(matched.dtype)
        every = jnp.concatenate([truth, boxes])
        drawn: Sample = sample(
            jnp.concatenate([object_numbers, matched]),
            priority,
            count=config.samples,
            fraction=config.fraction,
        )
        label = labels[drawn.objects] if m else jnp.zeros_like(drawn.objects)
        target = truth[drawn.objects] if m else jnp.zeros_like(every[drawn.indices])
        chosen = jnp.where(drawn.valid[:, None], every[drawn.indices], 0)
        return Sampled(
            boxes=chosen,
            labels=jnp.where(drawn.positive, label, config.num_classes),
            targets=target,
            objects=drawn.objects,
            positive=drawn.positive,
            valid=drawn.valid,
            is_object=drawn.positive & (drawn.indices < m),
        )

    return jax.vmap(one)(boxes, valid, objects.boxes, objects.labels, objects.present, priorities)


def losses_of_stage(
    model: CascadeRCNN,
    index: int,
    levels: Sequence[Float[Array, "b _h _w d"]],
    sampled: Sampled,
    objects: Objects,
    padded: tuple[int, int],
) -> tuple[Mapping[str, Float[Array, ""]], Float[Array, "b k classes"], Float[Array, "b k sets 4"]]:
    """Return one stage's weighted losses, its class logits and its deltas."""
    config = model.config
    stage, settings = model.stages[index], config.stages[index]
    logits, deltas = model.box_scores(stage, levels, sampled.boxes)
    losses = box_losses(logits, deltas, sampled, settings, config.box_loss)
    if config.masks:
        losses["mask"] = mask_loss(model, index, levels, sampled, objects, padded[1])
    named = {f"s{index}_{name}": settings.weight * loss for name, loss in losses.items()}
    return named, logits, deltas


def box_losses(
    logits: Float[Array, "b k classes"],
    deltas: Float[Array, "b k sets 4"],
    sampled: Sampled,
    stage: StageConfig,
    kind: str,
) -> dict[str, Float[Array, ""]]:
    """Sum cross-entropy over boxes and L1 over positives' own deltas, and divide by the number of boxes."""
    count = jnp.sum(sampled.valid) + EPSILON
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, sampled.labels)
    class_deltas = deltas_of(deltas, jnp.minimum(sampled.labels, logits.shape[-1] - 2))
    mask = sampled.positive[..., None]
    # Unused slots have boxes without area, whose deltas would make gradients NaN even where they are masked out.
    unit = jnp.asarray([0, 0, 1, 1], deltas.dtype)
    base = jnp.where(mask, sampled.boxes, unit)
    wanted = encode_deltas(base, jnp.where(mask, sampled.targets, unit), stage.stds)
    error = class_deltas - wanted.astype(class_deltas.dtype)
    distance = jnp.abs(error) if kind == "l1" else smooth_l1(error, 1.0)
    return {
        "cls": jnp.sum(jnp.where(sampled.valid, entropy, 0)) / count,
        "box": jnp.sum(jnp.where(mask, distance, 0)) / count,
    }


def mask_loss(
    model: CascadeRCNN,
    index: int,
    levels: Sequence[Float[Array, "b _h _w d"]],
    sampled: Sampled,
    objects: Objects,
    width: int,
) -> Float[Array, ""]:
    """Compute the mean binary cross-entropy over positives and pixels, on the channel of each positive's class."""
    config = model.config
    room = int(config.samples * config.fraction)  # Positives stand in the first slots.
    boxes, positive, owner = (
        x[:, :room] for x in (sampled.boxes, sampled.positive, sampled.objects)
    )
    labels = jnp.where(positive, sampled.labels[:, :room], 0)
    logits = model.mask_logits(model.stages[index], levels, boxes, labels)
    assert objects.masks is not None, "a detector with masks trains on objects with masks"
    soft = jax.vmap(lambda m, b, o: mask_targets(m, width, b, o, size=logits.shape[-1]))(
        objects.masks, boxes, owner
    )
    entropy = optax.sigmoid_binary_cross_entropy(logits, (soft >= 0.5).astype(logits.dtype))
    total = jnp.sum(jnp.where(positive[..., None, None], entropy, 0))
    return total / (jnp.maximum(jnp.sum(positive), 1) * logits.shape[-1] ** 2)


def smooth_l1(error: Float[Array, "*n"], beta: float) -> Float[Array, "*n"]:
    """Return |e| - beta / 2, and e² / (2 beta) where |e| < beta."""
    size = jnp.abs(error)
    return jnp.where(size < beta, size**2 / (2 * beta), size - beta / 2)

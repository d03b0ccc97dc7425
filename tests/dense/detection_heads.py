"""Checkers of the heads with their targets, losses and gradients, and of the whole detector."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.models.detection import ProposalConfig, StageConfig
from fastvim_jax.models.detection.boxes import encode_deltas
from fastvim_jax.models.detection.cascade import refine
from fastvim_jax.models.detection.heads import BoxHead, MaskHead
from fastvim_jax.models.detection.masks import mask_targets
from fastvim_jax.models.detection.rpn import (
    AnchorTargets,
    RPNHead,
    anchor_targets,
    make_anchors,
    propose,
)
from fastvim_jax.training.detection.losses import (
    Objects,
    Sampled,
    box_losses,
    rpn_losses,
)
from tests.dense.detection import (
    both,
    gradients,
    image,
    loaded,
    precision,
    priorities,
    same,
)
from tests.dense.golden import Checker, Golden
from tests.parity.compare import Comparison


def proposal_config(
    kwargs: dict, train: dict, proposals: dict, tests: dict | None = None
) -> ProposalConfig:
    anchors, (scale,) = kwargs["anchor_generator"], map(float, kwargs["anchor_generator"]["scales"])
    assigner, sampler = train["assigner"], train["sampler"]
    tests = tests or proposals
    assert assigner["neg_iou_thr"] == assigner["min_pos_iou"]
    return ProposalConfig(
        convs=kwargs["num_convs"],
        scale=scale,
        ratios=tuple(anchors["ratios"]),
        positive=assigner["pos_iou_thr"],
        negative=assigner["neg_iou_thr"],
        samples=sampler["num"],
        fraction=sampler["pos_fraction"],
        beta=kwargs["loss_bbox"]["beta"],
        nms=proposals["nms"]["iou_threshold"],
        train_before=proposals["nms_pre"],
        train_after=proposals["max_per_img"],
        test_before=tests["nms_pre"],
        test_after=tests["max_per_img"],
    )


def padded_objects(golden: Golden, boxes: str, dtype: Any, extra: int = 1) -> Objects:
    """Return the two images' ground truth, padded beyond the larger number of objects."""
    arrays = [golden.inputs[f"{boxes}{i}"] for i in range(2)]
    room = max(map(len, arrays)) + extra
    fill = lambda x: np.concatenate([x, np.zeros((room - len(x), *x.shape[1:]), x.dtype)])  # noqa: E731
    labels = [
        golden.inputs.get(f"gt_labels{i}", np.zeros(len(a), int)) for i, a in enumerate(arrays)
    ]
    masks = [golden.inputs.get(f"gt_masks{i}") for i in range(2)]
    return Objects(
        jnp.asarray(np.stack([fill(x) for x in arrays]), dtype),
        jnp.asarray(np.stack([fill(x) for x in labels]), jnp.int32),
        jnp.asarray(np.stack([np.arange(room) < len(x) for x in arrays])),
        None
        if masks[0] is None
        else jnp.asarray(np.stack([fill(np.packbits(m, axis=-1)) for m in masks])),
    )


def check_rpn(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    k, train, test = golden.kwargs, golden.meta["train_cfg"], golden.meta["test_cfg"]
    config = proposal_config(k, train, test)
    model = loaded(
        lambda: RPNHead(
            k["in_channels"],
            convs=k["num_convs"],
            conv_width=k["feat_channels"],
            anchors=len(config.ratios),
            precision=precision(dtype),
            rngs=nnx.Rngs(0),
        ),
        golden.state,
    )
    strides = k["anchor_generator"]["strides"]
    names = [f"x{i}" for i in range(len(strides))]
    maps = [image(golden.inputs[name], dtype) for name in names]
    anchors = make_anchors(
        [x.shape[1:3] for x in maps], strides, tuple(golden.meta["pad_shape"]), config
    )
    size = jnp.asarray(golden.meta["img_shapes"], dtype)
    objects = padded_objects(golden, "gt", dtype)
    out = golden.outputs

    # The reference draws in its own order, among the candidates of our own assignment.
    perms = [golden.inputs[name] for name in sorted(golden.inputs) if name.startswith("perm")]
    target = jax.jit(
        lambda size, boxes, present, order: anchor_targets(
            anchors, size, boxes, present, order, config
        )
    )
    drawn = []
    for i in range(2):
        order = anchor_order(anchors, size[i], objects, i, config, perms)
        drawn.append(
            target(size[i], objects.boxes[i], objects.present[i], jnp.asarray(order, dtype))
        )
    targets = AnchorTargets(*(jnp.stack(x) for x in zip(*drawn, strict=True)))
    wanted = {
        name: np.concatenate([out[f"{name}{i}"] for i in range(len(strides))], 1)
        for name in ("labels", "label_weights", "bbox_targets", "bbox_weights")
    }
    if comparison.dtype == "float64":
        same(comparison, "sampled", targets.sampled, wanted["label_weights"] > 0)
        same(comparison, "positive", targets.positive, wanted["bbox_weights"][..., 0] > 0)
        same(comparison, "object labels", targets.positive, (wanted["labels"] == 0))
        deltas = np.where(np.asarray(targets.positive)[..., None], targets.deltas, 0)
        comparison.output("bbox_targets", deltas, wanted["bbox_targets"])
    targets = AnchorTargets(
        jnp.asarray(wanted["label_weights"] > 0),
        jnp.asarray(wanted["labels"] == 0),
        jnp.asarray(wanted["bbox_targets"], dtype),
    )
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params, maps):
        def loss(params, maps):
            scores, deltas = nnx.merge(graphdef, params)(maps)
            losses = rpn_losses(
                jnp.concatenate(scores, 1), jnp.concatenate(deltas, 1), targets, config
            )
            return losses["rpn_cls"] + losses["rpn_box"], (scores, deltas, losses)

        (total, aux), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, maps)
        return total, aux, grads

    total, (scores, deltas, losses), (grads, input_grads) = run(params, maps)
    for i, x in enumerate(maps):
        shape = (len(x), *x.shape[1:3], -1)
        comparison.output(f"cls{i}", scores[i].reshape(shape).transpose(0, 3, 1, 2), out[f"cls{i}"])
        comparison.output(f"reg{i}", deltas[i].reshape(shape).transpose(0, 3, 1, 2), out[f"reg{i}"])
    comparison.output("loss_cls", losses["rpn_cls"], out["loss_cls_levels"].sum())
    comparison.output("loss_bbox", losses["rpn_box"], out["loss_bbox_levels"].sum())
    comparison.output("total", total, out["total"])
    gradients(comparison, golden, model, grads)
    for name, grad in zip(names, input_grads, strict=True):
        comparison.grad(name, grad.transpose(0, 3, 1, 2), golden.input_grads()[name])
    if comparison.dtype == "float64":
        found = jax.jit(
            lambda s, d: propose(
                s, d, anchors, size,
                before=config.train_before, after=config.train_after, threshold=config.nms,
            )
        )(scores, deltas)  # fmt: skip
        compare_proposals(comparison, golden, found, "scores")


def anchor_order(anchors, size, objects: Objects, i: int, config, perms: list) -> np.ndarray:
    """Return priorities of one image's anchors that follow the stored permutations."""
    from fastvim_jax.models.detection.anchors import inside
    from fastvim_jax.models.detection.matching import assign

    boxes = jnp.asarray(anchors.boxes, objects.boxes.dtype)
    usable = jnp.asarray(anchors.valid) & inside(boxes, size)
    assigned = np.asarray(
        jax.jit(
            lambda truth, present: assign(
                boxes, usable, truth, present,
                positive=config.positive, negative=config.negative, low_quality=config.negative,
            ).objects
        )(objects.boxes[i], objects.present[i])
    )  # fmt: skip
    if objects.boxes.dtype != jnp.float64:
        return np.zeros((2, len(assigned)))
    limit = int(config.samples * config.fraction)
    positive = priorities(assigned > 0, limit, perms)
    left = config.samples - min(limit, int((assigned > 0).sum()))
    return np.stack([positive, priorities(assigned == 0, left, perms)])


def compare_proposals(comparison: Comparison, golden: Golden, found: Any, scores: str) -> None:
    for i in range(2):
        valid = np.asarray(found.valid[i])
        comparison.output(f"proposals{i}", found.boxes[i][valid], golden.outputs[f"proposals{i}"])
        comparison.output(f"{scores}{i}", found.scores[i][valid], golden.outputs[f"{scores}{i}"])


def check_box_head(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    k = golden.kwargs
    kind = {"L1Loss": "l1", "SmoothL1Loss": "smooth_l1"}[k["loss_bbox"]["type"]]
    assert k["loss_bbox"].get("beta", 1.0) == 1.0
    model = loaded(
        lambda: BoxHead(
            k["in_channels"],
            k["num_classes"],
            convs=4,
            conv_width=k["conv_out_channels"],
            hidden=k["fc_out_channels"],
            class_agnostic=k["reg_class_agnostic"],
            eps=1e-5,
            precision=precision(dtype),
            rngs=nnx.Rngs(0),
        ),
        golden.state,
    )
    stage = StageConfig(stds=tuple(k["bbox_coder"]["target_stds"]))
    rois, out = golden.inputs["rois"], golden.outputs
    rows = [np.flatnonzero(rois[:, 0] == i) for i in range(2)]
    count = max(map(len, rows)) + 1  # One slot stays empty: padding must change nothing.
    sampled = padded_samples(golden, rows, count, k["num_classes"], dtype)
    slots = np.concatenate([i * count + np.arange(len(r)) for i, r in enumerate(rows)])
    order = np.concatenate(rows)
    graphdef, params = nnx.split(model)

    def spread(x):
        return jnp.zeros((2 * count, *x.shape[1:]), x.dtype).at[slots].set(x[order])

    @jax.jit
    def run(params, x):
        def loss(params, x):
            scores, deltas = nnx.merge(graphdef, params)(x)
            shaped = (spread(scores).reshape(2, count, -1), spread(deltas).reshape(2, count, -1, 4))
            losses = box_losses(*shaped, sampled, stage, kind)
            return losses["cls"] + losses["box"], (scores, deltas, losses, shaped)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    (total, (scores, deltas, losses, shaped)), (grads, input_grad) = run(
        params, image(golden.inputs["x"], dtype)
    )
    comparison.output("cls_score", scores, out["cls_score"])
    comparison.output("bbox_pred", deltas.reshape(len(deltas), -1), out["bbox_pred"])
    for name, value in (
        ("loss_cls", losses["cls"]),
        ("loss_bbox", losses["box"]),
        ("total", total),
    ):
        comparison.output(name, value, out[name])
    accuracy = 100 * np.mean(np.argmax(scores, -1) == out["labels"])
    comparison.output("acc", accuracy[None], out["acc"])
    flat = lambda x: np.asarray(x).reshape(2 * count, *x.shape[2:])[slots][np.argsort(order)]  # noqa: E731
    same(comparison, "labels", flat(sampled.labels), out["labels"])
    same(comparison, "label_weights", flat(sampled.valid).astype(float), out["label_weights"])
    positive = flat(sampled.positive)
    same(
        comparison,
        "bbox_weights",
        np.repeat(positive[:, None], 4, 1).astype(float),
        out["bbox_weights"],
    )
    targets = encode_deltas(sampled.boxes, sampled.targets, stage.stds)
    comparison.output(
        "bbox_targets", np.where(positive[:, None], flat(targets), 0), out["bbox_targets"]
    )
    gradients(comparison, golden, model, grads)
    comparison.grad("x", input_grad.transpose(0, 3, 1, 2), golden.input_grads()["x"])

    size = jnp.broadcast_to(jnp.asarray(golden.meta["img_shape"], dtype), (2, 2))
    again = refine(sampled.boxes, *shaped, stage, size)
    comparison.output("refined_test", flat(again), out["refined_test"])
    trained = refine(sampled.boxes, *shaped, stage, size, sampled.labels)
    kept = np.asarray(sampled.valid & ~sampled.is_object)
    for i in range(2):
        comparison.output(f"refined_train{i}", trained[i][kept[i]], out[f"refined_train{i}"])


def padded_samples(golden: Golden, rows: list, count: int, classes: int, dtype: Any) -> Sampled:
    """Return what the fixture says was sampled, two images of `count` slots."""
    boxes, targets = np.zeros((2, 2, count, 4))
    labels = np.full((2, count), classes)
    positive, valid, is_object = np.zeros((3, 2, count), bool)
    for i, r in enumerate(rows):
        n = int(golden.inputs[f"n_pos{i}"])
        boxes[i, : len(r)] = golden.inputs["rois"][r, 1:]
        valid[i, : len(r)], positive[i, :n] = True, True
        targets[i, :n] = golden.inputs[f"pos_gt_bboxes{i}"]
        labels[i, :n] = golden.inputs[f"pos_gt_labels{i}"]
        is_object[i, :n] = golden.inputs[f"pos_is_gt{i}"]
    return Sampled(
        jnp.asarray(boxes, dtype), jnp.asarray(labels, jnp.int32), jnp.asarray(targets, dtype),
        jnp.zeros((2, count), jnp.int32), *map(jnp.asarray, (positive, valid, is_object)),
    )  # fmt: skip


def check_mask_head(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    import optax

    k, size = golden.kwargs, golden.meta["mask_size"]
    model = loaded(
        lambda: MaskHead(
            k["in_channels"],
            k["num_classes"],
            convs=k["num_convs"],
            conv_width=k["conv_out_channels"],
            eps=1e-5,
            precision=precision(dtype),
            rngs=nnx.Rngs(0),
        ),
        golden.state,
    )
    soft = []
    for i in range(2):
        masks = golden.inputs[f"masks{i}"]
        packed = jnp.asarray(np.packbits(masks, axis=-1))
        boxes = jnp.asarray(golden.inputs[f"pos_priors{i}"], dtype)
        owner = jnp.asarray(golden.inputs[f"pos_gt_inds{i}"], jnp.int32)
        soft.append(
            jax.jit(mask_targets, static_argnums=1, static_argnames="size")(
                packed, masks.shape[-1], boxes, owner, size=size
            )
        )
    soft = jnp.concatenate(soft)
    comparison.output("soft_targets", soft, golden.outputs["soft_targets"])
    same(comparison, "targets", np.asarray(soft >= 0.5), golden.outputs["targets"].astype(bool))
    labels = np.concatenate([golden.inputs[f"pos_labels{i}"] for i in range(2)])
    graphdef, params = nnx.split(model)
    wanted = jnp.asarray(golden.outputs["targets"], dtype)

    @jax.jit
    def run(params, x):
        def loss(params, x):
            logits = nnx.merge(graphdef, params)(x)
            own = logits[jnp.arange(len(labels)), :, :, labels]
            return optax.sigmoid_binary_cross_entropy(own, wanted).mean(), logits

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    (loss, logits), (grads, input_grad) = run(params, image(golden.inputs["x"], dtype))
    comparison.output("logits", logits.transpose(0, 3, 1, 2), golden.outputs["logits"])
    comparison.output("loss", loss, golden.outputs["loss"])
    gradients(comparison, golden, model, grads)
    if "x" in golden.input_grads():
        comparison.grad("x", input_grad.transpose(0, 3, 1, 2), golden.input_grads()["x"])


CHECKERS: dict[str, Checker] = {
    "RPNHead": both(check_rpn),
    "Shared4Conv1FCBBoxHead": both(check_box_head),
    "FCNMaskHead": both(check_mask_head),
}

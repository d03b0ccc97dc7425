"""Checkers of the detection fixtures, by the class that made them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.interop import from_torch_state_dict, to_torch_names
from fastvim_jax.models.detection import DetectorConfig
from fastvim_jax.models.detection.anchors import base_anchors, inside, level_anchors, valid_anchors
from fastvim_jax.models.detection.boxes import decode_deltas, encode_deltas, overlaps
from fastvim_jax.models.detection.cascade import detections
from fastvim_jax.models.detection.config import StageConfig
from fastvim_jax.models.detection.masks import paste_mask, paste_masks
from fastvim_jax.models.detection.matching import assign, sample
from fastvim_jax.models.detection.nms import nms
from fastvim_jax.models.detection.roi_align import box_levels, cell_bound, roi_align
from fastvim_jax.models.detection.simple_fpn import SimpleFPN
from fastvim_jax.precision import Precision
from tests.dense.golden import Checker, Golden, dtypes_of
from tests.parity.compare import Comparison
from tests.support import x64

WIDE = {"float64": jnp.float64, "float32": jnp.float32}


def both(check: Callable[[Comparison, Golden, Any], None]) -> Checker:
    """Check in float64, and in float32 if the fixture is drawn for it."""
    return lambda golden: [_checked(check, golden, dtype) for dtype in dtypes_of(golden)]


def exact(check: Callable[[Comparison, Golden, Any], None]) -> Checker:
    """Check in float64 only, because a selection could flip in float32."""
    return lambda golden: [_checked(check, golden, "float64")]


def _checked(
    check: Callable[[Comparison, Golden, Any], None], golden: Golden, dtype: str
) -> Comparison:
    comparison = Comparison(golden.name, golden.kind, dtype)
    with x64() if dtype == "float64" else contextlib.nullcontext():
        check(comparison, golden, WIDE[dtype])
    return comparison


def precision(dtype: Any) -> Precision:
    name = jnp.dtype(dtype).name
    return Precision(name, name)


def image(x: np.ndarray, dtype: Any) -> jax.Array:
    """Transpose (..., c, h, w) to (..., h, w, c)."""
    return jnp.asarray(np.moveaxis(x, -3, -1), dtype)


def loaded(build: Callable[[], nnx.Module], state: dict[str, np.ndarray]) -> nnx.Module:
    """Return a module whose every parameter comes from the fixture."""
    model = nnx.eval_shape(build)
    from_torch_state_dict(model, state)
    return model


def same(comparison: Comparison, name: str, actual: Any, expected: np.ndarray) -> None:
    """Record a problem unless two selections or labels are the same."""
    if not np.array_equal(np.asarray(actual), expected):
        comparison.problems.append(f"{name} differs: {actual} instead of {expected}")


def gradients(
    comparison: Comparison, golden: Golden, model: nnx.Module, grads: Any, prefix: str = ""
) -> None:
    """Compare the gradients of every parameter."""
    named = to_torch_names(model, jax.device_get(grads))
    expected = golden.parameter_grads()
    for name in expected.keys() | set(golden.meta["grads_stored"]) - {
        f"input/{k}" for k in golden.input_grads()
    }:
        if name in named and name in expected:
            comparison.grad(name, named[name], expected[name])
        else:
            comparison.missing(f"gradient of {prefix}{name}")


def check_anchors(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    m = golden.meta
    (scale,), ratios = map(float, m["scales"]), tuple(m["ratios"])
    everything = []
    for i, (grid, stride) in enumerate(zip(m["feature_sizes"], m["strides"], strict=True)):
        comparison.output(
            f"base{i}", base_anchors(stride, scale, ratios), golden.outputs[f"base{i}"]
        )
        anchors = level_anchors(tuple(grid), stride, scale, ratios)
        comparison.output(f"anchors{i}", anchors, golden.outputs[f"anchors{i}"])
        valid = valid_anchors(tuple(grid), stride, tuple(m["pad_shape"]), len(ratios))
        same(comparison, f"valid{i}", valid, golden.outputs[f"valid{i}"])
        everything.append((anchors, valid))
    anchors, valid = (np.concatenate(x) for x in zip(*everything, strict=True))
    usable = inside(anchors, np.asarray(m["img_shape"])) & valid
    same(comparison, "inside", usable, golden.outputs["inside"])


def check_deltas(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    stds = tuple(golden.meta["stds"])
    priors, truth, deltas = (
        jnp.asarray(golden.inputs[k], dtype) for k in ("priors", "gt", "deltas")
    )
    comparison.output("encoded", encode_deltas(priors, truth, stds), golden.outputs["encoded"])
    size = jnp.asarray(golden.meta["max_shape"], dtype)

    def decode(deltas: jax.Array, size: jax.Array | None) -> jax.Array:
        offsets = deltas.reshape(len(deltas), -1, 4)
        boxes = jnp.broadcast_to(priors[:, None], offsets.shape)
        return decode_deltas(boxes, offsets, stds, size).reshape(deltas.shape)

    unclipped = decode(deltas, None)
    comparison.output("decoded_unclipped", unclipped, golden.outputs["decoded_unclipped"])
    clipped, pullback = jax.vjp(lambda d: decode(d, size), deltas)
    comparison.output("decoded_clipped", clipped, golden.outputs["decoded_clipped"])
    (grad,) = pullback(jnp.asarray(golden.cotangents["decoded_clipped"], dtype))
    comparison.grad("deltas", grad, golden.input_grads()["deltas"])


def check_overlaps(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    a, b = (jnp.asarray(golden.inputs[k], dtype) for k in "ab")
    for kind, expected in golden.outputs.items():
        comparison.output(kind, overlaps(a, b, kind), expected)


def check_nms(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    boxes, scores = (jnp.asarray(golden.inputs[k], dtype) for k in ("boxes", "scores"))
    groups = jnp.asarray(golden.inputs["idxs"], jnp.int32)
    valid = jnp.ones(len(scores), bool)
    for name, expected in golden.outputs.items():
        *kind, threshold = name.split("_")
        suppress = jax.jit(partial(nms, threshold=float(threshold), k=len(scores)))
        kept = suppress(boxes, scores, valid, groups=groups if "class" in kind else None)
        same(comparison, name, kept.indices[kept.valid], expected)
        comparison.output(
            f"{name} scores", kept.scores[kept.valid], golden.inputs["scores"][expected]
        )


def priorities(candidates: np.ndarray, needed: int, perms: list[np.ndarray]) -> np.ndarray:
    """Return numbers that make `thin` take candidates in the order of the next stored permutation."""
    order = np.full(len(candidates), np.inf)
    if candidates.sum() > needed:
        perm = perms.pop(0)
        order[np.flatnonzero(candidates)[perm]] = np.arange(len(perm))
    return np.where(np.isfinite(order), order, 0)


def check_assignment(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    a, s, out = golden.meta["assigner"], golden.meta["sampler"], golden.outputs
    boxes = jnp.asarray(golden.inputs["priors"], dtype)
    # Padding between the ground truth and the boxes must change nothing.
    padding = 2
    truth = np.asarray(golden.inputs["gt_bboxes"])
    m = len(truth)
    objects = jnp.asarray(np.concatenate([truth, np.zeros((padding, 4))]), dtype)
    present = jnp.arange(m + padding) < m
    options = {
        "positive": a["pos_iou_thr"],
        "negative": a["neg_iou_thr"],
        "low_quality": a["min_pos_iou"] if a["match_low_quality"] else None,
    }
    result = jax.jit(partial(assign, **options))(
        boxes, jnp.ones(len(boxes), bool), objects, present
    )
    assigned = np.asarray(result.objects)
    same(comparison, "gt_inds", assigned, out["gt_inds"])
    comparison.output("max_overlaps", result.overlap, out["max_overlaps"])
    labels = np.full(len(boxes), -1)
    labels[assigned > 0] = golden.inputs["gt_labels"][assigned[assigned > 0] - 1]
    same(comparison, "labels", labels, out["labels"])

    if s["add_gt_as_proposals"]:
        own = np.where(np.arange(m + padding) < m, np.arange(1, m + padding + 1), -1)
        assigned, first = np.concatenate([own, assigned]), m + padding
        every = np.concatenate([np.asarray(objects), np.asarray(boxes)])
    else:
        first, every = 0, np.asarray(boxes)
    perms = [golden.inputs[f"perm{i}"] for i in range(golden.meta["n_perms"])]
    limit = int(s["num"] * s["pos_fraction"])
    positive_order = priorities(assigned > 0, limit, perms)
    left = s["num"] - min(limit, int((assigned > 0).sum()))
    order = np.stack([positive_order, priorities(assigned == 0, left, perms)])
    drawn = jax.jit(partial(sample, count=s["num"], fraction=s["pos_fraction"]))(
        jnp.asarray(assigned, jnp.int32), jnp.asarray(order, dtype)
    )
    indices = np.asarray(drawn.indices)
    theirs = np.where(indices >= first, indices - padding * bool(first), indices)
    positive, valid = np.asarray(drawn.positive), np.asarray(drawn.valid)
    for name, mask in (("pos", positive), ("neg", valid & ~positive)):
        same(comparison, f"{name}_inds", theirs[mask], out[f"{name}_inds"])
        if mask.any():
            comparison.output(f"{name}_priors", every[indices[mask]], out[f"{name}_priors"])
    same(comparison, "objects", np.asarray(drawn.objects)[positive], out["pos_assigned_gt_inds"])
    same(comparison, "is_gt", indices[positive] < first, out["pos_is_gt"].astype(bool))


def pooled(golden: Golden, maps: list[jax.Array], boxes: jax.Array, **options: Any) -> jax.Array:
    """Return RoIAlign of boxes that name their image, `n c p q`."""
    image_of = np.asarray(golden.inputs["rois"][:, 0], int)
    per_image = jax.vmap(lambda maps: roi_align(maps, boxes, **options))(maps)
    return per_image[image_of, np.arange(len(image_of))].transpose(0, 3, 1, 2)


def check_roi_align(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    m = golden.meta
    x, rois = image(golden.inputs["x"], dtype), jnp.asarray(golden.inputs["rois"], dtype)
    stride = round(1 / m["spatial_scale"])
    options = {
        "level": jnp.zeros(len(rois), jnp.int32),
        "strides": [stride],
        "size": tuple(m["output_size"]),
        "cells": cell_bound([x.shape[1:3]], [stride], levelled=False),
        "ratio": m["sampling_ratio"],
    }
    compare_pooling(comparison, golden, [x], rois[:, 1:], options, ["x"])


def check_roi_extractor(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    k = golden.kwargs
    strides = k["featmap_strides"]
    names = [f"x{i}" for i in range(len(strides))]
    maps = [image(golden.inputs[name], dtype) for name in names]
    rois = jnp.asarray(golden.inputs["rois"], dtype)
    level = box_levels(rois[:, 1:], len(strides))
    same(comparison, "levels", level, golden.outputs["levels"])
    side = k["roi_layer"]["output_size"]
    options = {
        "level": level,
        "strides": strides,
        "size": (side, side),
        "cells": cell_bound([x.shape[1:3] for x in maps], strides),
        "ratio": k["roi_layer"]["sampling_ratio"],
    }
    compare_pooling(comparison, golden, maps, rois[:, 1:], options, names)


def compare_pooling(comparison, golden, maps, boxes, options, names) -> None:
    @jax.jit
    def run(maps):
        y, pullback = jax.vjp(lambda maps: pooled(golden, maps, boxes, **options), maps)
        return y, pullback(jnp.asarray(golden.cotangents["y"], y.dtype))[0]

    y, grads = run(maps)
    comparison.output("y", y, golden.outputs["y"])
    for name, grad in zip(names, grads, strict=True):
        comparison.grad(name, grad.transpose(0, 3, 1, 2), golden.input_grads()[name])


def check_simple_fpn(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    k = golden.kwargs
    width = k["backbone_channel"]
    assert k["in_channels"] == [width // 4, width // 2, width, width]
    assert k["num_outs"] == 5
    model = loaded(
        lambda: SimpleFPN(
            width, k["out_channels"], eps=1e-5, precision=precision(dtype), rngs=nnx.Rngs(0)
        ),
        golden.state,
    )
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params, x):
        levels, pullback = jax.vjp(lambda p, x: nnx.merge(graphdef, p)(x), params, x)
        return levels, pullback(
            tuple(image(golden.cotangents[f"p{i}"], y.dtype) for i, y in enumerate(levels))
        )

    levels, (grads, input_grad) = run(params, image(golden.inputs["x"], dtype))
    for i, level in enumerate(levels):
        comparison.output(f"p{i}", level.transpose(0, 3, 1, 2), golden.outputs[f"p{i}"])
    gradients(comparison, golden, model, grads)
    comparison.grad("x", input_grad.transpose(0, 3, 1, 2), golden.input_grads()["x"])


def check_paste(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    m, labels = golden.meta, golden.inputs["labels"]
    logits = golden.inputs["mask_logits"].astype(np.float64)[np.arange(len(labels)), labels]
    probability = 1 / (1 + np.exp(-logits))
    boxes = golden.inputs["bboxes"].astype(np.float64) / np.tile(m["scale_factor"], 2)
    height, width = m["ori_shape"]
    soft = [paste_mask(p, b, height, width) for p, b in zip(probability, boxes, strict=True)]
    comparison.output("soft", np.stack(soft), golden.outputs["soft"], bound=1e-6)
    masks = paste_masks(probability, boxes, height, width, m["threshold"])
    same(comparison, "masks", masks, golden.outputs["masks"])


def check_postprocess(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    m, test = golden.meta, golden.meta["test_cfg"]
    logits = [v for k, v in golden.inputs.items() if k.startswith("cls_score")]
    mean = jnp.asarray(sum(x.astype(np.float64) for x in logits) / len(logits), dtype)
    config = DetectorConfig(
        small_backbone(),
        num_classes=mean.shape[-1] - 1,
        score=test["score_thr"],
        nms=test["nms"]["iou_threshold"],
        detections=test["max_per_img"],
    )
    boxes = jnp.asarray(golden.inputs["rois"][None, :, 1:], dtype)
    deltas = jnp.asarray(golden.inputs["bbox_pred"], dtype).reshape(1, boxes.shape[1], -1, 4)
    found = jax.jit(detections, static_argnums=(4, 7))(
        boxes,
        mean[None],
        deltas,
        jnp.ones(boxes.shape[:2], bool),
        StageConfig(stds=tuple(m["target_stds"])),
        jnp.asarray([m["img_shape"]], dtype),
        jnp.asarray([m["scale_factor"]], dtype),
        config,
    )
    valid = np.asarray(found.valid[0])
    comparison.output("bboxes", found.boxes[0][valid], golden.outputs["bboxes"])
    comparison.output("scores", found.scores[0][valid], golden.outputs["scores"])
    same(comparison, "labels", found.labels[0][valid], golden.outputs["labels"])


def small_backbone(**options: Any) -> Any:
    """Return a FastVim so small that it costs nothing to describe."""
    from fastvim_jax.models.config import VisionMambaConfig

    return VisionMambaConfig(
        embed_dim=16, depth=2, image_size=32, num_classes=0, out_indices=(1,), **options
    )


CHECKERS: dict[str, Checker] = {
    "mmdet AnchorGenerator": exact(check_anchors),
    "DeltaXYWHBBoxCoder": both(check_deltas),
    "mmdet bbox_overlaps": both(check_overlaps),
    "nms / batched_nms": exact(check_nms),
    "MaxIoUAssigner + RandomSampler": exact(check_assignment),
    "RoIAlign (aligned)": both(check_roi_align),
    "SingleRoIExtractor": both(check_roi_extractor),
    "authors SimpleFPN": both(check_simple_fpn),
    "FCNMaskHead._predict_by_feat_single": exact(check_paste),
    "BBoxHead.predict_by_feat (last stage)": exact(check_postprocess),
}

"""Checkers of the whole detector: training pass with gradients, and detections."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.interop import state_dict
from fastvim_jax.interop.torch_names import PATCH, SAME, NameTable
from fastvim_jax.layers.patch_embed import PatchProjection
from fastvim_jax.models.config import VisionMambaConfig
from fastvim_jax.models.detection import CascadeRCNN, DetectorConfig, StageConfig
from fastvim_jax.models.detection.masks import paste_masks
from fastvim_jax.models.detection.rpn import AnchorTargets, anchor_targets, make_anchors, propose
from fastvim_jax.training.detection.losses import (
    Draws,
    Objects,
    Sampled,
    detection_loss,
    losses_of_stage,
    rpn_losses,
)
from tests.dense.detection import exact, gradients, image, loaded, precision, same
from tests.dense.detection_heads import padded_objects, proposal_config
from tests.dense.golden import Checker, Golden, read
from tests.parity.compare import Comparison
from tests.support import dense_dir, x64


class PatchBackbone(nnx.Module):
    """The fixtures' stand-in: one convolution of 16 × 16 with stride 16."""

    def __init__(self, config: VisionMambaConfig, *, rngs: nnx.Rngs):
        p = config.precision
        self.precision = p
        self.proj = PatchProjection((16, 16), 3, config.embed_dim, precision=p, rngs=rngs)

    def __call__(self, images):
        y = jax.lax.conv_general_dilated(
            images, self.proj.kernel[...], (16, 16), "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=self.precision.lax,
        )  # fmt: skip
        return (y + self.proj.bias[...],)


state_dict.TABLES[PatchBackbone] = NameTable(  # type: ignore[index]
    (("proj.weight", "proj.kernel", PATCH), ("proj.bias", "proj.bias", SAME))
)


def detector_config(golden: Golden, dtype: Any) -> DetectorConfig:
    k = golden.kwargs
    head, train, test = k["roi_head"], k["train_cfg"], k["test_cfg"]
    boxes, sampler = head["bbox_head"], train["rcnn"][0]["sampler"]
    p = precision(dtype)
    names = {"embed_dim": k["backbone"]["dim"], "depth": 1, "image_size": 32, "num_classes": 0}
    return DetectorConfig(
        VisionMambaConfig(**names, out_indices=(0,), dtype=p.dtype, param_dtype=p.param_dtype),
        num_classes=boxes[0]["num_classes"],
        width=k["neck"]["out_channels"],
        norm_eps=1e-5,  # as released
        rpn=proposal_config(k["rpn_head"], train["rpn"], train["rpn_proposal"], test["rpn"]),
        stages=tuple(
            StageConfig(
                settings["assigner"]["pos_iou_thr"],
                tuple(box["bbox_coder"]["target_stds"]),
                float(weight),
            )
            for settings, box, weight in zip(
                train["rcnn"], boxes, head["stage_loss_weights"], strict=True
            )
        ),
        hidden=boxes[0]["fc_out_channels"],
        mask_convs=head["mask_head"]["num_convs"],
        class_agnostic=boxes[0]["reg_class_agnostic"],
        box_loss={"L1Loss": "l1", "SmoothL1Loss": "smooth_l1"}[boxes[0]["loss_bbox"]["type"]],
        samples=sampler["num"],
        fraction=sampler["pos_fraction"],
        score=test["rcnn"]["score_thr"],
        nms=test["rcnn"]["nms"]["iou_threshold"],
        detections=test["rcnn"]["max_per_img"],
    )


def load_detector(golden: Golden, state: dict, dtype: Any) -> CascadeRCNN:
    config = detector_config(golden, dtype)

    def build() -> CascadeRCNN:
        rngs = nnx.Rngs(0)
        return CascadeRCNN(config, PatchBackbone(config.backbone, rngs=rngs), rngs=rngs)

    return loaded(build, state)


def stored_draws(golden: Golden, config: DetectorConfig, objects: Objects, dtype: Any) -> Draws:
    """Return priorities that pick what the reference picked, if it is among the candidates and there are as many."""
    sampled = stored_levels(golden, "label_weights") > 0
    anchors = np.repeat(~sampled[:, None], 2, 1)
    room, batch = objects.boxes.shape[1], 2
    boxes, kept = [], [np.arange(config.rpn.train_after)] * batch
    for s in range(len(config.stages)):
        size = room + (config.rpn.train_after if s == 0 else config.samples)
        order = np.ones((batch, 2, size))
        for i in range(batch):
            present = int(np.sum(objects.present[i]))
            place = np.concatenate([np.arange(present), room + kept[i]])
            name = f"s{s}_i{i}_"
            for row, kind in enumerate(("pos", "neg")):
                order[i, row, place[golden.inputs[f"{name}{kind}_inds"]]] = 0
            # The next stage sees this one's slots but for those that hold ground truth.
            slots = np.arange(len(golden.inputs[f"{name}priors"]))
            removed = np.flatnonzero(golden.inputs[f"{name}pos_is_gt"])
            kept[i] = np.setdiff1d(slots, removed)
        boxes.append(jnp.asarray(order, dtype))
    return Draws(jnp.asarray(anchors, dtype), boxes)


def check_training(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    """Check the pass from images to losses, in which the detector selects everything itself."""

    def losses_of(model, images, objects, size):
        draws = stored_draws(golden, model.config, objects, dtype)
        return lambda model: detection_loss(model, images, objects, draws, size)

    compare_training(comparison, golden, dtype, losses_of)


def check_training_of_samples(golden: Golden) -> Comparison:
    """Check losses and gradients in float32 with what was sampled given, because selections could flip."""
    comparison = Comparison(golden.name, golden.kind, "float32", "given samples")
    with x64():
        model = load_detector(golden, golden.state, jnp.float64)
        wanted = np.asarray(targets_of(model, golden, jnp.float64).deltas, np.float32)

    def losses_of(model, images, objects, size):
        config = model.config
        labels, weights = (stored_levels(golden, k) for k in ("labels", "label_weights"))
        targets = AnchorTargets(*map(jnp.asarray, (weights > 0, labels == 0, wanted)))
        samples = [
            stored_samples(golden, i, objects, config, images.dtype)
            for i in range(len(config.stages))
        ]

        def losses(model):
            levels = model.features(images)
            scores, deltas = (jnp.concatenate(x, 1) for x in model.rpn(levels))
            found = rpn_losses(scores, deltas, targets, config.rpn)
            for i, sampled in enumerate(samples):
                found |= losses_of_stage(model, i, levels, sampled, objects, images.shape[1:3])[0]
            return found

        return losses

    compare_training(comparison, golden, jnp.float32, losses_of)
    return comparison


def targets_of(model: CascadeRCNN, golden: Golden, dtype: Any) -> AnchorTargets:
    """Return the anchors' targets as the detector finds them, sampling what the reference sampled."""
    objects = padded_objects(golden, "gt_bboxes", dtype)
    padded = tuple(golden.meta["pad_shape"])
    images = jax.ShapeDtypeStruct((2, *padded, 3), dtype)
    levels = jax.eval_shape(lambda x: model.features(x), images)
    grids = [level.shape[1:3] for level in levels]
    anchors = make_anchors(grids, model.config.strides, padded, model.config.rpn)
    draws = stored_draws(golden, model.config, objects, dtype)
    size = jnp.asarray(golden.meta["img_shapes"], dtype)
    target = partial(anchor_targets, anchors, config=model.config.rpn)
    return jax.jit(jax.vmap(target))(size, objects.boxes, objects.present, draws.anchors)


def stored_levels(golden: Golden, name: str) -> np.ndarray:
    return np.concatenate([golden.inputs[f"rpn_{name}{i}"] for i in range(5)], 1)


def compare_training(comparison, golden: Golden, dtype: Any, losses_of: Any) -> None:
    model = load_detector(golden, golden.state, dtype)
    objects = padded_objects(golden, "gt_bboxes", dtype)
    graphdef, params = nnx.split(model)
    size = jnp.asarray(golden.meta["img_shapes"], dtype)
    losses_of = losses_of(model, image(golden.inputs["x"], dtype), objects, size)

    def total_of(params):
        losses = losses_of(nnx.merge(graphdef, params))
        return sum(losses.values()), losses

    (total, losses), grads = jax.jit(jax.value_and_grad(total_of, has_aux=True))(params)
    out = golden.outputs
    comparison.output("total", total, out["total"])
    comparison.output("rpn_cls", losses["rpn_cls"], out["loss/loss_rpn_cls"].sum())
    comparison.output("rpn_box", losses["rpn_box"], out["loss/loss_rpn_bbox"].sum())
    for s in range(len(model.config.stages)):
        for ours, theirs in (("cls", "cls"), ("box", "bbox"), ("mask", "mask")):
            comparison.output(
                f"s{s}.{ours}", losses[f"s{s}_{ours}"], out[f"loss/s{s}.loss_{theirs}"].sum()
            )
    gradients(comparison, golden, model, grads)


def stored_samples(golden, s, objects, config, dtype) -> Sampled:
    rows = []
    for i in range(2):
        get = lambda k, i=i: golden.inputs[f"s{s}_i{i}_{k}"]  # noqa: E731
        n, k = int(get("n_pos")), config.samples
        boxes, owner = np.zeros((k, 4)), np.zeros(k, int)
        boxes[: len(get("priors"))] = get("priors")
        owner[:n] = get("pos_gt_inds")
        positive, slots = np.arange(k) < n, np.arange(k) < len(get("priors"))
        labels = np.where(positive, np.asarray(objects.labels[i])[owner], config.num_classes)
        truth = np.where(positive[:, None], np.asarray(objects.boxes[i])[owner], 0)
        rows.append((boxes, labels, truth, owner, positive, slots, np.zeros(k, bool)))
    kinds = (dtype, jnp.int32, dtype, jnp.int32, bool, bool, bool)
    return Sampled(
        *(jnp.asarray(np.stack(x), t) for x, t in zip(zip(*rows, strict=True), kinds, strict=True))
    )


@cache
def compiled_detection(config: DetectorConfig) -> Any:
    """Compile once for all fixtures of one configuration."""

    def build() -> CascadeRCNN:
        return CascadeRCNN(
            config, PatchBackbone(config.backbone, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)
        )

    graphdef = nnx.graphdef(nnx.eval_shape(build))

    @jax.jit
    def run(params, images, size, scale):
        model = nnx.merge(graphdef, params)
        rpn = config.rpn
        levels = model.features(images)
        anchors = model.anchors(levels, images.shape[1:3])
        proposals = propose(
            *model.rpn(levels), anchors, size,
            before=rpn.test_before, after=rpn.test_after, threshold=rpn.nms,
        )  # fmt: skip
        return proposals, model.detect(levels, proposals, size, scale)

    return run


def check_detection(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    m, out = golden.meta, golden.outputs
    source = golden
    if "x" not in golden.inputs:  # Same parameters and images as another fixture.
        folder = dense_dir()
        assert folder is not None
        source = read(folder / f"{golden.name.replace('raw', 'rescaled')}.npz")
    state = source.state
    model = load_detector(golden, state, dtype)
    size = jnp.asarray(m["img_shapes"], dtype)
    factor = m["scale_factor"] if m["rescale"] else [1.0, 1.0]
    scale = jnp.broadcast_to(jnp.asarray(factor, dtype), (2, 2))

    params = nnx.state(model)
    run = compiled_detection(model.config)
    proposals, found = run(params, image(source.inputs["x"], dtype), size, scale)
    for i in range(2):
        valid = np.asarray(proposals.valid[i])
        comparison.output(f"proposals{i}", proposals.boxes[i][valid], out[f"proposals{i}"])
        comparison.output(
            f"proposal_scores{i}", proposals.scores[i][valid], out[f"proposal_scores{i}"]
        )
        valid = np.asarray(found.valid[i])
        comparison.output(f"bboxes{i}", found.boxes[i][valid], out[f"bboxes{i}"])
        comparison.output(f"scores{i}", found.scores[i][valid], out[f"scores{i}"])
        same(comparison, f"labels{i}", found.labels[i][valid], out[f"labels{i}"])
        height, width = out[f"masks{i}"].shape[1:]
        masks = paste_masks(
            np.asarray(found.masks[i][valid]), np.asarray(found.boxes[i][valid]), height, width
        )
        same(comparison, f"masks{i}", masks, out[f"masks{i}"])


CHECKERS: dict[str, Checker] = {
    "CascadeRCNN with stand-in backbone": exact(check_training),
    "CascadeRCNN.predict": exact(check_detection),
}

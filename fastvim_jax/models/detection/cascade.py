"""Define Cascade Mask R-CNN on a plain backbone: one stride-16 map, a pyramid, proposals, and stages that refine them.

Only the image size and the config decide the shape of an array: proposals, samples and detections are padded, and
`valid` marks the real ones. So one program is compiled per image size, whatever the images show.

Letters: n boxes of an image, k detections of an image. `classes` counts the background, as the last one. `sets` is the
number of deltas of a box: one for each class without the background, or one for all (`class_agnostic`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fastvim_jax.models import saving
from fastvim_jax.models.detection.boxes import decode_deltas
from fastvim_jax.models.detection.config import DetectorConfig, StageConfig
from fastvim_jax.models.detection.heads import BOX_SIZE, MASK_SIZE, BoxHead, MaskHead
from fastvim_jax.models.detection.nms import best, nms
from fastvim_jax.models.detection.roi_align import pool_boxes
from fastvim_jax.models.detection.rpn import Anchors, Proposals, RPNHead, make_anchors, propose
from fastvim_jax.models.detection.simple_fpn import SimpleFPN
from fastvim_jax.typing import Images


class Detections(NamedTuple):
    """Detected objects of each image, best first; `valid` marks those that exist.

    Attributes:
        boxes: (x1, y1, x2, y2) in pixels of the original image, before it was resized.
        scores: from 0 to 1.
        labels: classes, from 0 to num_classes - 1.
        valid: marks the detections that exist.
        masks: probabilities inside each box, `n` × `n` cells over the whole box; None without mask heads.
    """

    boxes: Float[Array, "b k 4"]
    scores: Float[Array, "b k"]
    labels: Int[Array, "b k"]
    valid: Bool[Array, "b k"]
    masks: Float[Array, "b k n n"] | None


class Stage(nnx.Module):
    """Box head and mask head of one stage."""

    def __init__(self, config: DetectorConfig, *, rngs: nnx.Rngs):
        p, c, eps = config.precision, config.width, config.norm_eps
        self.box_head = BoxHead(
            c,
            config.num_classes,
            convs=config.box_convs,
            conv_width=c,
            hidden=config.hidden,
            class_agnostic=config.class_agnostic,
            eps=eps,
            precision=p,
            rngs=rngs,
        )
        self.mask_head = (
            MaskHead(
                c,
                config.num_classes,
                convs=config.mask_convs,
                conv_width=c,
                eps=eps,
                precision=p,
                rngs=rngs,
            )
            if config.masks
            else nnx.data(None)
        )


class CascadeRCNN(nnx.Module):
    """A detector around any backbone that returns one stride-16 map. Build it through `build_model`."""

    save_pretrained = saving.save_pretrained

    def __init__(self, config: DetectorConfig, backbone: nnx.Module, *, rngs: nnx.Rngs):
        p, c = config.precision, config.width
        self.config = config
        self.backbone = backbone
        self.neck = SimpleFPN(
            config.backbone.embed_dim, c, eps=config.norm_eps, precision=p, rngs=rngs
        )
        self.rpn = RPNHead(
            c,
            convs=config.rpn.convs,
            conv_width=c,
            anchors=len(config.rpn.ratios),
            precision=p,
            rngs=rngs,
        )
        self.stages = nnx.List(Stage(config, rngs=rngs) for _ in config.stages)

    def features(self, images: Images, **drawn) -> tuple[Float[Array, "b _h _w d"], ...]:
        """Compute the pyramid p2 to p6; `drawn` goes to the backbone (`key` or `drop_path_keep`)."""
        (level,) = self.backbone(images, **drawn)
        return self.neck(level)

    def anchors(
        self, levels: Sequence[Float[Array, "b _h _w d"]], padded: tuple[int, int]
    ) -> Anchors:
        """Build the anchors of these maps."""
        grids = [(x.shape[1], x.shape[2]) for x in levels]
        return make_anchors(grids, self.config.strides, padded, self.config.rpn)

    def count_anchors(self, padded: tuple[int, int]) -> int:
        """Count the anchors of an image padded to `padded` (height, width), a multiple of 32."""
        cells = sum(-(-padded[0] // s) * -(-padded[1] // s) for s in self.config.strides)
        return cells * len(self.config.rpn.ratios)

    def __call__(
        self,
        images: Images,
        size: Float[Array, "b 2"] | None = None,
        scale: Float[Array, "b 2"] | None = None,
    ) -> Detections:
        """Detect objects.

        Args:
            images: `b h w c`, normalised and padded to a common size.
            size: Height and width of each image that boxes are clipped to; None: the padded size, as in the recipes.
            scale: Factors along width and height by which each image was resized; None: 1.

        Returns:
            Detections in pixels of the original images.
        """
        padded = (images.shape[1], images.shape[2])
        levels = self.features(images)
        wide = jnp.promote_types(levels[0].dtype, jnp.float32)
        if size is None:
            size = jnp.broadcast_to(jnp.asarray(padded, wide), (len(images), 2))
        scale = jnp.ones((len(images), 2), wide) if scale is None else scale
        anchors = self.anchors(levels, padded)
        rpn = self.config.rpn
        proposals = propose(
            *self.rpn(levels),
            anchors,
            size,
            before=rpn.test_before,
            after=rpn.test_after,
            threshold=rpn.nms,
        )
        return self.detect(levels, proposals, size, scale)

    def detect(
        self,
        levels: Sequence[Float[Array, "b _h _w d"]],
        proposals: Proposals,
        size: Float[Array, "b 2"],
        scale: Float[Array, "b 2"],
    ) -> Detections:
        """Refine proposals stage by stage, average the stages' logits, drop duplicates, and predict masks."""
        found = self.suppress(
            *self.cascade(levels, proposals.boxes, size), proposals.valid, size, scale
        )
        if not self.config.masks:
            return found
        resized = found.boxes * jnp.concatenate([scale, scale], -1)[:, None]
        return found._replace(masks=self.mask_probabilities(levels, resized, found.labels))

    def cascade(
        self,
        levels: Sequence[Float[Array, "b _h _w d"]],
        boxes: Float[Array, "b n 4"],
        size: Float[Array, "b 2"],
    ) -> tuple[Float[Array, "b n 4"], Float[Array, "b n classes"], Float[Array, "b n sets 4"]]:
        """Refine boxes stage by stage; return the last stage's input boxes, the mean of all logits, and its deltas."""
        logits = []
        for i, (stage, settings) in enumerate(zip(self.stages, self.config.stages, strict=True)):
            scores, deltas = self.box_scores(stage, levels, boxes)
            logits.append(scores)
            if i < len(self.stages) - 1:
                boxes = refine(boxes, scores, deltas, settings, size)
        return boxes, jnp.mean(jnp.stack(logits), 0), deltas

    def suppress(
        self,
        boxes: Float[Array, "b n 4"],
        logits: Float[Array, "b n classes"],
        deltas: Float[Array, "b n sets 4"],
        valid: Bool[Array, "b n"],
        size: Float[Array, "b 2"],
        scale: Float[Array, "b 2"],
    ) -> Detections:
        """Turn the results of `cascade` into detections without masks."""
        stage = self.config.stages[-1]
        return detections(boxes, logits, deltas, valid, stage, size, scale, self.config)

    def mask_probabilities(
        self,
        levels: Sequence[Float[Array, "b _h _w d"]],
        boxes: Float[Array, "b n 4"],
        labels: Int[Array, "b n"],
    ) -> Float[Array, "b n size size"]:
        """Average the stages' mask probabilities for the class of each box, in pixels of the padded image."""
        masks = [
            jax.nn.sigmoid(self.mask_logits(stage, levels, boxes, labels)) for stage in self.stages
        ]
        return jnp.mean(jnp.stack(masks), 0)

    def box_scores(
        self,
        stage: Stage,
        levels: Sequence[Float[Array, "b _h _w d"]],
        boxes: Float[Array, "b n 4"],
    ) -> tuple[Float[Array, "b n classes"], Float[Array, "b n sets 4"]]:
        """Return a stage's class logits and deltas for each box."""
        b, n, _ = boxes.shape
        scores, deltas = stage.box_head(self._pool(levels, boxes, BOX_SIZE))
        return scores.reshape(b, n, -1), deltas.reshape(b, n, -1, 4)

    def mask_logits(
        self,
        stage: Stage,
        levels: Sequence[Float[Array, "b _h _w d"]],
        boxes: Float[Array, "b n 4"],
        labels: Int[Array, "b n"],
    ) -> Float[Array, "b n size size"]:
        """Return a stage's mask logits for the class of each box."""
        b, n, _ = boxes.shape
        assert stage.mask_head is not None, "the detector was built without masks"
        logits = stage.mask_head.of_class(self._pool(levels, boxes, MASK_SIZE), labels.reshape(-1))
        return logits.reshape(b, n, *logits.shape[1:])

    def _pool(self, levels, boxes, bins):
        """Apply RoIAlign to the boxes of every image: `(b n) bins bins c`. The coarsest level, p6, is not read."""
        strides = self.config.strides[:4]
        pooled = pool_boxes(tuple(levels)[:4], boxes, strides=strides, size=(bins, bins))
        return pooled.reshape(-1, *pooled.shape[2:])


def refine(
    boxes: Float[Array, "b n 4"],
    logits: Float[Array, "b n classes"],
    deltas: Float[Array, "b n sets 4"],
    stage: StageConfig,
    size: Float[Array, "b 2"],
    labels: Int[Array, "b n"] | None = None,
) -> Float[Array, "b n 4"]:
    """Move each box by the deltas of its best foreground class. No gradient flows through.

    Args:
        boxes: The boxes that the deltas were predicted for.
        logits: Class logits, background last.
        deltas: Deltas for each class, or one set for all.
        stage: Gives the deltas' standard deviations.
        size: Height and width of each image; boxes are clipped to it.
        labels: True classes of the boxes, if known (in training). Where they are foreground, they replace the best
            class.
    """
    boxes, logits, deltas = jax.lax.stop_gradient((boxes, logits, deltas))
    chosen = jnp.argmax(logits[..., :-1], -1)
    if labels is not None:
        chosen = jnp.where(labels < logits.shape[-1] - 1, labels, chosen)
    return decode_deltas(boxes, deltas_of(deltas, chosen), stage.stds, size[:, None])


def deltas_of(deltas: Float[Array, "*n sets 4"], labels: Int[Array, "*n"]) -> Float[Array, "*n 4"]:
    """Pick each box's deltas by class, or the only set there is."""
    index = jnp.minimum(labels, deltas.shape[-2] - 1)
    return jnp.take_along_axis(deltas, index[..., None, None], -2)[..., 0, :]


def detections(
    boxes: Float[Array, "b n 4"],
    logits: Float[Array, "b n classes"],
    deltas: Float[Array, "b n sets 4"],
    valid: Bool[Array, "b n"],
    stage: StageConfig,
    size: Float[Array, "b 2"],
    scale: Float[Array, "b 2"],
    config: DetectorConfig,
) -> Detections:
    """Turn the last stage's boxes into detections: decode, clip, undo the resize, drop duplicates within classes.

    Args:
        boxes: The boxes that the deltas were predicted for.
        logits: Class logits, mean over stages, background last.
        deltas: Deltas for each class, or one set for all.
        valid: Marks the boxes that are not padding.
        stage: Gives the deltas' standard deviations.
        size: Height and width of each image; boxes are clipped to it.
        scale: Factors along width and height by which each image was resized.
        config: Gives thresholds and sizes.
    """
    b, n, classes = logits.shape[0], logits.shape[1], logits.shape[2] - 1
    scores = jax.nn.softmax(logits, -1)[..., :-1].reshape(b, -1)
    usable = (scores > config.score) & jnp.repeat(valid, classes, axis=1)
    top = best(scores, usable, min(config.candidates, n * classes))
    row, label = top.indices // classes, (top.indices % classes).astype(jnp.int32)
    base = jnp.take_along_axis(boxes, row[..., None], 1)
    offsets = deltas_of(jnp.take_along_axis(deltas, row[..., None, None], 1), label)
    decoded = decode_deltas(base, offsets, stage.stds, size[:, None])
    decoded = decoded / jnp.concatenate([scale, scale], -1)[:, None]
    kept = nms(decoded, top.scores, top.valid, config.nms, config.detections, groups=label)
    pick = lambda x: jnp.take_along_axis(x, kept.indices, 1)  # noqa: E731
    chosen = jnp.take_along_axis(decoded, kept.indices[..., None], 1)
    chosen = jnp.where(kept.valid[..., None], chosen, 0)
    return Detections(chosen, kept.scores, pick(label), kept.valid, None)

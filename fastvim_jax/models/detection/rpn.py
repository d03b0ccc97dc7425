"""Define the region proposal network: scores and deltas of anchors, their training targets, and proposals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Bool, Float

from fastvim_jax.layers.linear import promote_parameters
from fastvim_jax.models.detection.anchors import inside, level_anchors, valid_anchors
from fastvim_jax.models.detection.boxes import decode_deltas, encode_deltas, not_empty
from fastvim_jax.models.detection.config import ProposalConfig
from fastvim_jax.models.detection.matching import assign, choose
from fastvim_jax.models.detection.nms import Best, best, suppress
from fastvim_jax.precision import Precision

UNIT = (1.0, 1.0, 1.0, 1.0)
"""Standard deviations of the anchors' deltas: they are used as they are."""


class RPNHead(nnx.Module):
    """Shared convolutions over every level, then one score and four deltas for each anchor."""

    def __init__(
        self,
        width: int,
        *,
        convs: int,
        conv_width: int,
        anchors: int,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        p = precision

        def conv(width: int, out: int, size: int) -> nnx.Conv:
            return nnx.Conv(
                width,
                out,
                (size, size),
                kernel_init=normal(0.01),
                dtype=p.compute,
                param_dtype=p.params,
                precision=p.lax,
                promote_dtype=promote_parameters,
                rngs=rngs,
            )

        widths = [width] + [conv_width] * convs
        self.convs = nnx.List(conv(a, b, 3) for a, b in itertools.pairwise(widths))
        self.cls = conv(conv_width, anchors, 1)
        self.reg = conv(conv_width, 4 * anchors, 1)

    def __call__(
        self, levels: Sequence[Float[Array, "b _h _w d"]]
    ) -> tuple[list[Float[Array, "b _n"]], list[Float[Array, "b _n 4"]]]:
        """Return logits and deltas of each level's anchors, in the order row, column, ratio; float32 or wider."""
        scores, deltas = [], []
        for x in levels:
            for conv in self.convs:
                x = jax.nn.relu(conv(x))
            wide = jnp.promote_types(x.dtype, jnp.float32)
            scores.append(self.cls(x).astype(wide).reshape(len(x), -1))
            deltas.append(self.reg(x).astype(wide).reshape(len(x), -1, 4))
        return scores, deltas


class Anchors(NamedTuple):
    """Anchors of all levels, one level after the other.

    Attributes:
        boxes: (x1, y1, x2, y2) in pixels, float64.
        valid: marks the anchors of cells that the padded image reaches.
        counts: anchors of each level.
    """

    boxes: Float[np.ndarray, "n 4"]
    valid: Bool[np.ndarray, " n"]
    counts: tuple[int, ...]


def make_anchors(
    grids: Sequence[tuple[int, int]],
    strides: Sequence[int],
    padded: tuple[int, int],
    config: ProposalConfig,
) -> Anchors:
    """Build the anchors of feature maps of these sizes under an image padded to `padded` (height, width)."""
    boxes = [
        level_anchors(grid, stride, config.scale, config.ratios)
        for grid, stride in zip(grids, strides, strict=True)
    ]
    valid = [
        valid_anchors(grid, stride, padded, len(config.ratios))
        for grid, stride in zip(grids, strides, strict=True)
    ]
    return Anchors(np.concatenate(boxes), np.concatenate(valid), tuple(map(len, boxes)))


class AnchorTargets(NamedTuple):
    """Training targets of the anchors of one image.

    Attributes:
        sampled: marks the anchors that enter the loss.
        positive: marks the sampled anchors that belong to an object.
        deltas: from an anchor to its object; only the entries of positive anchors are used.
    """

    sampled: Bool[Array, " n"]
    positive: Bool[Array, " n"]
    deltas: Float[Array, "n 4"]


def anchor_targets(
    anchors: Anchors,
    size: Float[Array, " 2"],
    objects: Float[Array, "m 4"],
    present: Bool[Array, " m"],
    priority: Float[Array, "2 n"],
    config: ProposalConfig,
) -> AnchorTargets:
    """Assign and sample the anchors of one image. Anchors that leave the image (`size`: height, width) take no part."""
    boxes = jnp.asarray(anchors.boxes, objects.dtype)
    usable = jnp.asarray(anchors.valid) & inside(boxes, size)
    assigned = assign(
        boxes,
        usable,
        objects,
        present,
        positive=config.positive,
        negative=config.negative,
        low_quality=config.negative,
    ).objects
    positive, negative = choose(assigned, priority, count=config.samples, fraction=config.fraction)
    if not len(objects):
        return AnchorTargets(positive | negative, positive, jnp.zeros_like(boxes))
    matched = objects[jnp.maximum(assigned - 1, 0)]
    # Of padding the sides are 0, whose logarithm would make gradients NaN even where it is masked out.
    matched = jnp.where(positive[:, None], matched, boxes)
    return AnchorTargets(positive | negative, positive, encode_deltas(boxes, matched, UNIT))


class Proposals(NamedTuple):
    """The best boxes of each image, by score; `valid` marks those that exist."""

    boxes: Float[Array, "b k 4"]
    scores: Float[Array, "b k"]
    valid: Bool[Array, "b k"]


def propose(
    scores: Sequence[Float[Array, "b _n"]],
    deltas: Sequence[Float[Array, "b _n 4"]],
    anchors: Anchors,
    size: Float[Array, "b 2"],
    *,
    before: int,
    after: int,
    threshold: float,
) -> Proposals:
    """Turn scores and deltas into proposals. No gradient flows through them.

    On each level, the best `before` anchors are decoded and clipped to the image, and non-maximum suppression drops
    duplicates among them. The best `after` of all levels remain.

    Args:
        scores: Logits of each level.
        deltas: Deltas of each level.
        anchors: From `make_anchors`.
        size: Height and width of each image.
        before: Boxes per level before suppression.
        after: Boxes per image after suppression.
        threshold: Largest IoU of two proposals of a level.
    """
    scores, deltas = jax.lax.stop_gradient((list(scores), list(deltas)))
    starts = np.concatenate([[0], np.cumsum(anchors.counts)])
    boxes: list[Array] = []
    found: list[Best] = []
    for level, (logits, offsets) in enumerate(zip(scores, deltas, strict=True)):
        # Levels with fewer anchors are padded, so that one loop suppresses on all levels at once.
        top = best(jax.nn.sigmoid(logits), jnp.ones(logits.shape, bool), before)
        base = jnp.asarray(anchors.boxes[starts[level] : starts[level + 1]], offsets.dtype)
        chosen = jnp.take_along_axis(offsets, top.indices[..., None], 1)
        boxes.append(decode_deltas(base[top.indices], chosen, UNIT, size[:, None]))
        found.append(top)
    stacked = jnp.stack(boxes, 1)
    valid = jnp.stack([top.valid for top in found], 1) & not_empty(stacked)
    keep = suppress(stacked, valid, threshold)
    flat = lambda x: x.reshape(len(x), -1, *x.shape[3:])  # noqa: E731
    last = best(flat(jnp.stack([top.scores for top in found], 1)), flat(keep), after)
    return Proposals(
        jnp.take_along_axis(flat(stacked), last.indices[..., None], 1), last.scores, last.valid
    )

"""What the detectors promise for every input: exact RoIAlign at any aspect ratio, greedy suppression, sound configs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.errors import UserError
from fastvim_jax.models import VisionMambaConfig, cascade_mask_rcnn
from fastvim_jax.models.detection import DetectorConfig, ProposalConfig, StageConfig
from fastvim_jax.models.detection.heads import MaskHead
from fastvim_jax.models.detection.nms import nms
from fastvim_jax.models.detection.roi_align import box_levels, cell_bound, roi_align
from fastvim_jax.models.detection.rpn import AnchorTargets
from fastvim_jax.precision import Precision
from fastvim_jax.training.detection.losses import Sampled, boxes_of_next_stage, rpn_losses

SIZE = 256
STRIDES = (4, 8, 16, 32)


def extreme_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw boxes inside the image of every size and aspect ratio, some as wide as the image and a pixel high."""
    sides = np.exp(rng.uniform(np.log(0.5), np.log(SIZE), (count, 2)))
    sides[: count // 4, 0] = SIZE
    sides[0] = SIZE  # the one level that draws reach in most runs only
    low = rng.uniform(0, 1, (count, 2)) * (SIZE - sides)
    return np.concatenate([low, low + sides], -1).astype(np.float32)


@pytest.mark.drawn("more of the models", one_in=6)
def test_no_box_reads_more_cells_than_the_bound(rng):
    grids = [(SIZE // s, SIZE // s) for s in STRIDES]
    boxes = jnp.asarray(extreme_boxes(rng, 200))
    maps = [jnp.asarray(rng.standard_normal((*grid, 2)), jnp.float32) for grid in grids]
    level = box_levels(boxes, len(STRIDES))
    assert len(np.unique(level)) == 3  # level 3 begins at 448 pixels
    pool = partial(roi_align, maps, boxes, level, strides=STRIDES, size=(7, 7))
    bound = cell_bound(grids, STRIDES)
    assert bound < max(h * w for h, w in grids)
    everything = jax.jit(partial(pool, cells=max(h * w for h, w in grids)))()
    np.testing.assert_allclose(
        jax.jit(partial(pool, cells=bound))(), everything, rtol=1e-5, atol=1e-6
    )


def greedy(boxes, scores, valid, groups, threshold):
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        low = np.maximum(boxes[kept, :2], boxes[i, :2]).reshape(-1, 2)
        high = np.minimum(boxes[kept, 2:], boxes[i, 2:]).reshape(-1, 2)
        shared = np.maximum(high - low, 0).prod(1)
        area = lambda b: (b[..., 2:] - b[..., :2]).prod(-1)  # noqa: E731
        iou = shared / np.maximum(area(boxes[kept]) + area(boxes[i]) - shared, 1e-6)
        if valid[i] and not ((iou > threshold) & (groups[kept] == groups[i])).any():
            kept.append(int(i))
    return kept


@pytest.mark.drawn("more of the models", one_in=6)
def test_suppression_is_the_greedy_one(rng):
    suppress = jax.jit(partial(nms, threshold=0.5, k=60))
    for _ in range(5):
        low = rng.integers(0, 40, (60, 2))
        boxes = np.concatenate([low, low + rng.integers(10, 40, (60, 2))], -1).astype(np.float32)
        scores = rng.integers(0, 20, 60).astype(np.float32)  # many are equal
        valid, groups = rng.random(60) < 0.9, rng.integers(0, 2, 60).astype(np.int32)
        found = suppress(boxes, scores, valid, groups=groups)
        kept = greedy(boxes, scores, valid, groups, 0.5)
        assert list(found.indices[found.valid]) == kept
        few = nms(*map(jnp.asarray, (boxes, scores, valid)), 0.5, 3, groups=jnp.asarray(groups))
        assert list(few.indices) == kept[:3]


def test_configs_that_cannot_be_built_are_refused():
    backbone = VisionMambaConfig(image_size=64, embed_dim=16, depth=2)
    assert cascade_mask_rcnn(backbone).backbone.out_indices == (1,)
    with pytest.raises(UserError, match="reads one block"):
        DetectorConfig(backbone)
    with pytest.raises(UserError, match="need 16"):
        cascade_mask_rcnn(VisionMambaConfig(image_size=64, embed_dim=16, depth=2, patch_size=8))
    with pytest.raises(UserError, match="stages is empty"):
        cascade_mask_rcnn(backbone, stages=())
    with pytest.raises(UserError, match="score"):
        cascade_mask_rcnn(backbone, score=2.0)


def test_gradients_of_a_cell_that_many_boxes_read_are_added_up_wide(key):
    x = jax.random.normal(key, (16, 16, 4))
    boxes = jnp.tile(jnp.asarray([[4.0, 4, 40, 40]]), (600, 1))

    @jax.jit
    @jax.grad
    def gradient(x):
        level = jnp.zeros(len(boxes), jnp.int32)
        y = roi_align([x], boxes, level, strides=(4,), size=(7, 7), cells=256)
        return y.astype(jnp.float32).sum()

    exact, half = gradient(x), gradient(x.astype(jnp.bfloat16)).astype(jnp.float32)
    assert float(jnp.abs(half - exact).max() / jnp.abs(exact).max()) < 0.01


def test_gradients_are_added_to_no_cell_that_a_box_does_not_read():
    """Give the entries that fill a box up to the bound no cell: all boxes would add their zeros to the same one.

    Those zeros are products with weights of 0. With infinite gradients they are NaN, and can be seen.
    """
    features, boxes = jnp.ones((16, 20, 1)), jnp.asarray([[3.0, 2, 6, 5]])

    def pool(features):
        level = jnp.zeros(1, int)
        return roi_align([features], boxes, level, strides=(1,), size=(2, 2), cells=40)

    pooled, pull = jax.vjp(pool, features)
    np.testing.assert_allclose(pooled, 1, rtol=1e-6)
    (infinite,) = pull(jnp.full_like(pooled, jnp.inf))
    read = np.zeros((16, 20, 1), bool)
    read[1:6, 2:7] = True  # from 1.5 and 2.5 cells to 4.5 and 5.5
    assert not np.asarray(infinite)[~read].any()
    (finite,) = pull(jnp.ones_like(pooled))
    np.testing.assert_allclose(finite.sum(), 4, rtol=1e-6)


def test_masks_of_one_class_are_those_of_all_classes(rng):
    precision = Precision("float32", "float32")
    head = MaskHead(6, 5, convs=1, conv_width=8, eps=1e-6, precision=precision, rngs=nnx.Rngs(0))
    head.logits.bias[...] = jnp.arange(5.0)
    x = jnp.asarray(rng.standard_normal((4, 3, 2, 6)), jnp.float32)
    labels = jnp.asarray([3, 0, 4, 3])
    found = head.of_class(x, labels)
    assert found.shape == (4, 6, 4)
    every = head(x)
    np.testing.assert_allclose(found, every[jnp.arange(4), ..., labels], rtol=1e-5, atol=1e-6)


def test_a_box_moved_out_of_the_image_stays_for_the_next_stage():
    """Keep a box without area, as the reference does, and remove ground truth."""
    boxes = jnp.asarray([[[0.0, 0, 8, 8], [4, 4, 12, 12], [2, 2, 6, 6], [0, 0, 0, 0]]])
    marks = jnp.asarray([[True, False, True, False]])
    sampled = Sampled(
        boxes, jnp.asarray([[0, 1, 0, 1]]), boxes, jnp.zeros((1, 4), jnp.int32), positive=marks,
        valid=jnp.asarray([[True, True, True, False]]), is_object=jnp.asarray([[True, False, False, False]]),
    )  # fmt: skip
    deltas = (
        jnp.zeros((1, 4, 1, 4)).at[0, 1, 0, 0].set(100.0)
    )  # The second box leaves to the right.
    size = jnp.asarray([[16.0, 16.0]])
    moved, valid = boxes_of_next_stage(sampled, jnp.zeros((1, 4, 2)), deltas, StageConfig(), size)
    assert np.asarray(valid).tolist() == [[False, True, True, False]]
    assert moved[0, 1].tolist() == [16, 4, 16, 12] and moved[0, 2].tolist() == [2, 2, 6, 6]


def test_an_image_without_objects_counts_one_anchor_more_in_the_proposals_losses(rng):
    """Divide as the reference does, in which an image has at least one positive anchor."""
    scores, deltas = rng.normal(size=(2, 6)), rng.normal(size=(2, 6, 4))
    sampled = np.asarray([[1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 0]], bool)
    positive = np.asarray([[1, 0, 1, 0, 0, 0], [0] * 6], bool)
    wanted = rng.normal(size=(2, 6, 4))
    entropy = np.log1p(np.exp(np.where(positive, -scores, scores)))
    apart = np.abs(deltas - wanted)
    smooth = np.where(apart < 1 / 9, apart**2 * 4.5, apart - 1 / 18).sum(-1)
    found = rpn_losses(
        *(jnp.asarray(x, jnp.float32) for x in (scores, deltas)),
        AnchorTargets(
            jnp.asarray(sampled), jnp.asarray(positive), jnp.asarray(wanted, jnp.float32)
        ),
        ProposalConfig(),
    )
    np.testing.assert_allclose(found["rpn_cls"], entropy[sampled].sum() / 8, rtol=1e-5)
    np.testing.assert_allclose(found["rpn_box"], smooth[positive].sum() / 8, rtol=1e-5)

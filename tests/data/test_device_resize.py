"""Crops on the device: resized as Pillow resizes them, from boxes of the host's law; draws of the host's law."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from fastvim_jax.data import ClassificationData, transforms
from fastvim_jax.data.device_draws import draw_augmentation
from fastvim_jax.data.device_resize import crop_resize, draw_boxes
from fastvim_jax.data.randaugment import NAMES, NOTHING, SIGNED

UNLIKELY = 1e-5  # a run in a hundred thousand may fail by chance


def test_crops_are_pillows(rng: np.random.Generator) -> None:
    """Compare crops with Pillow's: boxes smaller and larger than the result, one pixel, the whole image.

    They differ where a half is rounded, by two levels at most.
    """
    images = rng.integers(0, 256, (24, 40, 52, 3), dtype=np.uint8)
    images[:8] = np.asarray(images[:8] > 128) * 255  # what overshoots is clipped in between
    for i in range(16, 24):  # nothing overshoots
        coarse = Image.fromarray(images[i, :5, :6] // 2 + 64)
        images[i] = np.asarray(coarse.resize((52, 40), Image.Resampling.BILINEAR))
    boxes = []
    for _ in images:
        left, top = int(rng.integers(0, 52)), int(rng.integers(0, 40))
        boxes.append((left, top, int(rng.integers(left, 52)) + 1, int(rng.integers(top, 40)) + 1))
    boxes[0], boxes[1], boxes[2] = (0, 0, 52, 40), (7, 9, 8, 10), (3, 4, 21, 16)
    size = (12, 18)
    ours = jax.jit(lambda i, b: crop_resize(i, b, size))(images, np.asarray(boxes, np.float32))
    assert ours.dtype == jnp.uint8 and ours.shape == (24, *size, 3)
    np.testing.assert_array_equal(ours[2], images[2, 4:16, 3:21])  # nothing to resize
    offs = []
    for i, out in enumerate(np.asarray(ours).astype(int)):
        crop = Image.fromarray(images[i]).crop(boxes[i])
        if i < 16:  # rows first, whatever Pillow would choose
            crop = crop.resize((size[1], crop.height), Image.Resampling.BICUBIC)
        offs.append(np.abs(out - np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC))))
    assert np.max(offs) <= 2
    assert np.mean(offs[:16]) < 0.01 and np.mean(offs[16:]) < 0.15  # 0.001 and 0.014 on average


@pytest.mark.drawn("data pipelines", one_in=6)
def test_boxes_follow_the_hosts_law(rng: np.random.Generator, key: jax.Array) -> None:
    scale, aspect, count = (0.08, 1.0), (3 / 4, 4 / 3), 4000
    draw = jax.jit(lambda k, sizes: draw_boxes(k, sizes, scale=scale, aspect=aspect))
    for height, width in ((400, 500), (300, 100)):
        sizes = jnp.asarray([[height, width]] * count, jnp.int32)
        ours = np.asarray(draw(key, sizes))
        theirs = np.array(
            [transforms._random_box(width, height, rng, scale, aspect) for _ in range(count)]
        )
        left, top, right, bottom = ours.T
        assert (left >= 0).all() and (top >= 0).all()
        assert (right <= width).all() and (bottom <= height).all()
        assert (ours == np.round(ours)).all()
        for mine, other in (
            (left, theirs[:, 0]),
            (top, theirs[:, 1]),
            (right - left, theirs[:, 2]),
            (bottom - top, theirs[:, 3]),
            ((right - left) * (bottom - top), theirs[:, 2] * theirs[:, 3]),
        ):
            assert stats.ks_2samp(mine, other).pvalue > UNLIKELY
    # No box of nine tenths of the area fits a strip: the centred one of the longest aspect.
    strip = draw_boxes(key, jnp.asarray([[100, 3000]] * 5), scale=(0.9, 1.0), aspect=aspect)
    np.testing.assert_array_equal(strip, [[1433, 0, 1566, 100]] * 5)
    assert transforms._random_box(3000, 100, rng, (0.9, 1.0), aspect) == (1433, 0, 133, 100)


def test_operations_and_jitter_follow_the_hosts_law(key: jax.Array) -> None:
    config = ClassificationData(rand_augment=9.0, augment_on="device", flip=0.0)
    config = dataclasses.replace(config, colour_jitter=0.3)
    count = 6000
    drawn = jax.device_get(jax.jit(lambda k: draw_augmentation(k, config, count))(key))
    operation, level = drawn["operation"].ravel(), drawn["level"].ravel()
    on = operation != NOTHING
    assert stats.binomtest(int(on.sum()), on.size, 0.5).pvalue > UNLIKELY
    counts = np.bincount(operation[on], minlength=15)
    assert len(counts) == 15 and stats.chisquare(counts).pvalue > UNLIKELY
    levels = np.abs(level[on])
    assert stats.binomtest(int((levels == 10).sum()), levels.size, 0.02275).pvalue > UNLIKELY
    below = levels[levels < 10]
    assert stats.kstest(below, stats.truncnorm(-18, 2, 9, 0.5).cdf).pvalue > UNLIKELY
    signed = np.isin(operation, [NAMES.index(name) for name in SIGNED]) & on
    assert not (level[on & ~signed] < 0).any()
    negative = int((level[signed] < 0).sum())
    assert stats.binomtest(negative, int(signed.sum()), 0.5).pvalue > UNLIKELY
    kind, factor = drawn["jitter"], drawn["factor"]
    assert (np.sort(kind, 1) == [0, 1, 2]).all()
    assert stats.chisquare(np.bincount(kind @ [9, 3, 1])[[5, 7, 11, 15, 19, 21]]).pvalue > UNLIKELY
    assert stats.kstest(factor.ravel(), stats.uniform(0.7, 0.6).cdf).pvalue > UNLIKELY

"""RandAugment's operations against their definitions, and the law by which they are drawn."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import ClassificationData, randaugment
from fastvim_jax.data.augment import train_transform
from fastvim_jax.data.randaugment import OPERATIONS, SIGNED, colour_jitter, rand_augment


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)


def _apply(name: str, pixels: np.ndarray, level: float) -> np.ndarray:
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), float(level))).astype(int)


def test_there_are_fifteen() -> None:
    assert len(OPERATIONS) == 15 and SIGNED < set(OPERATIONS)


def test_pointwise_operations(pixels: np.ndarray) -> None:
    v = pixels.astype(int)
    np.testing.assert_array_equal(_apply("invert", pixels, 9), 255 - v)
    for level, bits in ((0, 4), (2.6, 3), (9, 1), (10, 0)):
        kept = v >> (8 - bits) << (8 - bits)
        np.testing.assert_array_equal(_apply("posterize", pixels, level), kept)
    for level, threshold in ((0, 256), (5, 128), (9, 26), (10, 0)):
        expected = np.where(v < threshold, v, 255 - v)
        np.testing.assert_array_equal(_apply("solarize", pixels, level), expected)
    for level, added in ((0, 0), (9, 99), (10, 110)):
        expected = np.where(v < 128, np.minimum(v + added, 255), v)
        np.testing.assert_array_equal(_apply("solarize_add", pixels, level), expected)


def test_histogram_operations(rng: np.random.Generator) -> None:
    narrow = rng.integers(60, 120, (40, 40, 3), dtype=np.uint8)
    stretched = _apply("auto_contrast", narrow, 9)
    assert stretched.min() == 0 and stretched.max() == 255
    low, high = narrow.reshape(-1, 3).min(0), narrow.reshape(-1, 3).max(0)
    expected = (narrow.astype(float) - low) * 255 / (high - low)
    np.testing.assert_allclose(stretched, expected, atol=1)
    equal = _apply("equalize", narrow, 9)
    assert equal.min() == 0 and equal.max() > 245 and abs(equal.mean() - 127) < 12


def test_enhancements_blend_with_their_degenerate_form(pixels: np.ndarray) -> None:
    v = pixels.astype(float)
    grey = np.asarray(Image.fromarray(pixels).convert("L")).astype(float)
    degenerate = {
        "brightness": np.zeros_like(v),
        "contrast": np.full_like(v, np.floor(grey.mean() + 0.5)),
        "colour": np.repeat(grey[..., None], 3, -1),
    }
    for name, base in degenerate.items():
        for level in (-10, -4, 4, 9):
            factor = max(0.1, 1 + 0.09 * level)
            expected = np.clip(base + factor * (v - base), 0, 255)
            np.testing.assert_allclose(_apply(name, pixels, level), expected, atol=1.01)
    smooth, sharp = (_apply("sharpness", pixels, level) for level in (-9, 9))
    assert np.diff(smooth, axis=0).std() < np.diff(v, axis=0).std() < np.diff(sharp, axis=0).std()
    for name in (*degenerate, "sharpness"):
        np.testing.assert_array_equal(_apply(name, pixels, 0), pixels)


def test_geometric_operations() -> None:
    y, x = np.mgrid[:40, :40]
    ramp = np.stack([6 * x, 6 * y, np.full_like(x, 255)], -1).astype(np.uint8)
    inner = np.s_[12:28, 12:28]
    cx, cy = x + 0.5, y + 0.5
    angle = np.deg2rad(30 * 0.5)
    rx, ry = x - 19.5, y - 19.5
    sources = {
        # Turning by a positive angle is counter-clockwise on the screen, whose y runs down.
        "rotate": (19.5 + np.cos(angle) * rx - np.sin(angle) * ry,
                   19.5 + np.sin(angle) * rx + np.cos(angle) * ry),
        "shear_x": (x + 0.15 * cy, y),
        "shear_y": (x, y + 0.15 * cx),
        "translate_x": (x + 9.0, y),
        "translate_y": (x, y + 9.0),
    }  # fmt: skip
    for name, (sx, sy) in sources.items():
        out = _apply(name, ramp, 5)
        np.testing.assert_allclose(out[inner][..., 0], 6 * sx[inner], atol=2, err_msg=name)
        np.testing.assert_allclose(out[inner][..., 1], 6 * sy[inner], atol=2, err_msg=name)
    moved = _apply("translate_x", ramp, 10)
    assert (moved[:, -18:] == (124, 116, 104)).all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_takes_greyscale_and_colour(name: str, pixels: np.ndarray) -> None:
    for image in (Image.fromarray(pixels), Image.fromarray(pixels[..., 0])):
        for level in (-10, 10) if name in SIGNED else (0, 10):
            out = OPERATIONS[name](image, float(level))
            assert (out.mode, out.size) == (image.mode, image.size)


def test_operations_are_drawn_by_their_law(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, float]] = []

    def spy(name: str):
        return lambda image, level: (drawn.append((name, level)), image)[1]

    monkeypatch.setattr(randaugment, "OPERATIONS", {name: spy(name) for name in OPERATIONS})
    image = Image.new("RGB", (2, 2))
    images = 6000
    for _ in range(images):
        rand_augment(image, rng, magnitude=9.0, std=0.5)
    # 2 layers x 0.5: as many applications as images.
    assert abs(len(drawn) - images) < 5 * np.sqrt(images * 0.5)
    counts = Counter(name for name, _ in drawn)
    mean = len(drawn) / 15
    assert all(abs(counts[name] - mean) < 5 * np.sqrt(mean) for name in OPERATIONS)
    levels = np.abs([level for _, level in drawn])
    # A normal around 9 with deviation 0.5, its upper 2.3 % clipped to 10.
    assert abs(np.median(levels) - 9) < 0.05 and levels.max() == 10
    assert abs(levels.std() - 0.49) < 0.03
    assert abs((levels == 10).mean() - 0.0228) < 0.012
    negative = [level < 0 for name, level in drawn if name in SIGNED]
    assert abs(np.mean(negative) - 0.5) < 0.05
    assert not any(level < 0 for name, level in drawn if name not in SIGNED)


def test_colour_jitter_stays_within_its_factors(rng: np.random.Generator) -> None:
    # On a flat grey image contrast and saturation do nothing: what is left is brightness.
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    values = [np.asarray(colour_jitter(grey, rng, strength=0.3))[0, 0, 0] for _ in range(500)]
    assert 69 <= min(values) < 75 and 125 < max(values) <= 130
    assert np.asarray(colour_jitter(grey, rng, strength=0.0)).mean() == 100


def test_the_training_transform_uses_them(pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    plain = ClassificationData(image_size=(20, 24), crop="resize", flip=0.0)
    for options in ({"rand_augment": 9.0}, {"colour_jitter": 0.3}):
        config = dataclasses.replace(plain, **options)
        outs = [train_transform(image, config, np.random.default_rng(s)) for s in range(20)]
        changed = sum(not np.array_equal(out, pixels) for out in outs)
        assert changed > 5
        again = train_transform(image, config, np.random.default_rng(7))
        np.testing.assert_array_equal(again, outs[7])

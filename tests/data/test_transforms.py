"""Each transform against its definition."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import ClassificationData, transforms
from fastvim_jax.data.augment import train_transform


def _coordinates(height: int, width: int) -> Image.Image:
    """Return an image that tells where each pixel came from: red is 2x, green 2y, blue 255."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([2 * x, 2 * y, np.full_like(x, 255)], -1).astype(np.uint8))


def test_random_box_follows_its_law(rng: np.random.Generator) -> None:
    scale, aspect = (0.08, 1.0), (3 / 4, 4 / 3)
    boxes = np.array([transforms._random_box(500, 400, rng, scale, aspect) for _ in range(4000)])
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 500).all() and (top + height <= 400).all()
    ratio, area = width / height, width * height / (500 * 400)
    assert ratio.min() > 0.74 and ratio.max() < 1.35
    assert area.min() > 0.075 and area.max() <= 1.0
    # Boxes this small always fit, so within them nothing but the uniform draw acts.
    small = area[area < 0.5]
    assert abs(np.mean(small) - (0.08 + 0.5) / 2) < 4 * 0.121 / np.sqrt(len(small))
    log_ratio = np.log(ratio[area < 0.5])
    assert abs(log_ratio.mean()) < 4 * log_ratio.std() / np.sqrt(len(small))
    assert abs(log_ratio.std() - 2 * np.log(4 / 3) / np.sqrt(12)) < 0.02
    # Where the box lies: uniform over what its size leaves free.
    free = 400 - height
    position = top[free > 20] / free[free > 20]
    assert abs(position.mean() - 0.5) < 4 * 0.289 / np.sqrt(len(position))


def test_box_falls_back_to_the_centre(rng: np.random.Generator) -> None:
    # A strip 30 times as wide as high admits no box of these areas and aspects.
    box = transforms._random_box(3000, 100, rng, (0.9, 1.0), (3 / 4, 4 / 3))
    assert box == ((3000 - 133) // 2, 0, 133, 100)


def test_random_resized_crop_shows_the_box() -> None:
    image = _coordinates(100, 120)
    box = transforms._random_box(120, 100, np.random.default_rng(5), (0.2, 0.9), (3 / 4, 4 / 3))
    out = transforms.random_resized_crop(
        image, (24, 32), np.random.default_rng(5), scale=(0.2, 0.9)
    )
    left, top, width, height = box
    pixels = np.asarray(out).astype(float)
    assert pixels.shape == (24, 32, 3)
    # The map from output pixel to source is linear: its middle is the box's middle.
    assert abs(pixels[..., 0].mean() / 2 - (left + (width - 1) / 2)) < 0.5
    assert abs(pixels[..., 1].mean() / 2 - (top + (height - 1) / 2)) < 0.5
    assert pixels[..., 2].min() == 255


def test_pad_and_shift_moves_and_fills_with_zeros(rng: np.random.Generator) -> None:
    image = _coordinates(10, 12)
    offsets = set()
    for _ in range(300):
        out = np.asarray(transforms.pad_and_shift(image, (10, 12), rng, pad=2)).astype(int)
        inside = out[..., 2] == 255
        y, x = np.nonzero(inside)
        dy, dx = out[y[0], x[0], 1] // 2 - y[0], out[y[0], x[0], 0] // 2 - x[0]
        offsets.add((int(dy), int(dx)))
        expected = np.zeros_like(out)
        rows, cols = np.mgrid[:10, :12]
        source = np.stack([2 * (cols + dx), 2 * (rows + dy), np.full_like(rows, 255)], -1)
        ok = (0 <= rows + dy) & (rows + dy < 10) & (0 <= cols + dx) & (cols + dx < 12)
        expected[ok] = source[ok]
        np.testing.assert_array_equal(out, expected)
    assert offsets == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


def test_flip_has_its_probability(rng: np.random.Generator) -> None:
    image = _coordinates(4, 6)
    flipped = 0
    for _ in range(1000):
        out = np.asarray(transforms.horizontal_flip(image, rng, probability=0.3))
        mirrored = np.array_equal(out, np.asarray(image)[:, ::-1])
        assert mirrored or np.array_equal(out, np.asarray(image))
        flipped += mirrored
    assert 230 < flipped < 370
    assert transforms.horizontal_flip(image, rng, probability=0.0) is image


@pytest.mark.parametrize(
    ("height", "width", "expected_scale"), [(300, 400, 256 / 300), (500, 260, 256 / 260)]
)
def test_eval_crop_is_resize_256_and_centre_224(height, width, expected_scale) -> None:
    gradient = np.zeros((height, width, 3), np.float64)
    gradient[..., 0] = np.linspace(0, 255, width)
    gradient[..., 1] = np.linspace(0, 255, height)[:, None]
    image = Image.fromarray(gradient.astype(np.uint8))
    out = transforms.resize_and_centre_crop(image, (224, 224), ratio=0.875)
    assert out.shape == (224, 224, 3)
    resized = image.resize(
        (round(width * expected_scale), round(height * expected_scale)), Image.Resampling.BICUBIC
    )
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    expected = resized.crop((left, top, left + 224, top + 224))
    np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))


@pytest.mark.parametrize("ratio", [0.875, 0.9, 1.0])
def test_eval_crop_reaches_any_size_from_any_size(ratio: float, rng: np.random.Generator) -> None:
    for _ in range(40):
        height, width, out_h, out_w = (int(v) for v in rng.integers(1, 90, size=4))
        image = Image.fromarray(np.full((height, width, 3), 77, np.uint8))
        out = transforms.resize_and_centre_crop(image, (out_h, out_w), ratio=ratio)
        assert out.shape[:2] == (out_h, out_w)
        # Flat stays flat: nothing outside the image was taken.
        assert np.unique(np.asarray(out)).tolist() == [77]


def test_whole_image_at_ratio_one(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
    out = transforms.resize_and_centre_crop(Image.fromarray(pixels), (8, 8), ratio=1.0)
    np.testing.assert_array_equal(out, pixels[..., None])


def test_train_transform_takes_the_configured_crop(rng: np.random.Generator) -> None:
    image = _coordinates(20, 20)
    config = ClassificationData(image_size=(12, 16), flip=0.0)
    for crop in ("random_resized", "pad_shift", "resize"):
        out = train_transform(image, dataclasses.replace(config, crop=crop), rng)
        assert out.shape == (12, 16, 3) and out.dtype == np.uint8
    resized = np.asarray(image.resize((16, 12), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(out, resized)
    grey = train_transform(
        image.convert("L"), dataclasses.replace(config, channels=1, mean=(0.5,), std=(0.5,)), rng
    )
    assert grey.shape == (12, 16, 1)


@pytest.mark.parametrize("shape", [(1, 3001), (3001, 1), (2, 40)])
def test_a_strip_is_not_resized_whole(
    shape: tuple[int, int], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    strip = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def noted(self: Image.Image, size: tuple[int, int], *rest: object) -> Image.Image:
        sizes.append(size)
        return resize(self, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", noted)
    out = transforms.resize_and_centre_crop(strip, (16, 16), ratio=0.8)
    assert out.shape == (16, 16, 3)
    assert max(sizes[0]) <= 8 * 20 + 20

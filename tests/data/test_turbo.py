"""The fast decoder: Pillow's pixels bit for bit, Pillow's bicubic up to rounding, and Pillow itself for the rest."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import ClassificationData, DecodeError, make_train_iterator, turbo
from fastvim_jax.data.augment import eval_transform, train_transform
from fastvim_jax.data.transforms import (
    horizontal_flip,
    random_resized_crop,
)
from fastvim_jax.data.turbo import TurboJpeg, chosen_decoder, open_image
from fastvim_jax.errors import UserError
from tests.data.conftest import encode

pytest.importorskip("simplejpeg", reason="no simplejpeg (extra: data)")
pytest.importorskip("cykooz_resizer", reason="no cykooz-resizer (extra: data)")


def _photos(real_data: Path) -> list[bytes]:
    return [f.read_bytes() for f in sorted((real_data / "imagenet_samples/val").glob("*/*.JPEG"))]


def _turbo(data: bytes) -> TurboJpeg:
    image = open_image(data, channels=3, name="x.jpg", decoder="turbo")
    assert isinstance(image, TurboJpeg)
    return image


def _pillow(data: bytes) -> Image.Image:
    image = open_image(data, channels=3, name="x.jpg")
    assert isinstance(image, Image.Image)
    return image


def _smooth(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Return a picture with edges and gradients, all of it well within 8 bits."""
    coarse = rng.integers(40, 216, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_pixels_are_pillow_s(rng: np.random.Generator, subsampling: int, progressive: bool) -> None:
    height, width = (int(v) for v in rng.integers(17, 90, 2))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for mode in ("RGB", "L"):
        data = encode(
            image.convert(mode),
            "JPEG",
            quality=90,
            subsampling=subsampling,
            progressive=progressive,
        )
        ours = _turbo(data).crop_resized((0, 0, width, height), (height, width))
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(_pillow(data)))


def test_real_pixels_are_pillow_s(real_data: Path) -> None:
    for data in _photos(real_data):
        whole = _pillow(data)
        box = (3, 5, whole.width - 8, whole.height - 1)
        size = (box[3] - box[1], box[2] - box[0])
        ours = _turbo(data).crop_resized(box, size)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(whole.crop(box)))


def _errors(data: bytes, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Return how far crop and resize are from Pillow's, in levels of 0 to 255."""
    ours = np.asarray(_turbo(data).crop_resized(box, size)).astype(float)
    theirs = _pillow(data).crop(box).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.abs(ours - np.asarray(theirs))


def _random_crop(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    left, top = int(rng.integers(width // 2)), int(rng.integers(height // 2))
    right = int(rng.integers(left + width // 4, width + 1))
    return left, top, right, int(rng.integers(top + height // 4, height + 1))


def test_resampling_is_pillow_s(real_data: Path, rng: np.random.Generator) -> None:
    differing, means = [], []
    for data in _photos(real_data):
        box = _random_crop(rng, *_pillow(data).size)
        # Up to GAP times two nothing is reduced; enlarging is part of it.
        size = tuple(
            max(1, int(side / rng.uniform(0.5, 3.5))) for side in (box[3] - box[1], box[2] - box[0])
        )
        error = _errors(data, box, (size[0], size[1]))
        differing.append((error > 1).mean())
        means.append(error.mean())
    # One level where rounding falls the other way; more only where an intermediate value is clipped.
    assert np.mean(differing) < 0.005, differing
    assert max(means) < 0.5, means


def test_a_box_keeps_its_place(rng: np.random.Generator) -> None:
    """Reduce odd boxes of odd images by every factor and keep their place: a shift of a pixel would show on a ramp."""
    height, width = 701, 803
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([x * 255 / width, y * 255 / height, np.full_like(x, 90)], -1)
    data = encode(Image.fromarray(ramp.astype(np.uint8)), "JPEG", quality=97, subsampling=0)
    for factor in (1, 2, 4, 8):
        for _ in range(4):
            box = _random_crop(rng, width, height)
            size = tuple(
                max(1, int(side / (factor * turbo.GAP * 1.01)))
                for side in (box[3] - box[1], box[2] - box[0])
            )
            found = turbo._reduction((box[3] - box[1], box[2] - box[0]), (size[0], size[1]))
            assert found >= factor
            error = _errors(data, box, (size[0], size[1]))
            # A step of a pixel is 0.3 levels in the original; JPEG and rounding are worth about one.
            assert error.mean() < 0.7 and error.max() < 4, (factor, box, size, error.max())


def test_reduced_decoding_is_exact_enough(
    real_data: Path, rng: np.random.Generator, record_property: Any
) -> None:
    """Compare reduced with whole decoding.

    The error is less than half of what bilinear instead of bicubic would change.
    """
    errors, bilinear = [], []
    for data in _photos(real_data):
        whole = _pillow(data)
        size = (whole.height // 5, whole.width // 5)
        box = (0, 0, whole.width, whole.height)
        assert turbo._reduction((whole.height, whole.width), size) == 2
        errors.append(_errors(data, box, size).mean())
        two = [
            np.asarray(whole.resize((size[1], size[0]), kind)).astype(float)
            for kind in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
        ]
        bilinear.append(np.abs(two[0] - two[1]).mean())
    record_property(
        "summary",
        f"reduced JPEG decoding: {np.mean(errors):.2f} levels off in the mean "
        f"(bilinear instead of bicubic: {np.mean(bilinear):.2f})",
    )
    assert np.mean(errors) < 0.5 * np.mean(bilinear) and max(errors) < 1.5


def test_reduction_leaves_twice_the_output() -> None:
    for side in range(1, 200):
        factor = turbo._reduction((side, 3 * side), (10, 10))
        assert factor == 1 or side / factor >= turbo.GAP * 10
        assert factor == 8 or side / (2 * factor) < turbo.GAP * 10


def test_the_rest_goes_through_pillow(rng: np.random.Generator) -> None:
    image = _smooth(rng, 40, 60)
    turned, upright = Image.Exif(), Image.Exif()
    turned[0x0112], upright[0x0112] = 6, 1
    upright[0x010F] = "a camera"
    for data in (
        encode(image, "PNG"),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image, "JPEG", exif=turned),
    ):
        opened = open_image(data, channels=3, name="x", decoder="turbo")
        assert isinstance(opened, Image.Image)
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(_pillow(data)))
    assert _turbo(encode(image, "JPEG", exif=upright)).width == 60
    grey = open_image(encode(image, "JPEG"), channels=1, name="x", decoder="turbo")
    assert isinstance(grey, Image.Image) and grey.mode == "L"


def test_damage_is_named(rng: np.random.Generator) -> None:
    data = encode(_smooth(rng, 64, 64), "JPEG", quality=95)
    cut = _turbo(data[: len(data) * 2 // 3])
    with pytest.raises(DecodeError, match=r"x.jpg: damaged image .*truncated"):
        cut.crop_resized((0, 0, 64, 64), (32, 32))
    # What Pillow bears with is no damage: stray bytes before the end.
    stray = data[:-2] + b"\x01\x02\x03" + data[-2:]
    ours = _turbo(stray).crop_resized((0, 0, 64, 64), (64, 64))
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(_pillow(data)))


def test_transforms_agree(real_data: Path, seed: int) -> None:
    config = ClassificationData(image_size=96, flip=0.5, rand_augment=None)
    for data in _photos(real_data)[:12]:
        ours, theirs = (
            [
                train_transform(picture, config, np.random.default_rng(seed)).astype(float),
                eval_transform(picture, config).astype(float),
            ]
            for picture in (_turbo(data), _pillow(data))
        )
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape == (96, 96, 3)
            assert np.abs(a - b).mean() < 2.5


def test_the_short_way_draws_and_gives_the_same(rng: np.random.Generator, seed: int) -> None:
    picture = _turbo(encode(_smooth(rng, 90, 120), "JPEG"))
    config = ClassificationData(image_size=(24, 32))
    for i in range(8):
        draws = np.random.default_rng(seed + i)
        image = random_resized_crop(picture, (24, 32), draws)
        whole = horizontal_flip(image, draws, probability=0.5)
        short = train_transform(picture, config, np.random.default_rng(seed + i))
        np.testing.assert_array_equal(short, np.asarray(whole))


def _tree(folder: Path, rng: np.random.Generator) -> Path:
    (folder / "train" / "a").mkdir(parents=True)
    for i in range(8):
        data = encode(_smooth(rng, 50 + i, 70), "JPEG", quality=90)
        (folder / "train" / "a" / f"{i}.jpg").write_bytes(data)
    return folder


@pytest.mark.drawn("data pipelines", one_in=6)
def test_workers_threads_and_restarts_agree(
    tmp_path: Path, rng: np.random.Generator, seed: int
) -> None:
    config = ClassificationData(
        source="image_folder", path=str(_tree(tmp_path, rng)), image_size=24, batch_size=4,
        decoder="turbo",
    )  # fmt: skip
    taken = []
    for workers in (0, 1):
        iterator = make_train_iterator(dataclasses.replace(config, workers=workers), seed=seed)
        taken.append([next(iterator)["image"] for _ in range(4)])
        state = iterator.get_state()
        iterator.close()
    for a, b in zip(*taken, strict=True):
        np.testing.assert_array_equal(a, b)
    other = make_train_iterator(dataclasses.replace(config, decoder="pillow"), seed=seed)
    assert np.abs(next(other)["image"].astype(float) - taken[0][0]).mean() < 1.5
    with pytest.raises(UserError, match=r"decoder = 'turbo', but this run has 'pillow'"):
        other.set_state(state)
    other.close()


def test_a_cut_file_is_skipped_and_counted(
    tmp_path: Path, rng: np.random.Generator, seed: int
) -> None:
    file = _tree(tmp_path, rng) / "train" / "a" / "3.jpg"
    file.write_bytes(file.read_bytes()[:-400])
    config = ClassificationData(
        source="image_folder", path=str(tmp_path), image_size=24, batch_size=8, max_corrupt=1,
        decoder="turbo",
    )  # fmt: skip
    iterator = make_train_iterator(config, seed=seed)
    next(iterator)
    assert iterator.corrupt == {3}
    iterator.close()


def test_auto_takes_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_decoder(ClassificationData()) == "turbo"
    assert chosen_decoder(ClassificationData(decoder="pillow")) == "pillow"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen_decoder(ClassificationData()) == "pillow"
    with pytest.raises(UserError, match=r"simplejpeg and cykooz_resizer: pip install 'fastvim-jax"):
        chosen_decoder(ClassificationData(decoder="turbo"))

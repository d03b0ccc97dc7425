"""Whatever a file holds, it becomes upright 8-bit RGB or greyscale, or its name is in the error."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import DecodeError, decode_image
from tests.data.conftest import encode

_ROTATE_90_CLOCKWISE = 6


def _corners(size: int = 32) -> np.ndarray:
    """Four flat quarters: red, green / blue, white; JPEG keeps their middles."""
    pixels = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    pixels[:half, :half] = (255, 0, 0)
    pixels[:half, half:] = (0, 255, 0)
    pixels[half:, :half] = (0, 0, 255)
    pixels[half:, half:] = (255, 255, 255)
    return pixels


def _quarters(image: Image.Image) -> list[list[int]]:
    pixels = np.asarray(image).astype(int)
    q = pixels.shape[0] // 4
    return [pixels[y, x].tolist() for y in (q, 3 * q) for x in (q, 3 * q)]


def test_lossless_rgb_is_unchanged(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)
    decoded = decode_image(encode(Image.fromarray(pixels), "PNG"), channels=3)
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), pixels)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = _ROTATE_90_CLOCKWISE
    # Stored turned counter-clockwise, with the note to turn it back.
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(_corners())))
    data = encode(stored, "JPEG", quality=95, subsampling=0, exif=exif)
    upright = np.asarray(_quarters(decode_image(data, channels=3)))
    np.testing.assert_allclose(upright, _quarters(Image.fromarray(_corners())), atol=12)
    untouched = np.asarray(_quarters(Image.open(io.BytesIO(data))))
    assert np.abs(untouched - upright).max() > 200, "the test image does not show its orientation"


def test_cmyk_jpeg_keeps_its_colours() -> None:
    cmyk = Image.fromarray(_corners()).convert("CMYK")
    decoded = decode_image(encode(cmyk, "JPEG", quality=95, subsampling=0), channels=3)
    np.testing.assert_allclose(_quarters(decoded), _quarters(Image.fromarray(_corners())), atol=12)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_greyscale_spans_the_8_bit_range(kind: str, rng: np.random.Generator) -> None:
    deep = rng.integers(0, 65536, (11, 12)).astype(np.uint16)
    deep[0, :2] = 0, 65535
    data = encode(Image.fromarray(deep), kind)
    expected = np.round(deep / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(decode_image(data, channels=1)), expected)
    as_rgb = np.asarray(decode_image(data, channels=3))
    np.testing.assert_array_equal(as_rgb, np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_what_is_asked_for(mode: str, channels: int) -> None:
    grey = np.zeros((8, 10), np.uint8)
    grey[:, 5:] = 255
    image = Image.fromarray(grey).convert(mode)
    decoded = decode_image(encode(image, "TIFF"), channels=channels)
    assert decoded.mode == {1: "L", 3: "RGB"}[channels]
    expected = grey if channels == 1 else np.repeat(grey[..., None], 3, -1)
    np.testing.assert_array_equal(np.asarray(decoded), expected)


def test_pixel_arrays_pass_through(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (8, 8, 1), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(decode_image(pixels, channels=1)), pixels[..., 0])
    with pytest.raises(DecodeError, match=r"float64"):
        decode_image(np.zeros((8, 8)), channels=1, name="here")


def test_damage_is_named(rng: np.random.Generator) -> None:
    photo = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    jpeg, png = encode(photo, "JPEG"), encode(photo, "PNG")
    broken_png = png[:100] + bytes(64) + png[164:]
    for data, reason in [
        (b"", "empty"),
        (b"hello, I am a text file", "not an image"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (png[: len(png) // 2], "damaged|truncated"),
        (broken_png, "damaged"),
    ]:
        with pytest.raises(DecodeError, match=f"a/b.jpg.*({reason})"):
            decode_image(data, channels=3, name="a/b.jpg")
    floats = encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(DecodeError, match=r"floating-point"):
        decode_image(floats, channels=3)


def test_real_images_decode(real_data: Path) -> None:
    greyscale = real_data / "imagenet_samples" / "val"
    files = sorted(greyscale.glob("*/*.JPEG"))
    assert len(files) == 41
    for file in files:
        image = decode_image(file.read_bytes(), channels=3, name=str(file))
        assert image.mode == "RGB" and min(image.size) >= 180
    cells = sorted((real_data / "cell_painting" / "jump_cpjump1").glob("*/*.png"))
    assert cells
    for file in cells:
        deep = np.asarray(Image.open(file))
        assert deep.dtype == np.uint16
        np.testing.assert_array_equal(
            np.asarray(decode_image(file.read_bytes(), channels=1)),
            np.round(deep / 257).astype(np.uint8),
        )

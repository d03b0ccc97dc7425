"""Whatever a file holds, it becomes upright 8-bit RGB or greyscale, or its name is in the error."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import DecodeError, decode_image
from fastvim_jax.data.decode import orientation
from fastvim_jax.data.transforms import resized
from fastvim_jax.data.turbo import open_image
from tests.data.conftest import encode

_ROTATE_90_CLOCKWISE = 6


def _corners(size: int = 32) -> np.ndarray:
    """Draw four flat quarters, red, green / blue, white; JPEG keeps their middles."""
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


def _jpeg_with(block: bytes, *, before: int = 0) -> bytes:
    """Return a JPEG whose EXIF block stands behind `before` comment segments of 60,000 bytes."""
    data = encode(Image.fromarray(np.rot90(_corners())), "JPEG", quality=95, subsampling=0)
    exif = b"Exif\0\0" + block
    comments = b"".join(
        b"\xff\xfe" + struct.pack(">H", 60002) + bytes(60000) for _ in range(before)
    )
    return data[:2] + comments + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


def _entry(tag: int, kind: int, value: bytes) -> bytes:
    return struct.pack("<HHI", tag, kind, 1) + value


_TURNED = _entry(0x112, 3, struct.pack("<HH", _ROTATE_90_CLOCKWISE, 0))
_HEAD = b"II*\0" + struct.pack("<IH", 8, 2)
_WRONG_TYPE = _HEAD + _entry(0x100, 11, struct.pack("<f", 3.5)) + _TURNED + bytes(4)
_NONSENSE = _HEAD + _entry(0x112, 3, struct.pack("<HH", 77, 0)) + bytes(16)


@pytest.mark.parametrize("decoder", ["pillow", "turbo"])
@pytest.mark.parametrize(
    ("block", "before", "turned"),
    [
        (_WRONG_TYPE, 0, True),
        (_WRONG_TYPE, 3, True),
        (b"garbage!", 0, False),
        (_NONSENSE, 1, False),
    ],
)
def test_orientation_is_found_anywhere_and_damage_ignored(
    decoder: str, block: bytes, before: int, turned: bool
) -> None:
    data = _jpeg_with(block, before=before)
    picture = open_image(data, channels=3, name="x", decoder=decoder)
    pixels = resized(picture, (32, 32))
    expected = _corners() if turned else np.rot90(_corners())
    np.testing.assert_allclose(_quarters(pixels), _quarters(Image.fromarray(expected)), atol=12)


def test_damaged_metadata_of_other_kinds_are_ignored(rng: np.random.Generator) -> None:
    pixels = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encode(pixels, kind, exif=b"garbage!", **options)
        decoded = decode_image(data, channels=3)
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(pixels))
        opened = Image.open(io.BytesIO(data))
        opened.load()
        assert orientation(opened) == (1, False)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
@pytest.mark.parametrize("background", [255, 0, 100])
def test_transparent_pixels_show_the_background(mode: str, background: int) -> None:
    layered = Image.new("LA" if mode != "RGBA" else mode, (8, 6))
    layered.paste((40, 255) if mode != "RGBA" else (40, 40, 40, 255), (0, 0, 3, 6))
    options = {}
    if mode in ("P", "L"):
        # Grey level 0 is the transparent one.
        layered, options = layered.convert("L").convert(mode), {"transparency": 0}
    data = encode(layered, "PNG", **options)
    expected = np.full((6, 8), background)
    expected[:, :3] = 40
    for channels in (1, 3):
        decoded = np.asarray(decode_image(data, channels=channels, background=background))
        np.testing.assert_array_equal(decoded.reshape(6, 8, channels)[..., 0], expected)


def test_half_transparent_pixels_are_blended() -> None:
    data = encode(Image.new("RGBA", (2, 2), (200, 0, 0, 128)), "PNG")
    assert abs(np.asarray(decode_image(data, channels=3)).astype(int) - [227, 127, 127]).max() <= 1


@pytest.mark.parametrize("mode", ["F", "LAB", "I"])
def test_what_is_refused_does_not_depend_on_channels(mode: str) -> None:
    image = Image.new(mode, (4, 4))
    if mode == "I":
        image = Image.fromarray(np.full((4, 4), 70000, np.int32))
    data = encode(image, "TIFF")
    for channels in (1, 3):
        with pytest.raises(DecodeError, match=r"a/b: .*(8 or 16 bits|save it as RGB|16 bits)"):
            decode_image(data, channels=channels, name="a/b")


def test_only_formats_of_the_list_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = tmp_path / "called"
    fake = tmp_path / "gs"
    fake.write_text(f"#!/bin/sh\necho $@ >> {called}\necho 10.0\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n%%EOF\n"
    with pytest.raises(DecodeError, match=r"cat.jpg: .*JPEG, PNG"):
        decode_image(script, channels=3, name="cat.jpg")
    assert not called.exists()


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    Image.MAX_IMAGE_PIXELS, most = None, Image.MAX_IMAGE_PIXELS
    try:
        bomb = encode(Image.new("1", (9000, 8000)), "PNG")
    finally:
        Image.MAX_IMAGE_PIXELS = most
    for decoder in ("pillow", "turbo"):
        with pytest.raises(DecodeError, match=r"b: 9000 x 8000 pixels are more than 67,108,864"):
            open_image(bomb, channels=3, name="b", decoder=decoder)


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


@pytest.mark.parametrize("channels", (2, 8))
def test_channels_are_no_photograph(channels: int) -> None:
    """Name the experiments that read images of channels, where photographs are expected."""
    pixels = np.zeros((4, 4, channels), np.uint8)
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    for image in (pixels, buffer.getvalue()):
        with pytest.raises(DecodeError, match=r"x: .* is no photograph: .*CellsData, see docs"):
            decode_image(image, channels=3, name="x")

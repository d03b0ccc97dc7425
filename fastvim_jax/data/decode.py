"""Encoded bytes or pixel arrays to an upright 8-bit Pillow image, greyscale or RGB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from fastvim_jax.data.records import DecodeError

# Pillow modes holding more than 8 bits per pixel; 16-bit RGB files are reduced by Pillow itself.
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def decode_image(image: bytes | np.ndarray, *, channels: int, name: str = "image") -> Image.Image:
    """Decode an image, turn it upright and bring it to 8 bits and the channels asked for.

    Palettes, CMYK, 1-bit and 16-bit images are converted (16-bit values are divided by 257), the
    transparency channel is dropped, and the EXIF orientation is applied.

    Args:
        image: a file's bytes, or uint8 pixels `h w` or `h w c` with c of 1 or 3.
        channels: 1 for greyscale (mode L), 3 for RGB.
        name: the record's name for the error message.

    Raises:
        DecodeError: when the bytes are no image, are cut short, or hold values with no fixed scale.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    if isinstance(image, np.ndarray):
        return _from_pixels(image, name).convert(mode)
    if not image:
        raise DecodeError(f"{name}: the file is empty.")
    try:
        opened = Image.open(io.BytesIO(image))
        opened.load()
        upright = ImageOps.exif_transpose(opened)
    except Image.UnidentifiedImageError:
        raise DecodeError(f"{name}: not an image, or of a kind that is not known.") from None
    except Image.DecompressionBombError as error:
        raise DecodeError(f"{name}: {error}") from None
    # Pillow's readers raise almost anything on damaged files: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise DecodeError(f"{name}: damaged image ({error or type(error).__name__}).") from None
    if upright.mode in _DEEP_MODES:
        deep = np.asarray(upright, np.float64)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise DecodeError(f"{name}: integer pixels beyond 16 bits have no fixed scale.")
        upright = Image.fromarray(np.round(deep / 257).astype(np.uint8))
    elif upright.mode == "F":
        raise DecodeError(
            f"{name}: floating-point pixels have no fixed scale; save it as 8 or 16 bits."
        )
    elif upright.mode == "P":
        # A palette may hold transparency; Pillow warns unless it is resolved through RGBA.
        upright = upright.convert("RGBA")
    return upright if upright.mode == mode else upright.convert(mode)


def _from_pixels(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8 or not (
        pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)
    ):
        raise DecodeError(
            f"{name}: pixels must be uint8 of shape (h, w), (h, w, 1) or (h, w, 3), "
            f"not {pixels.dtype} {pixels.shape}."
        )
    return Image.fromarray(np.ascontiguousarray(pixels))

"""Encoded bytes or pixel arrays to an upright, opaque 8-bit Pillow image, greyscale or RGB.

The bytes may come from strangers. Only the readers of `FORMATS` see them: Pillow picks a reader by content, and its
reader of PostScript starts another program. An image of more than `MAX_PIXELS` is refused by its header, before memory
is taken for its pixels, and images of more than `LARGE` are decoded one at a time.
"""

from __future__ import annotations

import contextlib
import io
import threading

import numpy as np
from PIL import Image

from fastvim_jax.data.records import DecodeError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""Names of Pillow's readers that may be used."""
MAX_PIXELS = 2**26
"""Width times height of the largest image that is decoded, 67 million: 200 MB as RGB."""
LARGE = 2**25
"""Pixels above which only one image of a process is decoded at a time, so that threads do not add up their peaks."""
WHITE = 255

# Pillow modes holding more than 8 bits per pixel; 16-bit RGB files are reduced by Pillow itself.
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
GREY_MODES = frozenset(("1", "L", "LA", "La", *_DEEP_MODES))
"""Pillow modes of pictures without colour."""
_MODES = frozenset(
    ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
)
_NPY = b"\x93NUMPY"
_CELLS = ": such images are read by experiments on CellsData, see docs/cells.md"
_MODE_OF = {1: "L", 3: "RGB"}
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_one_large = threading.Lock()


def decode_image(
    image: bytes | np.ndarray, *, channels: int, name: str = "image", background: int = WHITE
) -> Image.Image:
    """Decode an image, turn it upright and bring it to 8 bits and the channels asked for.

    Palettes, CMYK, 1-bit and 16-bit images are converted (16-bit values are divided by 257), transparent pixels are
    laid on the background, and the EXIF orientation is applied where it can be read. What is read and what is refused
    does not depend on `channels`.

    Args:
        image: a file's bytes, or uint8 pixels `h w` or `h w c` with c of 1 or 3.
        channels: 1 for greyscale (mode L), 3 for RGB.
        name: the record's name for the error message.
        background: grey level behind transparent pixels, from 0 (black) to 255 (white).

    Raises:
        DecodeError: when the bytes are no image of `FORMATS`, are cut short, hold too many pixels, or values with no
            fixed scale.
    """
    if isinstance(image, np.ndarray):
        return _from_pixels(image, name).convert(_MODE_OF[channels])
    return convert_image(
        open_header(image, name), channels=channels, name=name, background=background
    )


def convert_image(
    opened: Image.Image, *, channels: int, name: str = "image", background: int = WHITE
) -> Image.Image:
    """Turn an opened Pillow image upright and bring it to 8 bits and the channels asked for; see `decode_image`.

    Raises:
        DecodeError: see `decode_image`.
    """
    _check_opened(opened, name)
    mode = _MODE_OF[channels]
    large = opened.width * opened.height > LARGE
    with _one_large if large else contextlib.nullcontext():
        try:
            opened.load()
            plain = _opaque_8_bit(opened, name, background)
            turn = _UPRIGHT.get(orientation(opened)[0])
            upright = plain if turn is None else plain.transpose(turn)
            return upright if upright.mode == mode else upright.convert(mode)
        except DecodeError:
            raise
        # Pillow's readers raise almost anything on damaged files: OSError, SyntaxError, struct.error, ...
        except Exception as error:
            raise DecodeError(f"{name}: damaged image ({error or type(error).__name__}).") from None


def open_header(image: bytes, name: str) -> Image.Image:
    """Read an image's header only, and check kind, size and colour mode.

    Raises:
        DecodeError: when `decode_image` would refuse the image for one of these.
    """
    if not image:
        raise DecodeError(f"{name}: the file is empty.")
    if image.startswith(_NPY):
        raise DecodeError(f"{name}: a .npy file of channels is no photograph{_CELLS}.")
    try:
        opened = Image.open(io.BytesIO(image), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise DecodeError(
            f"{name}: not an image, or of a kind that is not read ({', '.join(FORMATS)} are)."
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DecodeError(f"{name}: more pixels than {MAX_PIXELS:,}, the most read.") from None
    except Exception as error:
        raise DecodeError(f"{name}: damaged image ({error or type(error).__name__}).") from None
    _check_opened(opened, name)
    return opened


def _check_opened(opened: Image.Image, name: str) -> None:
    """Raise DecodeError for too many pixels or a colour mode that is not read."""
    if opened.width * opened.height > MAX_PIXELS:
        raise DecodeError(
            f"{name}: {opened.width} x {opened.height} pixels are more than {MAX_PIXELS:,}, the most read: reduce the "
            "image, or cut it into tiles."
        )
    if opened.mode == "F":
        raise DecodeError(
            f"{name}: floating-point pixels have no fixed scale; save it as 8 or 16 bits."
        )
    if opened.mode not in _MODES and opened.mode not in _DEEP_MODES:
        raise DecodeError(f"{name}: pixels of the mode {opened.mode} are not read; save it as RGB.")


def orientation(opened: Image.Image) -> tuple[int, bool]:
    """Find the orientation that an image's metadata give, 1 (upright) to 8, and whether these could be read.

    Damaged metadata count as none: they say nothing of the pixels.
    """
    try:
        value = opened.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1, False
    sound = isinstance(value, int) and 1 <= value <= 8
    # 0 is what many cameras and programs write for "not said".
    return (value if sound else 1), sound or value == 0


def _opaque_8_bit(image: Image.Image, name: str, background: int) -> Image.Image:
    """Bring a decoded image to the mode L or RGB."""
    if image.mode in _DEEP_MODES:
        return _from_deep(image, name)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        if np.asarray(layered.getchannel("A")).min(initial=255) < 255:
            ground = Image.new("RGBA", image.size, (background, background, background, 255))
            ground.alpha_composite(layered)
            layered = ground
        return layered.convert("L" if image.mode == "LA" else "RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _from_deep(image: Image.Image, name: str) -> Image.Image:
    """Divide 16-bit values by 257, a strip at a time: the whole in floating point would take 8 bytes per pixel."""
    out = np.empty((image.height, image.width), np.uint8)
    rows = max(1, 2**20 // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        deep = np.asarray(image.crop(box)).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise DecodeError(f"{name}: integer pixels beyond 16 bits have no fixed scale.")
        out[box[1] : box[3]] = (deep + 128) // 257
    return Image.fromarray(out)


def _from_pixels(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4):
        raise DecodeError(
            f"{name}: an image of {pixels.shape[-1]} channels is no photograph{_CELLS}."
        )
    if pixels.dtype != np.uint8 or not (
        pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)
    ):
        raise DecodeError(
            f"{name}: pixels must be uint8 of shape (h, w), (h, w, 1) or (h, w, 3), "
            f"not {pixels.dtype} {pixels.shape}."
        )
    if not pixels.size:
        raise DecodeError(f"{name}: an image of shape {pixels.shape} has no pixels.")
    return Image.fromarray(np.ascontiguousarray(pixels))

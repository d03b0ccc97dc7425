"""JPEG files decoded by libjpeg-turbo when a crop asks for their pixels, and resized with SIMD instructions.

The pixels are those that Pillow decodes, bit for bit (simplejpeg). The resampling is Pillow's bicubic with
antialiasing (cykooz-resizer; Catmull–Rom kernel, widened by the scale), equal up to how intermediate values are
rounded and clipped. A crop at least four times as large as the output is decoded at a half, a quarter or an eighth of
its size, by the inverse DCT itself, so that at least twice the output remains to be resampled.

Whatever is not a plain upright JPEG file goes through Pillow (`decode.py`).
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fastvim_jax.data.decode import LARGE, WHITE, decode_image, open_header, orientation
from fastvim_jax.data.records import DecodeError
from fastvim_jax.errors import UserError

if TYPE_CHECKING:
    from fastvim_jax.data.config import DataConfig

GAP = 2
"""A reduced image must be this many times as large as the output."""

_APP1 = 0xE1
_START_OF_SCAN = 0xDA
_SIMPLE = ("YCbCr", "Gray")
_log = logging.getLogger(__name__)
_local = threading.local()


class TurboJpeg:
    """A JPEG file of which only the header has been read.

    Attributes:
        width: in pixels.
        height: in pixels.
    """

    def __init__(self, data: bytes, width: int, height: int, name: str) -> None:
        self.width = width
        self.height = height
        self._data = data
        self._name = name

    def crop_resized(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
        """Return the result of `crop_pixels` as a Pillow image."""
        return Image.fromarray(np.ascontiguousarray(self.crop_pixels(box, size)))

    def crop_pixels(
        self, box: tuple[int, int, int, int], size: tuple[int, int]
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Crop left, top, right, bottom and resize (bicubic) to `size` = (height, width).

        Raises:
            DecodeError: when the file is damaged.
        """
        import simplejpeg

        left, top, right, bottom = box
        reduction = _reduction((bottom - top, right - left), size)
        try:
            pixels = simplejpeg.decode_jpeg(
                self._data,
                "RGB",
                min_height=-(-self.height // reduction) if reduction > 1 else 0,
                min_width=-(-self.width // reduction) if reduction > 1 else 0,
            )
        except ValueError:
            # Pillow ignores harmless damage, and its errors name the rest.
            image = decode_image(self._data, channels=3, name=self._name).crop(box)
            return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
        if reduction == 1:
            return _resized(pixels[top:bottom, left:right], size)
        # The box in the reduced image's pixels: whole ones, and the part of them that is meant.
        low = left // reduction, top // reduction
        high = -(-right // reduction), -(-bottom // reduction)
        part = pixels[low[1] : high[1], low[0] : high[0]]
        inner = (left / reduction - low[0], top / reduction - low[1],
                 (right - left) / reduction, (bottom - top) / reduction)  # fmt: skip
        return _resized(part, size, inner)


class MappedPixels:
    """Pixels of a memory-mapped file, of which a crop reads only its own rows.

    Attributes:
        width: in pixels.
        height: in pixels.
    """

    def __init__(self, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        self.height, self.width = pixels.shape[:2]
        self._pixels = pixels

    def crop_resized(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
        """Return the result of `crop_pixels` as a Pillow image."""
        return Image.fromarray(np.ascontiguousarray(self.crop_pixels(box, size)))

    def crop_pixels(
        self, box: tuple[int, int, int, int], size: tuple[int, int]
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Crop left, top, right, bottom and resize (bicubic) to `size` = (height, width)."""
        left, top, right, bottom = box
        return np.asarray(_resized(self._pixels[top:bottom, left:right], size))


LAZY = (TurboJpeg, MappedPixels)
"""Pictures whose pixels are not there before a crop asks for them."""
Picture = Image.Image | TurboJpeg | MappedPixels
"""An image, its pixels decoded or not yet."""


def open_image(
    image: bytes | np.ndarray,
    *,
    channels: int,
    name: str,
    decoder: str = "pillow",
    background: int = WHITE,
) -> Picture:
    """Open an image with a decoder, "pillow" or "turbo"; see `decode.decode_image`.

    Raises:
        DecodeError: when the bytes are no image. Damage of a JPEG file's pixels shows later with "turbo".
    """
    if decoder == "turbo" and channels == 3 and isinstance(image, bytes):
        picture = _plain_jpeg(image, name)
        if picture is not None:
            return picture
    if decoder == "turbo" and channels == 3 and isinstance(image, np.memmap):
        if image.ndim == 3 and image.shape[-1] == 3:
            return MappedPixels(image)
    return decode_image(image, channels=channels, name=name, background=background)


def chosen_decoder(config: DataConfig) -> Literal["pillow", "turbo"]:
    """Return the decoder that `config.decoder` means here: auto is turbo where both packages are installed.

    Raises:
        UserError: when turbo is asked for and is not installed.
    """
    missing = [p for p in ("simplejpeg", "cykooz_resizer") if not importlib.util.find_spec(p)]
    if config.decoder == "turbo" and missing:
        raise UserError(
            f"data.decoder=turbo needs {' and '.join(missing)}: pip install 'fastvim-jax[data]', "
            "or set data.decoder=pillow."
        )
    return "pillow" if config.decoder == "pillow" or missing else "turbo"


def available_decoder(config: DataConfig) -> Literal["pillow", "turbo"]:
    """Choose the decoder of `config`, or Pillow where that is not installed: evaluation differs by rounding only."""
    try:
        return chosen_decoder(config)
    except UserError as error:
        _log.warning("Pillow decodes the images instead: %s", error)
        return "pillow"


def _plain_jpeg(data: bytes, name: str) -> TurboJpeg | None:
    """Return the file if it is an upright JPEG of the usual colours, or None."""
    if data[:2] != b"\xff\xd8":
        return None
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # decode_image refuses images that are too large, and decodes large ones one at a time to save memory.
    if colours not in _SIMPLE or height * width > LARGE:
        return None
    if _has_metadata(data):
        try:
            if orientation(open_header(data, name))[0] != 1:
                return None
        except DecodeError:
            return None
    return TurboJpeg(data, width, height, name)


def _has_metadata(data: bytes) -> bool:
    """Tell whether the markers before the pixels hold an APP1 segment (EXIF, XMP), or cannot be followed.

    EXIF may stand behind other segments, each up to 64 KiB long, so a look at the file's beginning would not do.
    """
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # A fill byte.
            place += 1
            continue
        if marker == _START_OF_SCAN:
            return False
        if marker == _APP1:
            return True
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return True


def _reduction(box: tuple[int, int], size: tuple[int, int]) -> int:
    """Choose 1, 2, 4 or 8: by how much libjpeg may reduce the image before it is resized."""
    room = min(box[0] / size[0], box[1] / size[1]) / GAP
    return next((factor for factor in (8, 4, 2) if room >= factor), 1)


def _resized(
    pixels: np.ndarray, size: tuple[int, int], inner: tuple[float, ...] | None = None
) -> np.ndarray:
    """Resize pixels `h w 3`, or the box left, top, width, height of them, to (height, width)."""
    if inner is None and pixels.shape[:2] == size:
        return pixels
    import cykooz_resizer as cykooz

    options: Any = cykooz.ResizeOptions(
        resize_alg=cykooz.ResizeAlg.convolution(cykooz.FilterType.catmull_rom),
        use_alpha=False,
        crop_box=None if inner is None else cykooz.CropBox(*inner),
    )
    height, width = pixels.shape[:2]
    source = cykooz.ImageData(width, height, cykooz.PixelType.U8x3, pixels.tobytes())
    result = cykooz.ImageData(size[1], size[0], cykooz.PixelType.U8x3)
    # A resizer keeps buffers, which threads must not share.
    if not hasattr(_local, "resizer"):
        _local.resizer = cykooz.Resizer()
    _local.resizer.resize(source, result, options)
    return np.frombuffer(result.get_buffer(), np.uint8).reshape(*size, 3)

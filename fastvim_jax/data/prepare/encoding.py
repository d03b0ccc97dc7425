"""Encode records as shards hold them, as image files or as pixels, and append them to a shard."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvim_jax.data.decode import GREY_MODES, decode_image, open_header
from fastvim_jax.data.multichannel import MultiChannel, to_uint8
from fastvim_jax.data.records import DecodeError, Record
from fastvim_jax.data.sources.array_record import join_record
from fastvim_jax.data.sources.pixels import PixelWriter
from fastvim_jax.data.stacks import as_stack
from fastvim_jax.data.transforms import to_array
from fastvim_jax.errors import counted

JPEG_QUALITY = 95
"""Quality of images that were resized (4:2:0 chroma). Other images keep their bytes."""


class EncodedShard:
    """Write an ArrayRecord file of encoded images."""

    def __init__(self, file: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")

    def encoded(self, record: Record, max_size: int | None) -> bytes:
        return encoded(record, max_size)

    def write(self, image: bytes, record: Record) -> None:
        self._writer.write(join_record(image, record.target, record.name))

    def close(self) -> None:
        self._writer.close()


class PixelShard:
    """Write a file of pixels."""

    def __init__(self, file: Path) -> None:
        self._writer = PixelWriter(file)

    def encoded(self, record: Record, max_size: int | None) -> np.ndarray:
        return as_pixels(record, max_size)

    def write(self, image: np.ndarray, record: Record) -> None:
        self._writer.write(image, record.target, record.name)

    def close(self) -> None:
        self._writer.close()


def encoded(record: Record, max_size: int | None) -> bytes:
    """Return the bytes of an image file to store for a record; see `prepare`.

    Raises:
        DecodeError: the image must be decoded and cannot be.
    """
    image = record.image
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] not in (1, 3):
        return _as_npy(image, max_size)
    if isinstance(image, np.ndarray):
        channels = 1 if image.ndim == 2 or image.shape[-1] == 1 else 3
        pixels = _reduced(decode_image(image, channels=channels, name=record.name), max_size)
        return _saved(pixels, "PNG")
    if max_size is None:
        return image
    if (stack := as_stack(image, record.name)) is not None:
        if min(stack.pixels.shape[:2]) <= max_size:
            return image
        return _as_ome(stack, max_size) if stack.names else _as_npy(stack.pixels, max_size)
    header = open_header(image, record.name)
    if min(header.size) <= max_size:
        return image
    channels = 1 if header.mode in GREY_MODES else 3
    pixels = _reduced(decode_image(image, channels=channels, name=record.name), max_size)
    return _saved(pixels, "JPEG", quality=JPEG_QUALITY)


def as_pixels(record: Record, max_size: int | None) -> np.ndarray:
    """Decode a record's image, greyscale `h w 1` or colour `h w 3`, its shorter side at most `max_size`.

    Raises:
        DecodeError: the image cannot be decoded, or has neither 1 nor 3 channels.
    """
    image = record.image
    if isinstance(image, np.ndarray):
        grey = image.ndim == 2 or image.shape[-1] == 1
    elif (stack := as_stack(image, record.name)) is not None:
        raise DecodeError(
            f"{record.name}: shards of pixels hold photographs, but this image has "
            f"{counted(stack.pixels.shape[-1], 'channel')}: leave pixels out, and every image keeps its file."
        )
    else:
        grey = open_header(image, record.name).mode in GREY_MODES
    plain = _reduced(decode_image(image, channels=1 if grey else 3, name=record.name), max_size)
    return to_array(plain)


def _as_npy(pixels: np.ndarray, max_size: int | None) -> bytes:
    """Return pixels `h w c` of any c as the bytes of a `.npy` file, each channel reduced by itself."""
    buffer = io.BytesIO()
    np.save(buffer, np.stack(_planes(pixels, max_size), axis=-1), allow_pickle=False)
    return buffer.getvalue()


def _as_ome(image: MultiChannel, max_size: int | None) -> bytes:
    """Return the bytes of an OME-TIFF, which keeps the channels' names, each channel reduced by itself."""
    import tifffile

    buffer = io.BytesIO()
    metadata = {"axes": "CYX", "Channel": {"Name": list(image.names)}}
    planes = np.stack(_planes(image.pixels, max_size))
    tifffile.imwrite(buffer, planes, ome=True, metadata=metadata)
    return buffer.getvalue()


def _planes(pixels: np.ndarray, max_size: int | None) -> list[np.ndarray]:
    planes = [Image.fromarray(plane) for plane in np.moveaxis(to_uint8(pixels), -1, 0)]
    return [np.asarray(_reduced(plane, max_size)) for plane in planes]


def _reduced(image: Image.Image, max_size: int | None) -> Image.Image:
    """Bring the shorter side down to `max_size` pixels, the aspect kept."""
    shorter = min(image.size)
    if max_size is None or shorter <= max_size:
        return image
    width, height = (max(1, round(side * max_size / shorter)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()

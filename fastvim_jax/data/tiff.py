"""Read TIFF files of any number of channels: pages, planes or samples of one image, named by OME metadata."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastvim_jax.data.decode import MAX_PIXELS
from fastvim_jax.data.records import DecodeError
from fastvim_jax.errors import UserError

MAX_VALUES = 2**28
"""Pixels times channels of the largest TIFF that is decoded, 268 million: 537 MB of 16 bits."""
_FILE_NAME = re.compile(r"""<UUID\b[^>]*\bFileName=(?:"([^"]*)"|'([^']*)')""")
_DEPTH_OR_TIME = {"Z": "planes in depth", "T": "times"}
_PILLOW_READS = (1, 2)
"""Values of the tag PhotometricInterpretation, black is 0 and RGB, whose numbers Pillow leaves as they are."""


class SeveralImages(DecodeError):
    """A file holds several images, of which none is a channel of another."""


def read_tiff(image: bytes, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Decode a TIFF's pixels `h w c` or `h w`, and return its channels' names, () where it has none.

    Raises:
        DecodeError: the file is damaged, cut short or too large, or holds more axes than height, width and channels.
        SeveralImages: it holds several images.
        UserError: tifffile is not installed.
    """
    try:
        import tifffile
    except ImportError:
        raise UserError(
            f"{name}: TIFF files need tifffile: pip install 'fastvim-jax[cells]'."
        ) from None
    with errors_of(tifffile.logger(), name), _opened(image) as (opened, metadata):
        _require_whole(opened, len(image), name)
        series = _series_of_one_image(opened, name)
        shape, axes = series[0].shape, series[0].axes
        if len(series) > 1:
            shape, axes = (len(series), *shape), f"I{axes}"
        sides = dict(zip(axes, shape, strict=True))
        if sides.get("Y", 1) * sides.get("X", 1) > MAX_PIXELS or math.prod(shape) > MAX_VALUES:
            raise DecodeError(
                f"{name}: an image of shape {shape} has more than {MAX_PIXELS:,} pixels or {MAX_VALUES:,} values, the "
                "most read: cut it into tiles."
            )
        pixels = np.stack([_pixels(each, image) for each in series]).reshape(shape)
        names = _ome_names(metadata)
        is_ome = opened.is_ome
    kept = [(n, axis) for n, axis in zip(shape, axes, strict=True) if n > 1 or axis in "YX"]
    extra = [(n, axis) for n, axis in kept if axis not in "YX"]
    if len(extra) > 1:
        raise DecodeError(
            f"{name}: a TIFF with the axes {axes} {shape}; one axis besides Y and X is read as channels: "
            "split stacks and time series into one file per image."
        )
    if is_ome and extra and extra[0][1] in _DEPTH_OR_TIME:
        count, axis = extra[0]
        raise DecodeError(
            f"{name}: by its OME metadata the file holds {count} {_DEPTH_OR_TIME[axis]}, and no channels: save one "
            "file per image, or a projection."
        )
    pixels = pixels.reshape([n for n, _ in kept])
    place = {axis: i for i, (_, axis) in enumerate(kept)}
    order = [place["Y"], place["X"], *(place[axis] for _, axis in extra)]
    pixels = np.ascontiguousarray(pixels.transpose(order))
    return pixels, names if len(names) == (extra[0][0] if extra else 1) else ()


@contextlib.contextmanager
def _opened(image: bytes) -> Iterator[tuple[Any, Any]]:
    """Open a TIFF, and return its OME metadata, too.

    One file of an OME set of several is opened as if alone: other files hold the set's other planes.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(image)) as opened:
        metadata = opened.ome_metadata
        if len(set(_FILE_NAME.findall(metadata or ""))) < 2:
            yield opened, metadata
            return
    with tifffile.TiffFile(io.BytesIO(image), is_ome=False) as opened:
        yield opened, metadata


def _require_whole(opened: Any, size: int, name: str) -> None:
    """Raise DecodeError if pages are linked in a circle, or lie behind the file's end."""
    seen: set[int] = set()
    for page in opened.pages:
        if page.offset in seen:  # tifffile would follow the pages around for ever.
            raise DecodeError(f"{name}: damaged image (its pages are linked in a circle).")
        seen.add(page.offset)
        end = max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
        if end > size:
            raise DecodeError(f"{name}: cut short ({size} bytes of at least {end}).")


def _series_of_one_image(opened: Any, name: str) -> Sequence[Any]:
    """Return what holds the file's image: one series, or one for each of several pages that are alike.

    tifffile makes a series of each page if a program wrote them one by one.

    Raises:
        SeveralImages: the file holds several images.
    """
    series = [each for each in opened.series if not each.keyframe.is_reduced] or opened.series[:1]
    if not series:
        raise DecodeError(f"{name}: damaged image (it has no page).")
    kinds = {(each.axes, each.shape, each.dtype) for each in series}
    if len(series) == 1 or (len(kinds) == 1 and series[0].axes == "YX" and not opened.is_ome):
        return series
    shapes = ", ".join(str(each.shape) for each in series[:5]) + (", ..." if series[5:] else "")
    raise SeveralImages(
        f"{name}: the file holds {len(series)} images, of shape {shapes}: save one file per image."
    )


def _pixels(series: Any, image: bytes) -> np.ndarray:
    """Decode a series. Pillow reads what tifffile has no decompressor for, such as LZW, as far as it can.

    Raises:
        ValueError: neither reads it; the text names the package that does.
    """
    try:
        pixels: np.ndarray = series.asarray()
        return pixels
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        planes = []
        try:
            by_pillow = Image.open(io.BytesIO(image), formats=("TIFF",))
        except UnidentifiedImageError:
            raise error from None
        with by_pillow as opened:
            for page in series.pages:
                opened.seek(page.index)
                plane = np.asarray(opened)
                alike = (plane.shape, plane.dtype.newbyteorder("=")) == (page.shape, page.dtype)
                if not (alike and _pillow_keeps(page)):
                    raise error from None
                planes.append(plane)
        return np.stack(planes).reshape(series.shape)


def _pillow_keeps(page: Any) -> bool:
    """Return whether Pillow leaves a page's numbers as they are. It turns pages, and divides colours by their alpha."""
    turned = page.tags.valueof("Orientation", 1) != 1
    return page.photometric in _PILLOW_READS and not turned and 1 not in page.extrasamples


@contextlib.contextmanager
def errors_of(logger: logging.Logger, name: str) -> Iterator[None]:
    """Raise DecodeError for what a library only logs of a damaged file and then reads on."""
    said: list[str] = []
    thread = threading.get_ident()

    def note(record: logging.LogRecord) -> bool:
        if record.thread != thread or record.levelno < logging.WARNING:
            return True
        said.append(record.getMessage())
        return False

    logger.addFilter(note)
    try:
        yield
    finally:
        logger.removeFilter(note)
    if said:
        raise DecodeError(f"{name}: damaged image ({said[0]}).")


def _ome_names(metadata: Any) -> tuple[str, ...]:
    """Return the names of an image's channels in OME-XML, or () where one has none or images differ in them."""
    if (
        not isinstance(metadata, str) or "<!" in metadata
    ):  # No entities: they could expand without end.
        return ()
    try:
        root = ElementTree.fromstring(metadata)
    except ElementTree.ParseError:
        return ()
    named = {
        tuple(channel.get("Name", "").strip() for channel in _each(image, "Channel"))
        for image in _each(root, "Image")
    }
    names = named.pop() if len(named) == 1 else ()
    return names if all(names) else ()


def _each(element: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return [each for each in element.iter() if each.tag.rpartition("}")[2] == tag]

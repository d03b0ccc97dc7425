"""Images of any number of channels: `.npy`, multi-page and multi-channel TIFF (OME names), PNG, one file per channel.

Every reader returns pixels `h w c` in the file's own integers and the channels' names, where the file has any;
`to_uint8` brings them to 8 bits by a rule that the caller chooses.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import string
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fastvim_jax.data.decode import FORMATS, MAX_PIXELS
from fastvim_jax.data.files import read_file, walk
from fastvim_jax.data.records import DecodeError, printable
from fastvim_jax.errors import UserError, counted, require_texts

Depth = Literal["full", "percentile"]
NPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_VALUES = 2**28
"""Pixels times channels of the largest TIFF that is decoded, 268 million: 537 MB of 16 bits."""
_FILE_NAME = re.compile(r"""<UUID\b[^>]*\bFileName=(?:"([^"]*)"|'([^']*)')""")
SATURATED_SHARE = 0.01
"""An image counts as saturated if more than this share of a channel's pixels hold the largest value of its type."""

_IDENTITY = ("plate", "well", "site", "class", "split")
"""Fields that identify an image, even where each well has one stain."""


@dataclass(frozen=True)
class MultiChannel:
    """An image with named channels.

    Attributes:
        pixels: `h w c`, unsigned integers of 8 or 16 bits.
        names: one name per channel, or () where the file names none.
    """

    pixels: np.ndarray
    names: tuple[str, ...] = ()

    def saturated(self) -> tuple[int, ...]:
        """Return the channels of which more than `SATURATED_SHARE` of the pixels hold the type's largest value."""
        top = np.iinfo(self.pixels.dtype).max
        share = (self.pixels == top).mean(axis=(0, 1))
        return tuple(int(channel) for channel in np.flatnonzero(share > SATURATED_SHARE))


def read_channels(image: bytes | np.ndarray, name: str) -> MultiChannel:
    """Decode an image of any number of channels.

    Args:
        image: the bytes of a `.npy` file, a TIFF file or a file that Pillow reads; or pixels `h w` or `h w c`.
        name: named in errors.

    Raises:
        DecodeError: the image is damaged, cut short, of another number of axes, or not made of integers of 8 or 16
            bits.
    """
    if isinstance(image, np.ndarray):
        return MultiChannel(_checked(image, name))
    if not image:
        raise DecodeError(f"{name}: the file is empty.")
    try:
        if image.startswith(NPY):
            return MultiChannel(_checked(np.load(io.BytesIO(image), allow_pickle=False), name))
        if image.startswith(TIFF):
            return _read_tiff(image, name)
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise DecodeError(f"{name}: more pixels than {MAX_PIXELS:,}, the most read.")
            opened.load()
            pixels = np.asarray(opened.convert("RGB") if opened.mode in ("P", "CMYK") else opened)
        return MultiChannel(_checked(pixels, name))
    except (DecodeError, UserError):
        raise
    # Readers raise almost anything on damaged files: OSError, ValueError, struct.error, zlib.error, ...
    except Exception as error:
        # So tifffile names the package that reads a compression which it does not read itself.
        if "imagecodecs" in str(error):
            raise DecodeError(f"{name}: {error}: pip install imagecodecs.") from None
        raise DecodeError(f"{name}: damaged image ({error or type(error).__name__}).") from None


def in_order(image: MultiChannel, wanted: Sequence[str], name: str) -> np.ndarray:
    """Return the channels `wanted` of an image, in this order; all as they are stored if the file names none of them.

    Raises:
        DecodeError: the file names some of them, but not all.
    """
    if not set(image.names) & set(wanted):
        return image.pixels
    if missing := [channel for channel in wanted if channel not in image.names]:
        raise DecodeError(
            f"{name}: the channel {', '.join(missing)} is missing (the file names {', '.join(image.names)})."
        )
    if tuple(wanted) == image.names:
        return image.pixels
    return image.pixels[..., [image.names.index(channel) for channel in wanted]]


def read_channel_files(files: Mapping[str, Path]) -> MultiChannel:
    """Read one file per channel and stack them in the order given.

    Args:
        files: channel name → its file, each of one channel.

    Raises:
        DecodeError: a file is missing, damaged, of several channels, or of another size or type than the first.
    """
    planes: list[np.ndarray] = []
    for name, file in files.items():
        try:
            data = read_file(file)
        except DecodeError as error:
            raise DecodeError(f"{error} (channel {name})") from None
        pixels = read_channels(data, str(file)).pixels
        if pixels.shape[-1] != 1:
            raise DecodeError(
                f"{file}: {counted(pixels.shape[-1], 'channel')}, but one file per channel was expected."
            )
        if planes and (pixels.shape, pixels.dtype) != (planes[0].shape, planes[0].dtype):
            first = next(iter(files.values()))
            raise DecodeError(
                f"{file}: {pixels.dtype} {pixels.shape[:2]}, but {first.name} is {planes[0].dtype} "
                f"{planes[0].shape[:2]}: the channels of one image must agree."
            )
        planes.append(pixels)
    return MultiChannel(np.concatenate(planes, axis=-1), tuple(files))


def find_channel_files(
    folder: Path,
    pattern: str,
    channels: Sequence[str] | None = None,
    *,
    follow_links: bool = True,
) -> dict[tuple[tuple[str, str], ...], dict[str, Path]]:
    """Group the files of a folder into images by a naming pattern.

    Args:
        folder: searched with all its sub-folders.
        pattern: a path below the folder with fields in braces, of which `{channel}` names the channel and all others
            together the image: "{plate}_{well}_s{site}/ch{}_{channel}.png". A field matches up to the text that
            follows it, where possible so that `{well}` is letters and a number. `{}` matches anything and is forgotten.
        channels: the channels wanted, in this order; None: all that are found, by name.
        follow_links: list what links lead to outside the folder. Otherwise such a link is an error.

    Returns:
        (field, value) pairs of each image, sorted → channel → file. An image may lack channels.

    Raises:
        UserError: the pattern has no `{channel}`, no file matches it, two files match for one channel of an image, or
            several channels are found, but one for each image.
    """
    channels = None if channels is None else require_texts(channels, "channels")
    expressions = _expressions(pattern)
    if "channel" not in expressions[0].groupindex:
        raise UserError(
            f"{pattern!r} has no {{channel}}: say where a file's name holds its channel."
        )
    images: dict[tuple[tuple[str, str], ...], dict[str, Path]] = {}
    for file, fields in _matching(folder, expressions, follow_links):
        channel = fields.pop("channel")
        if channels is None or channel in channels:
            files = images.setdefault(tuple(sorted(fields.items())), {})
            if channel in files:
                raise UserError(
                    f"{printable(str(files[channel]))} and {printable(str(file))} are the channel {printable(channel)} "
                    f"of one image by {pattern!r}: name a field for the part in which they differ, or move one away."
                )
            files[channel] = file
    if not images:
        raise UserError(f"no file below {str(folder)!r} matches {pattern!r}.")
    if len(images) > 1 and all(len(found) == 1 for found in images.values()):
        _require_common_fields(images, pattern)
    order = (
        list(channels) if channels is not None else sorted({c for i in images.values() for c in i})
    )
    return {
        key: {name: found[name] for name in order if name in found}
        for key, found in sorted(images.items())
    }


def _require_common_fields(
    images: Mapping[tuple[tuple[str, str], ...], Mapping[str, Path]], pattern: str
) -> None:
    """Raise UserError if images of one channel each differ in a field that tells the channels apart, such as a number.

    Otherwise each channel of an image would count as an image of its own.
    """
    values: dict[str, dict[str, set[str]]] = {}
    for key, found in images.items():
        for name, value in key:
            values.setdefault(name, {}).setdefault(next(iter(found)), set()).add(value)
    for name, by_channel in values.items():
        apart = sum(map(len, by_channel.values())) == len(set().union(*by_channel.values()))
        without = {tuple(pair for pair in key if pair[0] != name) for key in images}
        if name not in _IDENTITY and len(by_channel) > 1 and apart and len(without) < len(images):
            raise UserError(
                f"each image by {pattern!r} has one channel, since {{{name}}} differs between the channels of an "
                "image: write {} for it."
            )


def _matching(
    folder: Path, expressions: Sequence[re.Pattern[str]], follow_links: bool
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the files of a folder whose path below it matches, sorted, with the fields of their names."""
    for file in sorted(map(Path, walk(folder, folder, follow_links=follow_links))):
        name = file.relative_to(folder).as_posix()
        matches = (expression.fullmatch(name) for expression in expressions)
        if match := next(filter(None, matches), None):
            yield file, match.groupdict()


def find_image_files(
    folder: Path, pattern: str, *, follow_links: bool = True
) -> dict[tuple[tuple[str, str], ...], Path]:
    """List the files of a folder, of all channels each, by the fields of a naming pattern.

    Args:
        folder: searched with all its sub-folders.
        pattern: as of `find_channel_files`, without `{channel}`.
        follow_links: list what links lead to outside the folder. Otherwise such a link is an error.

    Returns:
        (field, value) pairs of each image, sorted → its file.

    Raises:
        UserError: no file matches the pattern, or two files have the same values.
    """
    images: dict[tuple[tuple[str, str], ...], Path] = {}
    for file, fields in _matching(folder, _expressions(pattern), follow_links):
        key = tuple(sorted(fields.items()))
        if key in images:
            raise UserError(
                f"{printable(str(images[key]))} and {printable(str(file))} are one image by {pattern!r}: name a field "
                "for the part in which they differ, {channel} if that is the channel."
            )
        images[key] = file
    if not images:
        raise UserError(f"no file below {str(folder)!r} matches {pattern!r}.")
    return dict(sorted(images.items()))


def to_uint8(pixels: np.ndarray, depth: Depth = "full") -> UInt8[np.ndarray, "h w c"]:
    """Bring pixels `h w c` to 8 bits, channel by channel.

    full: values / 257 of 16-bit pixels, so 65535 becomes 255 and intensities stay comparable between images; 8-bit
    pixels are left alone. percentile: each channel's 0.1 and 99.9 percentiles become 0 and 255, which keeps dim stains
    visible and gives up absolute intensity.
    """
    if depth == "percentile":
        low, high = np.percentile(pixels, (0.1, 99.9), axis=(0, 1))
        scaled = (pixels - low) / np.maximum(high - low, 1.0)
        return np.round(np.clip(scaled, 0.0, 1.0) * 255.0).astype(np.uint8)
    if pixels.dtype == np.uint8:
        return pixels
    # Round(value / 257) in integers, exact for all 16-bit values.
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _checked(pixels: np.ndarray, name: str) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise DecodeError(
            f"{name}: an array of shape {pixels.shape} is no image (h, w) or (h, w, c)."
        )
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise DecodeError(
            f"{name}: {pixels.dtype} pixels have no fixed scale; save them as unsigned integers of 8 or 16 bits."
        )
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _read_tiff(image: bytes, name: str) -> MultiChannel:
    try:
        import tifffile
    except ImportError:
        raise UserError(
            f"{name}: TIFF files need tifffile: pip install 'fastvim-jax[cells]'."
        ) from None
    with errors_of(tifffile.logger(), name), _opened_tiff(image) as opened:
        seen: set[int] = set()
        for page in opened.pages:
            if page.offset in seen:  # tifffile would follow the pages around for ever.
                raise DecodeError(f"{name}: damaged image (its pages are linked in a circle).")
            seen.add(page.offset)
            end = max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
            if end > len(image):
                raise DecodeError(f"{name}: cut short ({len(image)} bytes of at least {end}).")
        series = opened.series[0]
        sides = dict(zip(series.axes, series.shape, strict=True))
        if (
            sides.get("Y", 1) * sides.get("X", 1) > MAX_PIXELS
            or math.prod(series.shape) > MAX_VALUES
        ):
            raise DecodeError(
                f"{name}: an image of shape {series.shape} has more than {MAX_PIXELS:,} pixels or {MAX_VALUES:,} "
                "values, the most read: cut it into tiles."
            )
        pixels, axes = series.asarray(), series.axes
        names = _ome_names(opened.ome_metadata)
    wanted = {"Y", "X"}
    kept = [
        (n, axis) for n, axis in zip(pixels.shape, axes, strict=True) if n > 1 or axis in wanted
    ]
    extra = [(n, axis) for n, axis in kept if axis not in wanted]
    if len(extra) > 1:
        raise DecodeError(
            f"{name}: a TIFF with the axes {axes} {pixels.shape}; one axis besides Y and X is read as channels: "
            "split stacks and time series into one file per image."
        )
    pixels = pixels.reshape([n for n, _ in kept])
    place = {axis: i for i, (_, axis) in enumerate(kept)}
    order = [place["Y"], place["X"], *(place[axis] for _, axis in extra)]
    pixels = _checked(np.ascontiguousarray(pixels.transpose(order)), name)
    return MultiChannel(pixels, names if len(names) == pixels.shape[-1] else ())


def _opened_tiff(image: bytes) -> Any:
    """Open a TIFF. One file of an OME set of several is opened as if alone: other files hold the set's other planes."""
    import tifffile

    opened = tifffile.TiffFile(io.BytesIO(image))
    if len(set(_FILE_NAME.findall(opened.ome_metadata or ""))) < 2:
        return opened
    opened.close()
    return tifffile.TiffFile(io.BytesIO(image), is_ome=False)


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
    """Return the channel names in OME-XML, or () where there is none or one has no name."""
    if (
        not isinstance(metadata, str) or "<!" in metadata
    ):  # No entities: they could expand without end.
        return ()
    try:
        root = ElementTree.fromstring(metadata)
    except ElementTree.ParseError:
        return ()
    channels = [element for element in root.iter() if element.tag.rpartition("}")[2] == "Channel"]
    names = tuple(channel.get("Name", "") for channel in channels)
    return names if all(names) else ()


_WELL = "[A-Za-z]{1,2}[0-9]{1,3}"


def _expressions(pattern: str) -> tuple[re.Pattern[str], ...]:
    """Return what a path is to match, the first one preferred: the name of a well, or else any text for `{well}`.

    Otherwise the well of 2023_A01.tif by {plate}_{well}.tif is A01, and that of BR_17_A01.tif is 17_A01.
    """
    whole = _expression(pattern, "[^/]+?")
    return (_expression(pattern, _WELL), whole) if "well" in whole.groupindex else (whole,)


def _expression(pattern: str, well: str) -> re.Pattern[str]:
    parts, seen = [], set()
    try:
        pieces = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise UserError(
            f"{pattern!r} is no pattern ({error}): close each brace, as {{well}}."
        ) from None
    for text, field, style, conversion in pieces:
        parts.append(re.escape(text))
        if style or conversion:
            raise UserError(
                f"{pattern!r}: write {{{field}}}, without {style or conversion!r} behind it."
            )
        if field is None:
            continue
        if not field:
            parts.append("[^/]*?")
        elif field in seen:
            parts.append(f"(?P={field})")
        elif field.isidentifier():
            seen.add(field)
            parts.append(f"(?P<{field}>{well if field == 'well' else '[^/]+?'})")
        else:
            raise UserError(f"{{{field}}} in {pattern!r} is no field name: use letters and digits.")
    return re.compile("".join(parts))

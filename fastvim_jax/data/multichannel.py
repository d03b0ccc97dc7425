"""Images of any number of channels: `.npy`, multi-page and multi-channel TIFF (OME names), PNG, one file per channel.

Every reader returns pixels `h w c` in the file's own integers and the channels' names, where the file has any;
`to_uint8` brings them to 8 bits by a rule that the caller chooses.
"""

from __future__ import annotations

import io
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from fastvim_jax.data.decode import FORMATS, MAX_PIXELS
from fastvim_jax.data.files import read_file, walk
from fastvim_jax.data.records import DecodeError, printable
from fastvim_jax.data.tiff import read_tiff
from fastvim_jax.errors import UserError, counted, require_texts

Depth = Literal["full", "percentile"]
NPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
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
            pixels, names = read_tiff(image, name)
            return MultiChannel(_checked(pixels, name), names)
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise DecodeError(f"{name}: more pixels than {MAX_PIXELS:,}, the most read.")
            opened.load()
            pixels = np.asarray(opened.convert("RGB") if opened.mode in ("P", "CMYK") else opened)
        return MultiChannel(_checked(pixels, name))
    except (DecodeError, UserError):
        raise
    except UnidentifiedImageError:
        raise DecodeError(
            f"{name}: not an image, or of a kind that is not read (.npy and {', '.join(FORMATS)} are; save the images "
            "of a microscope's own kind as OME-TIFF)."
        ) from None
    # Readers raise almost anything on damaged files: OSError, ValueError, struct.error, zlib.error, ...
    except Exception as error:
        # So tifffile names the package that reads a compression which it does not read itself.
        if "imagecodecs" in str(error):
            raise DecodeError(f"{name}: {error}: pip install imagecodecs.") from None
        raise DecodeError(f"{name}: damaged image ({error or type(error).__name__}).") from None


def in_order(image: MultiChannel, wanted: Sequence[str], name: str) -> np.ndarray:
    """Return the channels `wanted` of an image, in this order; all as they are stored if the file names none of them.

    Raises:
        DecodeError: the file names some of them, but not all, or one of them twice.
    """
    names = spelled_as(image.names, wanted)
    if not set(names) & set(wanted):
        return image.pixels
    if missing := [channel for channel in wanted if channel not in names]:
        raise DecodeError(
            f"{name}: the channel {', '.join(missing)} is missing (the file names {', '.join(image.names)})."
        )
    if twice := [channel for channel in wanted if names.count(channel) > 1]:
        raise DecodeError(
            f"{name}: several channels are called {twice[0]} (the file names {', '.join(image.names)})."
        )
    if tuple(wanted) == names:
        return image.pixels
    return image.pixels[..., [names.index(channel) for channel in wanted]]


def axes_hint(pixels: np.ndarray, channels: int) -> str:
    """Return what to do about an image `h w c` of another number of channels, if its first axis has that number."""
    if pixels.shape[0] != channels or pixels.shape[-1] == channels:
        return ""
    return " The first axis has that many: save arrays as height, width, channels."


def spelled_as(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Return names with the capitals of the known ones: dapi as DAPI, unless several known names differ in them only.

    Otherwise the channels of a file that calls them gfp and dapi would be taken in their order.
    """
    folded = [name.casefold() for name in known]
    of_folded = {
        key: name for key, name in zip(folded, known, strict=True) if folded.count(key) == 1
    }
    return tuple(n if n in known else of_folded.get(n.casefold(), n) for n in names)


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


def unmatched_files(folder: Path, pattern: str, *, follow_links: bool = True) -> list[str]:
    """List the files of a folder, by their paths below it, that a naming pattern does not match."""
    expressions = _expressions(pattern)
    files = walk(folder, folder, follow_links=follow_links)
    names = sorted(Path(file).relative_to(folder).as_posix() for file in files)
    return [name for name in names if not any(each.fullmatch(name) for each in expressions)]


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

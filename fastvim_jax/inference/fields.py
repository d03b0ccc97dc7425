"""Find the fields of view that files, folders and plates hold, and read the channels that a model knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from fastvim_jax.data.cells_config import CellsData
from fastvim_jax.data.files import read_file
from fastvim_jax.data.multichannel import (
    Depth,
    MultiChannel,
    find_channel_files,
    find_image_files,
    read_channel_files,
    read_channels,
    to_uint8,
)
from fastvim_jax.data.records import DecodeError
from fastvim_jax.data.sources.plate_images import PlateImages
from fastvim_jax.data.sources.plate_index import (
    INDEX,
    LOAD_DATA,
    Site,
    find_index,
    read_index,
)
from fastvim_jax.errors import UserError, counted, one_or_several


@dataclasses.dataclass(frozen=True)
class PlateSite:
    """A site of a plate's index, and the reader of its images."""

    images: PlateImages
    site: Site


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of view to embed.

    Attributes:
        metadata: the values that identify it, for example plate, well and site.
        files: one file with all channels; or one file per channel, by the channel's name; or a site of a plate's index.
    """

    metadata: dict[str, str]
    files: Path | dict[str, Path] | PlateSite

    @property
    def name(self) -> str:
        """Name of the field in messages."""
        return "_".join(self.metadata.values())

    @property
    def key(self) -> str:
        """Text that tells the field from all others: its metadata, files and plate."""
        files: Any = self.files
        if isinstance(files, PlateSite):
            files = (files.images.index, files.site)
        return repr((self.metadata, files))


def find_fields(
    paths: Sequence[Path] | Path,
    pattern: str | None,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> list[Field]:
    """List the fields that files, folders and plates hold.

    Args:
        paths: image files of all channels; the indices of plates (`plate_index`), or folders that hold one; with
            `pattern`, other folders.
        pattern: see `data.multichannel.find_channel_files`; without `{channel}`, each file holds all channels.
        note: called with what is to be said about an index.

    Raises:
        UserError: a path does not exist, no file matches the pattern, or an index cannot be read.
    """
    fields: list[Field] = []
    for path in map(Path, one_or_several(paths)):
        if not path.exists():
            raise UserError(f"{str(path)!r} does not exist.")
        if path.is_dir() and pattern is not None:
            if "{channel}" in pattern:
                found = find_channel_files(path, pattern)
                fields += [Field(dict(key), files) for key, files in found.items()]
            else:
                each = find_image_files(path, pattern)
                fields += [Field(dict(key), file) for key, file in each.items()]
        elif path.is_dir() and not any((path / name).is_file() for name in INDEX):
            raise UserError(
                f"{str(path)!r} is a folder: say with --pattern where the files' names hold plate, well, site and "
                'channel, for example "{plate}_{well}_s{site}/ch{}_{channel}.png"; without {channel}, each file holds '
                "all channels. A plate's folder without a pattern needs its load_data.csv."
            )
        elif path.is_dir() or path.name.endswith(LOAD_DATA):
            fields += _fields_of_plate(path, note)
        else:
            fields.append(Field({"file": str(path)}, path))
    return fields


def read_field(
    field: Field,
    data: CellsData,
    channels: Sequence[str] | None,
    rename: Mapping[str, str],
    depth: Depth,
) -> tuple[UInt8[np.ndarray, "h w k"], tuple[int, ...]]:
    """Read the channels of a field that the model knows, in the model's order, and return their numbers.

    Raises:
        DecodeError: a file is damaged, a channel asked for is missing, or the model knows none of the channels.
    """
    image = _read(field, data, rename)
    names = [rename.get(name, name) for name in image.names]
    wanted = [name for name in data.names if name in (channels or names)]
    if missing := [name for name in wanted if name not in names]:
        raise DecodeError(
            f"{field.name}: the channel {', '.join(missing)} is missing (found: {', '.join(names)})."
        )
    if not wanted:
        raise DecodeError(
            f"{field.name}: none of its channels {', '.join(names)} is one of the model's "
            f"({', '.join(data.names)}): say with --rename which is which."
        )
    pixels = to_uint8(image.pixels[..., [names.index(name) for name in wanted]], depth)
    return pixels, tuple(data.names.index(name) for name in wanted)


def _fields_of_plate(path: Path, note: Callable[[str], None]) -> list[Field]:
    index = find_index(str(path))
    sites, _, notes = read_index(index)
    for text in notes:
        note(text)
    images = PlateImages(index)
    fields = []
    for site in sites:
        known = {"plate": site.plate, "well": site.well, "site": site.site}
        metadata = {key: value for key, value in known.items() if value}
        if "site" not in metadata:
            metadata["id"] = site.name
        fields.append(Field(metadata, PlateSite(images, site)))
    return fields


def _read(field: Field, data: CellsData, rename: Mapping[str, str]) -> MultiChannel:
    if isinstance(field.files, dict):
        known = {n: f for n, f in field.files.items() if rename.get(n, n) in data.names}
        return read_channel_files(known or field.files)
    if isinstance(field.files, PlateSite):
        images, site = field.files.images, field.files.site
        there = [name for name in site.channels if site.file(name)]
        chosen = [name for name in there if rename.get(name, name) in data.names]
        if site.channels and not there:
            raise DecodeError(f"{images.name(site)}: the files of all its channels are missing.")
        image, _ = images.read(site, chosen or there)
        name = images.name(site)
    else:
        image, name = read_channels(read_file(field.files), str(field.files)), str(field.files)
    if image.names:
        return image
    if image.pixels.shape[-1] != data.channels:
        raise DecodeError(
            f"{name}: {counted(image.pixels.shape[-1], 'channel')} without names, but the model has {data.channels}."
        )
    return MultiChannel(image.pixels, data.names)

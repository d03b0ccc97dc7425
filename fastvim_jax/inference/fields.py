"""Find the fields of view that files, folders and plates hold, and read the channels that a model knows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from fastvim_jax.data.cells_config import CellsData
from fastvim_jax.data.files import read_file
from fastvim_jax.data.fingerprint import file_stamp
from fastvim_jax.data.multichannel import (
    Depth,
    MultiChannel,
    axes_hint,
    find_channel_files,
    find_image_files,
    read_channel_files,
    read_channels,
    spelled_as,
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
from fastvim_jax.errors import UserError, counted, one_or_several, suggest
from fastvim_jax.inference.embedding_table import same_well


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
        """Text that tells the field from all others: its metadata, files and plate. It changes when a file does."""
        files: Any = self.files
        named: Sequence[Path | str] = [files] if isinstance(files, Path) else ()
        if isinstance(files, PlateSite):
            named = [*files.site.files, *files.site.illumination]
            files = (files.images.index, files.site)
        elif isinstance(files, dict):
            named = list(files.values())
        stamps = []
        for file in named:
            with contextlib.suppress(OSError):  # Whoever reads it says that it is missing.
                stamps.append("" if "://" in str(file) else file_stamp(file))
        return repr((self.metadata, files, stamps))


def find_fields(
    paths: Sequence[str | Path] | str | Path,
    pattern: str | None,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> list[Field]:
    """List the fields that files, folders and plates hold.

    Args:
        paths: image files of all channels; the indices of plates (`plate_index`), on disk or at a URL, or folders that
            hold one; with `pattern`, other folders. Each counts once.
        pattern: see `data.multichannel.find_channel_files`; without `{channel}`, each file holds all channels.
        note: called with what is to be said about an index.

    Raises:
        UserError: a path does not exist, no file matches the pattern, an index cannot be read, or fields of two paths
            have the same metadata, so that their rows could not be told apart, and wells of two plates be averaged.
    """
    fields: list[Field] = []
    path_of: dict[tuple[tuple[str, str], ...], str] = {}
    for path in dict.fromkeys(map(str, one_or_several(paths))):
        of_path = _fields_of(path, pattern, note)
        for field in of_path:
            key = tuple(sorted(field.metadata.items()))
            if (other := path_of.setdefault(key, path)) != path:
                known = ", ".join(f"{k} {v}" for k, v in field.metadata.items())
                raise UserError(
                    f"{other!r} and {path!r} both hold a field of {known}: name the plate with {{plate}} in "
                    "--pattern or in the index's Metadata_Plate, or embed them one by one."
                )
        fields += of_path
    return fields


def _fields_of(name: str, pattern: str | None, note: Callable[[str], None]) -> list[Field]:
    """List the fields of one path; see `find_fields`."""
    if "://" in name:
        return _fields_of_plate(name, note)
    path = Path(name)
    if not path.exists():
        raise UserError(f"{str(path)!r} does not exist.")
    if path.is_dir() and pattern is not None:
        if "{channel}" in pattern:
            found = find_channel_files(path, pattern)
            return [Field(dict(key), files) for key, files in found.items()]
        each = find_image_files(path, pattern)
        return [Field(dict(key), file) for key, file in each.items()]
    if path.is_dir() and not any((path / name).is_file() for name in INDEX):
        raise UserError(
            f"{str(path)!r} is a folder: say with --pattern where the files' names hold plate, well, site and "
            'channel, for example "{plate}_{well}_s{site}/ch{}_{channel}.png"; without {channel}, each file holds '
            "all channels. A plate's folder without a pattern needs its load_data.csv."
        )
    if path.is_dir() or path.name.endswith(LOAD_DATA):
        return _fields_of_plate(name, note)
    return [Field({"file": str(path)}, path)]


def require_renamed(fields: Sequence[Field], rename: Mapping[str, str]) -> None:
    """Raise UserError if no field has a channel that is to be renamed, as far as that shows without reading files.

    A misspelt name would otherwise leave the channel out.
    """
    known: set[str] = set()
    for field in fields:
        named = field.files.site.channels if isinstance(field.files, PlateSite) else field.files
        if isinstance(named, Path) or not named:  # Its names lie in the file.
            return
        known.update(named)
    for name in rename:
        if name not in known:
            raise UserError(
                f"--rename {name}={rename[name]}: no field has a channel {name!r}, there are "
                f"{', '.join(sorted(known))}.{suggest(name, known)}"
            )


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
    image = _read(field, data, channels or data.names, rename)
    names = _model_names(image.names, data, rename)
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
    if alike := [name for name in wanted if names.count(name) > 1]:
        same = [own for own, name in zip(image.names, names, strict=True) if name == alike[0]]
        raise DecodeError(
            f"{field.name}: the channels {' and '.join(same)} would both be {alike[0]}: rename one of them to another "
            "name (--rename), for example to one that the model does not know."
        )
    pixels = to_uint8(image.pixels[..., [names.index(name) for name in wanted]], depth)
    return pixels, tuple(data.names.index(name) for name in wanted)


def _model_names(
    names: Sequence[str], data: CellsData, rename: Mapping[str, str]
) -> tuple[str, ...]:
    """Return what the model calls the channels of a file."""
    return spelled_as([rename.get(name, name) for name in names], data.names)


def _known(
    names: Sequence[str], data: CellsData, wanted: Sequence[str], rename: Mapping[str, str]
) -> list[str]:
    """Return those of the channels that are wanted, which the model knows."""
    called = zip(names, _model_names(names, data, rename), strict=True)
    return [name for name, own in called if own in wanted]


def _fields_of_plate(path: str, note: Callable[[str], None]) -> list[Field]:
    index = find_index(path)
    sites, _, notes = read_index(index)
    for text in notes:
        note(text)
    images = PlateImages(index)
    places = Counter((site.plate, same_well(site.well), site.site) for site in sites if site.site)
    fields, alike = [], 0
    for site in sites:
        known = {"plate": site.plate, "well": site.well, "site": site.site}
        metadata = {key: value for key, value in known.items() if value}
        several = places[site.plate, same_well(site.well), site.site] > 1
        alike += several
        if several and site.channels:  # The site's name says no more than plate, well and site.
            metadata["id"] = next((Path(file).name for file in site.files if file), site.name)
        elif several or not site.site or _has_id(site):
            metadata["id"] = site.name
        fields.append(Field(metadata, PlateSite(images, site)))
    if alike:
        note(
            f"{alike} rows of {index} have plate, well and site of another one, but other files: the column id tells "
            "them apart, and --per well averages over all."
        )
    return fields


def _has_id(site: Site) -> bool:
    """Return whether an index of one file per image names the image; otherwise its name is its path."""
    return not site.channels and not site.files[0].endswith(site.name)


def _read(
    field: Field, data: CellsData, wanted: Sequence[str], rename: Mapping[str, str]
) -> MultiChannel:
    """Read a field. Of files of one channel each, read those that are wanted: others may be damaged."""
    if isinstance(field.files, dict):
        known = _known(list(field.files), data, wanted, rename) or list(field.files)
        return read_channel_files({name: field.files[name] for name in known})
    if isinstance(field.files, PlateSite):
        images, site = field.files.images, field.files.site
        there = [name for name in site.channels if site.file(name)]
        chosen = _known(there, data, wanted, rename)
        if site.channels and not there:
            raise DecodeError(f"{images.name(site)}: the files of all its channels are missing.")
        image, _ = images.read(site, chosen or there)
        name = images.name(site)
    else:
        image, name = read_channels(read_file(field.files), str(field.files)), str(field.files)
    # A model that names no channels was trained on their order, whatever the files call them.
    if image.names and (data.channel_names or _known(image.names, data, data.names, rename)):
        return image
    if image.pixels.shape[-1] != data.channels:
        raise DecodeError(
            f"{name}: {counted(image.pixels.shape[-1], 'channel')} without names, but the model has {data.channels}."
            f"{axes_hint(image.pixels, data.channels)}"
        )
    return MultiChannel(image.pixels, data.names)

"""Read JUMP-CP plates: an index lists images with their wells, and the plate map labels the wells.

Images are on disk or in an object store. The index has one of two layouts:

- Parquet, as the published models were trained with. Columns: `path` (a `.npy` file or multi-channel image, absolute,
  relative to the index, or a URL), `well` and optionally `id`.
- CSV, as the Cell Painting Gallery has it (CellProfiler's load_data). Columns: `Metadata_Plate`, `Metadata_Well`,
  `Metadata_Site`; for each channel either `FileName_Orig<name>` and `PathName_Orig<name>` (one 16-bit TIFF per channel)
  or `URL_Orig<name>`; optionally `FileName_Illum<name>` (the illumination function, `.npy`, that divides the pixels).

A split is `train`, `val` or `test` (60, 20 and 20 % of the images, by a permutation of seed 0) or `all`. The plate's
kind comes before it unless the plate holds compounds: "crispr/train", "orf/all". Images of one well fall into several
splits, as for the published models. The generator of their permutation is not published, so the members differ.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastvim_jax.data.cells_channels import CHANNEL_ORDER
from fastvim_jax.data.files import read_file
from fastvim_jax.data.fingerprint import file_stamp
from fastvim_jax.data.multichannel import MultiChannel, read_channels, to_uint8
from fastvim_jax.data.records import DecodeError, Record
from fastvim_jax.data.sources.jump_target import PlateLabels, read_plate_labels, well_name
from fastvim_jax.errors import UserError, counted, suggest

SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
SPLIT_SEED = 0
ATTEMPTS = 4
"""Number of times that a file is requested from an object store, with pauses of 1, 2 and 4 seconds."""
INDEX = ("index.parquet", "load_data_with_illum.csv", "load_data.csv")


@dataclass(frozen=True)
class Site:
    """One field of view.

    Attributes:
        name: plate, well and site, or the id or path in a Parquet index.
        well: name of the well, as in the index.
        files: paths or URLs: one file with all channels, or one per channel.
        illumination: path or URL of each channel's illumination function, "" for a channel that has none, or ().
    """

    name: str
    well: str
    files: tuple[str, ...]
    illumination: tuple[str, ...] = ()


class JumpCpSource:
    """One split of a plate; records hold pixels uint8 `h w c` or the bytes of a file of all channels.

    Attributes:
        channel_names: names of the channels in order, or () if the index does not name them.
        notes: one line for each kind of image that was left out, with the reason.
    """

    def __init__(self, index: str, split: str, *, tables: Path | None = None) -> None:
        perturbation, _, part = split.rpartition("/")
        if part not in (*SHARES, "all"):
            raise UserError(
                f"The split {split!r} of a jump_cp source does not exist: use train, val, test or all, with compound/, "
                f"crispr/ or orf/ before it.{suggest(part, (*SHARES, 'all'))}"
            )
        self.index = find_index(index)
        folder = tables or Path(self.index).parent
        self._labels: PlateLabels = read_plate_labels(folder, perturbation or "compound")
        self.class_names = self._labels.class_names
        sites, self.channel_names, notes = read_index(self.index)
        self._sites, self._targets, left_out = _labelled(sites, self._labels)
        self.notes = (*notes, *left_out)
        if not self._sites:
            raise UserError(
                f"{self.index!r} has no image in a labelled well. {' '.join(self.notes)}"
            )
        if part != "all":
            chosen = split_numbers(len(self._sites), part)
            self._sites = [self._sites[i] for i in chosen]
            self._targets = self._targets[chosen]

    @property
    def labels(self) -> np.ndarray:
        """Every record's label, known without reading an image."""
        return self._targets

    @cached_property
    def _cache(self) -> Path:
        """Local folder for files of an object store; each index has its own."""
        digest = hashlib.blake2b(self.index.encode(), digest_size=8).hexdigest()
        folder = Path(tempfile.gettempdir()) / "fastvim-jump-cp" / digest
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        site = self._sites[index]
        name = f"{self.index}[{site.name}]"
        if not self.channel_names:
            return Record(self._read(site.files[0], name), int(self._targets[index]), name)
        image = self._stack(site, name)
        saturated = [self.channel_names[channel] for channel in image.saturated()]
        note = f"{name}: saturated in {', '.join(saturated)}." if saturated else ""
        if site.illumination:
            image = MultiChannel(self._corrected(image.pixels, site, name), image.names)
        return Record(to_uint8(image.pixels), int(self._targets[index]), name, note)

    def stamp(self, index: int) -> str:
        """Return a text that changes when a record does: its files' sizes and times, or their URLs.

        `fingerprint.Stamped` says what it is for.
        """
        site = self._sites[index]
        files = [*site.files, *site.illumination]
        stamps = [file if "://" in file or not file else file_stamp(file) for file in files]
        return " ".join([*stamps, str(self._targets[index]), site.name])

    def _stack(self, site: Site, name: str) -> MultiChannel:
        planes: list[np.ndarray] = []
        for channel, file in zip(self.channel_names, site.files, strict=True):
            if not file:
                raise DecodeError(f"{name}: the channel {channel} is missing.")
            pixels = read_channels(self._read(file, name), f"{name} {channel} ({file})").pixels
            if planes and (pixels.shape, pixels.dtype) != (planes[0].shape, planes[0].dtype):
                raise DecodeError(
                    f"{name}: the channel {channel} is {pixels.dtype} {pixels.shape}, the first one "
                    f"{planes[0].dtype} {planes[0].shape}."
                )
            planes.append(pixels)
        return MultiChannel(np.concatenate(planes, axis=-1), self.channel_names)

    def _corrected(self, pixels: np.ndarray, site: Site, name: str) -> np.ndarray:
        """Divide each channel by its illumination function, whose mean is near 1, and clip to the dtype's range."""
        top = np.iinfo(pixels.dtype).max
        corrected = pixels.copy()
        for channel, file in enumerate(site.illumination):
            if not file:
                continue
            try:
                function = np.load(io.BytesIO(self._read(file, name)), allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise DecodeError(
                    f"{name}: {file} is no illumination function ({error})."
                ) from None
            if function.shape != pixels.shape[:2] or not (function > 0).all():
                raise DecodeError(f"{name}: {file} is no illumination function of this image.")
            divided = pixels[..., channel] / function
            corrected[..., channel] = np.clip(np.round(divided), 0, top)
        return corrected

    def _read(self, file: str, name: str) -> bytes:
        """Return a file's bytes. A file of an object store is kept on the local disk once it was fetched."""
        if "://" not in file:
            try:
                return read_file(file)
            except DecodeError as error:
                raise DecodeError(f"{name}: {error}") from None
        kept = self._cache / hashlib.blake2b(file.encode(), digest_size=16).hexdigest()
        if kept.is_file():
            return kept.read_bytes()
        data = fetch(file)
        partial = kept.with_suffix(f".{np.random.default_rng().integers(2**63)}")
        partial.write_bytes(data)
        partial.replace(kept)
        return data


def fetch(url: str) -> bytes:
    """Read a file through fsspec, trying `ATTEMPTS` times.

    Raises:
        DecodeError: the store refuses the file, or none of the attempts succeeded.
        UserError: fsspec, or the package that it needs for this kind of store, is not installed.
    """
    try:
        import fsspec
    except ImportError:
        raise UserError(
            f"{url}: object stores need fsspec: pip install 'fastvim-jax[cells]'."
        ) from None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            with fsspec.open(url, "rb") as opened:
                return opened.read()
        except ImportError as error:
            raise UserError(f"{url}: {error}") from None
        except (FileNotFoundError, PermissionError) as error:
            raise DecodeError(f"{url}: {error or type(error).__name__}.") from None
        except Exception as error:  # Each store has errors of its own.
            last = error
    raise DecodeError(f"{url}: no answer in {ATTEMPTS} attempts ({last or type(last).__name__}).")


def find_index(path: str) -> str:
    """Return `path` if it is an index file or a URL, else the index file in the folder `path`.

    Raises:
        UserError: there is no index.
    """
    if "://" in path:
        return path
    given = Path(path)
    if given.is_file():
        return str(given)
    for name in INDEX:
        if (given / name).is_file():
            return str(given / name)
    raise UserError(
        f"{path!r} is no index of images and holds none of {', '.join(INDEX)} (data.path)."
    )


def split_numbers(count: int, part: str) -> np.ndarray:
    """Return the sorted numbers of a split's images out of `count`. They depend on `count` alone."""
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    low, high = (round(share * count) for share in SHARES[part])
    return np.sort(order[low:high])


def read_index(index: str) -> tuple[list[Site], tuple[str, ...], tuple[str, ...]]:
    """Read an index of either layout.

    Returns:
        The sites, the channels' names (() where a file holds all channels), and notes.

    Raises:
        UserError: the file is damaged or lacks a column.
    """
    data = fetch(index) if "://" in index else read_file(index)
    if index.endswith((".csv", ".csv.gz")):
        return _read_load_data(index, data)
    rows = _read_parquet(index, data)
    missing = [column for column in ("path", "well") if column not in rows]
    if missing:
        raise UserError(
            f"{index!r} has no column {', '.join(missing)} (found: {', '.join(rows) or 'none'})."
        )
    ids = rows.get("id", rows["path"])
    sites = [
        Site(str(name), str(well), (_absolute(index, str(path)),))
        for name, well, path in zip(ids, rows["well"], rows["path"], strict=True)
    ]
    return sites, (), ()


def _labelled(
    sites: list[Site], labels: PlateLabels
) -> tuple[list[Site], np.ndarray, tuple[str, ...]]:
    """Return the sites of labelled wells, their labels, and notes on the sites that were left out."""
    kept: list[Site] = []
    targets: list[int] = []
    unlabelled: list[str] = []
    unknown: list[str] = []
    for site in sites:
        try:
            label = labels.label(site.well)
        except UserError:
            unknown.append(site.well)
            continue
        if label is None:
            unlabelled.append(well_name(site.well))
            continue
        kept.append(site)
        targets.append(label)
    notes = []
    for wells, what in ((unlabelled, "in a well without a label"), (unknown, "whose well is none")):
        if wells:
            named = sorted(set(wells))
            shown = ", ".join(named[:8]) + (", ..." if len(named) > 8 else "")
            notes.append(f"left out: {counted(len(wells), 'image')} {what} ({shown}).")
    return kept, np.asarray(targets, np.int64), tuple(notes)


def _read_parquet(index: str, data: bytes) -> dict[str, list[Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{index}: Parquet files need pyarrow: pip install 'fastvim-jax[cells]'."
        ) from None
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
    except Exception as error:
        raise UserError(f"{index!r} cannot be read as Parquet: {error}") from None
    return table.to_pydict()


def _read_load_data(index: str, data: bytes) -> tuple[list[Site], tuple[str, ...], tuple[str, ...]]:
    """Read a load_data CSV. Channels come in the order of JUMP-CP; other channels follow in the CSV's order."""
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    columns = tuple(rows[0]) if rows else ()
    found = [c.removeprefix("FileName_Orig") for c in columns if c.startswith("FileName_Orig")]
    found = found or [c.removeprefix("URL_Orig") for c in columns if c.startswith("URL_Orig")]
    if not found or "Metadata_Well" not in columns:
        raise UserError(
            f"{index!r} is no load_data file of CellProfiler: it needs Metadata_Well and FileName_Orig<channel> or "
            f"URL_Orig<channel> (found: {', '.join(columns[:12]) or 'nothing'})."
        )
    place = {name: i for i, name in enumerate(CHANNEL_ORDER)}
    channels = tuple(sorted(found, key=lambda name: place.get(name, len(place))))
    files = _FilesBelow(Path(index).parent)
    sites: list[Site] = []
    for row in rows:
        known = [row.get(f"Metadata_{key}") for key in ("Plate", "Well", "Site")]
        name = "_".join(filter(None, known)) or f"row {len(sites) + 1}"
        originals = tuple(files.find(row, "Orig", channel) for channel in channels)
        illumination = tuple(files.illumination(row, channel) for channel in channels)
        illumination = illumination if any(illumination) else ()
        sites.append(Site(name, row["Metadata_Well"], originals, illumination))
    functions = {file for site in sites for file in site.illumination if file}
    if functions and not any("://" in file or Path(file).is_file() for file in functions):
        note = "The index names illumination functions, of which none is there: pixels are not corrected."
        sites = [dataclasses.replace(site, illumination=()) for site in sites]
        return sites, channels, (note,)
    return sites, channels, ()


class _FilesBelow:
    """Find files of a load_data CSV: at the path that it names, or else by name anywhere below the CSV's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for file in _files(self._folder):
            found.setdefault(file.name, []).append(file)
        return found

    def find(self, row: dict[str, str], kind: str, channel: str) -> str:
        """Return the path or URL of a channel's file, "" where there is none.

        Raises:
            UserError: several files have its name, and the path in the CSV does not tell them apart.
        """
        if url := row.get(f"URL_{kind}{channel}"):
            return url
        name = row.get(f"FileName_{kind}{channel}")
        if not name:
            return ""
        told = Path(row.get(f"PathName_{kind}{channel}") or "", name)
        for file in (told, self._folder / told):
            if file.is_file():
                return str(file)
        # Microscopes give the fields of every plate the same names, so folders decide.
        alike = [(_common_end(told, file), file) for file in self._by_name.get(name, [])]
        most = max((count for count, _ in alike), default=0)
        best = [file for count, file in alike if count == most]
        if len(best) > 1:
            raise UserError(
                f"{name!r} lies in several folders below {str(self._folder)!r}: {best[0]}, {best[1]}. Correct "
                f"PathName_{kind}{channel}, or put each plate's load_data file beside its own images."
            )
        return str(best[0]) if best else ""

    def illumination(self, row: dict[str, str], channel: str) -> str:
        """Return a channel's illumination function, "" where none is named; a named one may not exist."""
        name = row.get(f"FileName_Illum{channel}")
        found = self.find(row, "Illum", channel)
        return found or (str(self._folder / name) if name else "")


def _common_end(a: Path, b: Path) -> int:
    """Count the last parts in which two paths agree."""
    count = 0
    for one, other in zip(reversed(a.parts), reversed(b.parts), strict=False):
        if one != other:
            break
        count += 1
    return count


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


def _absolute(index: str, path: str) -> str:
    if "://" in path or Path(path).is_absolute():
        return path
    return f"{index.rpartition('/')[0]}/{path}" if "/" in index else path

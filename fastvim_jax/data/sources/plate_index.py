"""Read the index of a plate: which images there are, of which well, plate and site, and where their files lie.

An index has one of two layouts:

- one file per image, as the published models were trained with. A Parquet file with the columns `path` (a `.npy` file
  or multi-channel image, absolute, relative to the index, or a URL), `well` and optionally `id`, `plate` and `site`.
- one file per channel, as the Cell Painting Gallery has it (CellProfiler's load_data). A CSV file, perhaps compressed
  by gzip, or a Parquet file with the columns `Metadata_Plate`, `Metadata_Well`, `Metadata_Site`; for each channel
  either `FileName_Orig<name>` and `PathName_Orig<name>` (one 16-bit TIFF per channel, see `plate_files`) or
  `URL_Orig<name>`; optionally
  `FileName_Illum<name>` (the illumination function, `.npy`, that divides the pixels).
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvim_jax.data.cells_channels import CHANNEL_ORDER
from fastvim_jax.data.files import MAX_BYTES, read_file
from fastvim_jax.data.sources.object_store import fetch
from fastvim_jax.data.sources.plate_files import LocalFiles, RemoteFiles
from fastvim_jax.errors import UserError, counted

LOAD_DATA = (".csv", ".csv.gz", ".parquet")
INDEX = (
    "index.parquet",
    *(f"load_data_with_illum{ending}" for ending in LOAD_DATA),
    *(f"load_data{ending}" for ending in LOAD_DATA),
)
"""Names of an index in a plate's folder; the first that exists is read."""


@dataclass(frozen=True)
class Site:
    """One field of view.

    Attributes:
        name: plate, well and site, or the id or path in an index of one file per image.
        well: name of the well, as in the index.
        files: paths or URLs: one file with all channels, or one per channel, "" for one that is missing.
        illumination: path or URL of each channel's illumination function, "" for a channel that has none, or ().
        channels: names of the channels that `files` hold one by one, or () if one file holds all channels.
        plate: name of the plate, "" where the index does not say it.
        site: name of the site in its well, "" where the index does not say it.
    """

    name: str
    well: str
    files: tuple[str, ...]
    illumination: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    plate: str = ""
    site: str = ""

    def file(self, channel: str) -> str:
        """Return the path or URL of a channel's own file, "" if there is none."""
        files = dict(zip(self.channels, self.files, strict=True))
        return files.get(channel, "")


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


def read_index(index: str) -> tuple[list[Site], tuple[str, ...], tuple[str, ...]]:
    """Read an index of either layout. Of rows that are equal, for example of a table joined with itself, one counts.

    Returns:
        The sites, the channels' names (() where a file holds all channels), and notes.

    Raises:
        UserError: the file is damaged or lacks a column.
    """
    sites, channels, notes = _read_rows(index)
    seen: set[Site] = set()
    once: list[Site] = []
    for site in sites:
        # Rows whose files are missing look alike, and are counted one by one when they are read.
        if site not in seen or not all(site.files):
            once.append(site)
        seen.add(site)
    if repeated := len(sites) - len(once):
        rows = counted(repeated, "row repeats", "rows repeat")
        notes = (*notes, f"left out: {rows} another row of {index!r}.")
    return once, channels, notes


def _read_rows(index: str) -> tuple[list[Site], tuple[str, ...], tuple[str, ...]]:
    """Return what `read_index` does, with equal rows."""
    data = fetch(index) if "://" in index else read_file(index)
    is_csv = index.endswith((".csv", ".csv.gz"))
    rows = _read_csv(index, data) if is_csv else _read_parquet(index, data)
    if not rows:
        raise UserError(f"{index!r} has no row of an image.")
    columns = tuple(rows[0])
    if is_csv or _channels(columns):
        return _read_load_data(index, rows)
    missing = [column for column in ("path", "well") if column not in columns]
    if missing:
        raise UserError(
            f"{index!r} has no column {', '.join(missing)} (found: {', '.join(columns)})."
        )
    sites = [
        Site(
            row.get("id") or row["path"],
            row["well"],
            (_absolute(index, row["path"]),),
            plate=row.get("plate", ""),
            site=row.get("site", ""),
        )
        for row in rows
    ]
    return sites, (), ()


def _read_csv(index: str, data: bytes) -> list[dict[str, str]]:
    """Read a CSV file with a header, perhaps compressed by gzip. A value that a row lacks is ""."""
    try:
        if data.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
                data = packed.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise UserError(f"{index!r} has more than {MAX_BYTES:,} bytes: it is no index.")
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        reader = csv.DictReader(io.StringIO(text), restval="")
        return [{k: v for k, v in row.items() if k is not None} for row in reader]
    except UserError:
        raise
    except (csv.Error, ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{index!r} cannot be read as CSV: {error}.") from None


def _read_parquet(index: str, data: bytes) -> list[dict[str, str]]:
    """Read a Parquet file as texts. A missing value is "", a whole number has no point.

    Otherwise site 1 would be called 1.0 where another site has no number, because pandas then writes floats.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{index}: Parquet files need pyarrow: pip install 'fastvim-jax[cells]'."
        ) from None
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except Exception as error:
        raise UserError(f"{index!r} cannot be read as Parquet: {error}") from None
    return [{k: _text(v) for k, v in row.items()} for row in rows]


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _channels(columns: Sequence[str]) -> tuple[str, ...]:
    """Return the channels of a load_data table in the order of its columns."""
    prefixes = ("FileName_Orig", "URL_Orig")
    return tuple(
        dict.fromkeys(c.removeprefix(p) for p in prefixes for c in columns if c.startswith(p))
    )


def _read_load_data(
    index: str, rows: list[dict[str, str]]
) -> tuple[list[Site], tuple[str, ...], tuple[str, ...]]:
    """Read a load_data table. Channels come in the order of JUMP-CP; other channels follow in the table's order."""
    columns = tuple(rows[0])
    found = _channels(columns)
    if not found or "Metadata_Well" not in columns:
        raise UserError(
            f"{index!r} is no load_data file of CellProfiler: it needs Metadata_Well and FileName_Orig<channel> or "
            f"URL_Orig<channel> (found: {', '.join(columns[:12])[:200]})."
        )
    place = {name: i for i, name in enumerate(CHANNEL_ORDER)}
    channels = tuple(sorted(found, key=lambda name: place.get(name, len(place))))
    files = RemoteFiles(index) if "://" in index else LocalFiles(index)
    files.learn(rows, channels)
    sites: list[Site] = []
    for row in rows:
        plate, well, site = (row.get(f"Metadata_{key}", "") for key in ("Plate", "Well", "Site"))
        name = "_".join(filter(None, (plate, well, site))) or f"row {len(sites) + 1}"
        originals = tuple(files.find(row, "Orig", channel) for channel in channels)
        illumination = tuple(files.illumination(row, channel) for channel in channels)
        illumination = illumination if any(illumination) else ()
        sites.append(Site(name, well, originals, illumination, channels, plate, site))
    if isinstance(files, RemoteFiles) and sites and not any(any(site.files) for site in sites):
        raise UserError(
            f"{index!r} names files in PathName_Orig... and FileName_Orig..., of which none lies below "
            f"{files.folder!r}. Put the table above its images, or name them in URL_Orig<channel>."
        )
    functions = {file for site in sites for file in site.illumination if file}
    if functions and functions <= files.missing:
        note = "The index names illumination functions, of which none is there: pixels are not corrected."
        sites = [dataclasses.replace(site, illumination=()) for site in sites]
        return sites, channels, (note,)
    return sites, channels, ()


def _absolute(index: str, path: str) -> str:
    if "://" in path or Path(path).is_absolute():
        return path
    return f"{index.rpartition('/')[0]}/{path}" if "/" in index else path

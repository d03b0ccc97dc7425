"""Scan a data set: read and decode every record once, and list the problems that training would meet."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from PIL import Image

from fastvim_jax.data.decode import decode_image, open_header, orientation
from fastvim_jax.data.multichannel import MultiChannel, in_order, read_channels
from fastvim_jax.data.prepare.processes import map_source
from fastvim_jax.data.prepare.shards import Progress, sha256
from fastvim_jax.data.records import DecodeError, Record, Source, read_record
from fastvim_jax.data.sources.array_record import ArrayRecordSource
from fastvim_jax.data.sources.image_folder import ImageFolderSource
from fastvim_jax.data.sources.jump_cp import JumpCpSource
from fastvim_jax.data.sources.part import SourcePart
from fastvim_jax.data.sources.pixels import PixelsSource
from fastvim_jax.data.sources.prepared import PreparedSplit
from fastvim_jax.data.stacks import as_stack
from fastvim_jax.errors import counted

_CHUNK = 256
_EMPTY = 100  # classes without a record that are listed one by one


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: `undecodable`, `label` (outside the classes), `conflict` (one image under several labels), `empty class`,
            `checksum`, `alike` (all images look the same), or `channels` (their number differs).
        message: what and where, in a line.
        index: the record's number in its split, or None.
    """

    kind: str
    message: str
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The findings of a scan of one split.

    Attributes:
        records: records scanned.
        classes: number of classes.
        counts: records of each class, by label.
        problems: texts that say what is wrong.
        duplicates: records whose image another record of the same label holds too (harmless, but counted).
        unread: files in an image folder's split that are no record: of an unknown extension, or of no class.
        digests: index of one record for every image met, by a digest of its bytes.
        damaged_metadata: images whose EXIF cannot be read; they are taken as upright.
        channels: largest number of channels of an image that is no photograph (`.npy`, or with named channels), 0 if
            all are photographs.
        absent: classes without a record, where that is no problem (`_may_lack_classes`).
        notes: what the source left out, such as images in wells without a label, one line for each reason.
    """

    records: int
    classes: int
    counts: dict[int, int]
    problems: tuple[Problem, ...]
    duplicates: int
    unread: tuple[str, ...]
    digests: dict[bytes, int]
    damaged_metadata: int = 0
    channels: int = 0
    absent: int = 0
    notes: tuple[str, ...] = ()


def check(source: Source, *, workers: int = 0, progress: Progress | None = None) -> Report:
    """Read and decode every record of a source.

    Args:
        source: a source opened with `any_label=True`, so that a label outside the classes does not stop the scan.
        workers: processes.
        progress: called with the records done and their total.
    """
    problems: list[Problem] = []
    if isinstance(source, (ArrayRecordSource, PixelsSource)):
        problems += _wrong_checksums(source)
    parts = [range(len(source))[start : start + _CHUNK] for start in range(0, len(source), _CHUNK)]
    scanned: list[_Scanned] = []
    for _, found in map_source(_scan, source, parts, workers=workers):
        scanned += found
        if progress:
            progress(len(scanned), len(source))
    scanned.sort(key=lambda record: record.index)
    names = source.class_names
    same: dict[bytes, list[_Scanned]] = defaultdict(list)
    for record in scanned:
        if record.error:
            problems.append(Problem("undecodable", record.error, record.index))
        if record.label is not None and not 0 <= record.label < len(names):
            message = (
                f"{_where(source, record.index)}: label {record.label}, outside the "
                f"{counted(len(names), 'class', 'classes')}."
            )
            problems.append(Problem("label", message, record.index))
        if record.digest:
            same[record.digest].append(record)
    duplicates = 0
    for records in same.values():
        labels = {record.label for record in records}
        duplicates += len(records) - 1 if len(labels) == 1 else 0
        if len(labels) > 1:
            places = "; ".join(
                f"{_where(source, r.index)} as {_name(names, r.label)}" for r in records[:5]
            )
            problems.append(
                Problem(
                    "conflict", f"the same image has several labels: {places}", records[0].index
                )
            )
    pictures = Counter(record.picture for record in scanned if record.picture)
    if len(pictures) == 1 and pictures.total() > 1:
        message = (
            f"all {pictures.total()} images look the same: {_where(source, 0)} and all others."
        )
        problems.append(Problem("alike", message))
    channels = Counter(record.channels for record in scanned if record.channels)
    if len(channels) > 1:
        many = ", ".join(f"{count} of {number}" for number, count in sorted(channels.items()))
        problems.append(Problem("channels", f"images differ in their number of channels: {many}."))
    counts = Counter(record.label for record in scanned if record.label is not None)
    empty = [label for label in range(len(names)) if not counts[label]]
    absent = len(empty) if _may_lack_classes(source) else 0
    empty = [] if absent else empty
    problems += [
        Problem("empty class", f"class {label} ({names[label]}) has no record.")
        for label in empty[:_EMPTY]
    ]
    if len(empty) > _EMPTY:
        more = counted(len(empty) - _EMPTY, "class has", "classes have")
        message = f"{more} no record either, of {len(names)} classes."
        problems.append(Problem("empty class", message))
    digests = {digest: records[0].index for digest, records in same.items()}
    return Report(
        len(source),
        len(names),
        dict(sorted(counts.items())),
        tuple(problems),
        duplicates,
        tuple(source.unread()) if isinstance(source, ImageFolderSource) else (),
        digests,
        sum(record.damaged_metadata for record in scanned),
        max(channels, default=0),
        absent,
        tuple(getattr(source, "notes", ())),
    )


def _may_lack_classes(source: Source) -> bool:
    """Return whether a source is a part of something whose classes are known: of a split, or of JUMP-CP's plates."""
    if isinstance(source, (SourcePart, JumpCpSource)):
        return True
    origin = source.manifest.get("origin") if isinstance(source, PreparedSplit) else None
    return isinstance(origin, dict) and origin.get("source") == "jump_cp"


@dataclasses.dataclass(frozen=True)
class _Scanned:
    index: int
    label: int | None
    digest: bytes
    picture: bytes
    error: str | None
    damaged_metadata: bool = False
    channels: int = 0


def _scan(source: Source, indices: range) -> list[_Scanned]:
    return list(_scan_records(source, indices))


def _scan_records(source: Source, indices: range) -> Iterator[_Scanned]:
    names = tuple(getattr(source, "channel_names", ()))
    for index in indices:
        try:
            record = read_record(source, index)
        except DecodeError as error:
            yield _Scanned(index, None, b"", b"", str(error))
            continue
        picture, channels, error_text, damaged = b"", 0, None, False
        try:
            if (stack := _stack_of(record, names)) is not None:
                picture, channels = _channels_of(stack, names, record.name)
            else:
                decoded = decode_image(record.image, channels=3, name=record.name)
                small = decoded.resize((16, 16), Image.Resampling.BOX)
                picture = hashlib.blake2b(small.tobytes(), digest_size=16).digest()
                if isinstance(record.image, bytes) and b"exif" in record.image.lower():
                    damaged = not orientation(open_header(record.image, record.name))[1]
        except DecodeError as error:
            error_text = str(error)
        yield _Scanned(
            index, record.target, _digest(record), picture, error_text, damaged, channels
        )


def _stack_of(record: Record, names: tuple[str, ...]) -> MultiChannel | None:
    """Decode an image of many channels (docs/cells.md); return None for a photograph.

    Raises:
        DecodeError: the image cannot be read.
    """
    image = record.image
    if names or (
        isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] not in (1, 3, 4)
    ):
        return read_channels(image, record.name)
    return None if isinstance(image, np.ndarray) else as_stack(image, record.name)


def _channels_of(stack: MultiChannel, names: tuple[str, ...], name: str) -> tuple[bytes, int]:
    """Return a digest of 16 x 16 pixels of each channel, and the number of channels.

    Raises:
        DecodeError: the channels are not those that the data set names.
    """
    pixels = in_order(stack, names, name)
    if names and pixels.shape[-1] != len(names):
        raise DecodeError(
            f"{name}: {counted(pixels.shape[-1], 'channel')}, but the data set names {len(names)}."
        )
    rows, columns = (np.arange(16) * side // 16 for side in pixels.shape[:2])
    small = np.ascontiguousarray(pixels[rows[:, None], columns])
    return hashlib.blake2b(small.tobytes(), digest_size=16).digest(), pixels.shape[-1]


def _digest(record: Record) -> bytes:
    image = record.image
    if isinstance(image, np.ndarray):
        data = f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes()
    else:
        data = image
    return hashlib.blake2b(data, digest_size=16).digest() if data else b""


def _wrong_checksums(source: ArrayRecordSource | PixelsSource) -> Iterator[Problem]:
    for file, shard in zip(source.files, source.shards, strict=True):
        if sha256(file) != shard["sha256"]:
            yield Problem("checksum", f"{file} is not the file that was written: it has changed.")


def _where(source: Source, index: int) -> str:
    """Name a record, also one that cannot be read any more."""
    try:
        return read_record(source, index).name
    except DecodeError:
        return f"record {index}"


def _name(names: tuple[str, ...], label: int | None) -> str:
    return names[label] if label is not None and 0 <= label < len(names) else str(label)

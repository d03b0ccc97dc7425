"""A scan of a data set that lists what training would trip over: every record is read and decoded once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from fastvim_jax.data.decode import decode_image
from fastvim_jax.data.prepare.processes import map_source
from fastvim_jax.data.prepare.shards import Progress, sha256
from fastvim_jax.data.records import DecodeError, Record, Source
from fastvim_jax.data.sources.array_record import ArrayRecordSource
from fastvim_jax.data.sources.image_folder import ImageFolderSource

_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: `undecodable`, `label` (outside the classes), `conflict` (one image under several labels), `empty class`
            or `checksum`.
        message: what and where, in a line.
        index: the record's number in its split, or None.
    """

    kind: str
    message: str
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a scan of one split found.

    Attributes:
        records: records scanned.
        classes: number of classes.
        counts: records of each class, by label.
        problems: what is wrong.
        duplicates: records whose image another record of the same label holds too (harmless, but counted).
        unread: files in an image folder's split that are no record: of an unknown extension, or of no class.
        digests: index of one record for every image met, by a digest of its bytes.
    """

    records: int
    classes: int
    counts: dict[int, int]
    problems: tuple[Problem, ...]
    duplicates: int
    unread: tuple[str, ...]
    digests: dict[bytes, int]


def check(source: Source, *, workers: int = 0, progress: Progress | None = None) -> Report:
    """Read and decode every record of a source.

    Args:
        source: opened with `any_label=True`, lest a label outside the classes stops it.
        workers: processes.
        progress: called with the records done and their total.
    """
    problems: list[Problem] = []
    if isinstance(source, ArrayRecordSource):
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
            message = f"{source[record.index].name}: label {record.label}, but there are {len(names)} classes."
            problems.append(Problem("label", message, record.index))
        if record.digest:
            same[record.digest].append(record)
    duplicates = 0
    for records in same.values():
        labels = {record.label for record in records}
        duplicates += len(records) - 1 if len(labels) == 1 else 0
        if len(labels) > 1:
            places = "; ".join(
                f"{source[r.index].name} as {_name(names, r.label)}" for r in records[:5]
            )
            problems.append(
                Problem(
                    "conflict", f"the same image has several labels: {places}", records[0].index
                )
            )
    counts = Counter(record.label for record in scanned if record.label is not None)
    problems += [
        Problem("empty class", f"class {label} ({name}) has no record.")
        for label, name in enumerate(names)
        if not counts[label]
    ]
    digests = {digest: records[0].index for digest, records in same.items()}
    return Report(
        len(source),
        len(names),
        dict(sorted(counts.items())),
        tuple(problems),
        duplicates,
        tuple(source.unread()) if isinstance(source, ImageFolderSource) else (),
        digests,
    )


@dataclasses.dataclass(frozen=True)
class _Scanned:
    index: int
    label: int | None
    digest: bytes
    error: str | None


def _scan(source: Source, indices: range) -> list[_Scanned]:
    return list(_scan_records(source, indices))


def _scan_records(source: Source, indices: range) -> Iterator[_Scanned]:
    for index in indices:
        try:
            record = source[index]
        except OSError as error:
            yield _Scanned(index, None, b"", f"{error.filename}: {error.strerror or error}.")
            continue
        except DecodeError as error:
            yield _Scanned(index, None, b"", str(error))
            continue
        try:
            decode_image(record.image, channels=3, name=record.name)
            error_text = None
        except DecodeError as error:
            error_text = str(error)
        yield _Scanned(index, record.target, _digest(record), error_text)


def _digest(record: Record) -> bytes:
    image = record.image
    if isinstance(image, np.ndarray):
        data = f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes()
    else:
        data = image
    return hashlib.blake2b(data, digest_size=16).digest() if data else b""


def _wrong_checksums(source: ArrayRecordSource) -> Iterator[Problem]:
    for file, shard in zip(source.files, source.shards, strict=True):
        if sha256(file) != shard["sha256"]:
            yield Problem("checksum", f"{file} is not the file that was written: it has changed.")


def _name(names: tuple[str, ...], label: int | None) -> str:
    return names[label] if label is not None and 0 <= label < len(names) else str(label)

"""Turn any source into shards of encoded images or of pixels: checksummed, and resumable shard by shard.

A shard is written under a temporary name, flushed to the disk and renamed; only then does it enter the manifest,
which is itself replaced in one step. Whatever was finished when a run was killed is kept by the next, unless the
records it was made of have changed since.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvim_jax.data.fingerprint import fingerprint
from fastvim_jax.data.prepare.encoding import JPEG_QUALITY, EncodedShard, PixelShard
from fastvim_jax.data.prepare.processes import map_source
from fastvim_jax.data.prepare.writing import explain_shard_errors
from fastvim_jax.data.records import DecodeError, Source, printable, read_record
from fastvim_jax.data.sources.array_record import FORMAT
from fastvim_jax.data.sources.labels import refuse_stray_labels, stray_label
from fastvim_jax.data.sources.manifest import SOURCES_BY_FORMAT, check_manifest
from fastvim_jax.data.sources.pixels import FORMAT as PIXELS_FORMAT
from fastvim_jax.errors import UserError
from fastvim_jax.json_text import parse_json
from fastvim_jax.lock import locked_beside

SHARD_RECORDS = 4096

Progress = Callable[[int, int], None]
"""Function of the number of records done and their total."""


@dataclass(frozen=True)
class Prepared:
    """The result of a preparation.

    Attributes:
        manifest: the split's manifest file.
        records: number of records written.
        shards: number of shards.
        kept: number of shards that existed already.
        changed: number of shards that existed, but were written again because their records have changed.
        bytes: size of all shards together.
        left_out: names of undecodable records that were left out.
        notes: warnings about records that were written nevertheless.
    """

    manifest: Path
    records: int
    shards: int
    kept: int
    changed: int
    bytes: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Task:
    number: int
    start: int
    stop: int
    file: Path
    max_size: int | None
    pixels: int | None


def prepare(
    source: Source,
    out: Path | str,
    split: str,
    *,
    max_size: int | None = None,
    pixels: int | None = None,
    shard_records: int = SHARD_RECORDS,
    workers: int = 0,
    max_corrupt: int = 0,
    origin: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Write a source as shards `<out>/<split>-00000-of-000NN.array_record` and their manifest `<out>/<split>.json`.

    With `pixels`, the shards are `.pixels` files of decoded images (`sources.pixels`).

    Args:
        source: where the records come from; their order is kept.
        out: folder, made if need be.
        split: what the split is to be called.
        max_size: images whose shorter side is longer are reduced to it (bicubic, JPEG at `JPEG_QUALITY`), upright and
            in 8 bits; all others, and all images if None, keep their bytes. Pixel arrays become PNG.
        pixels: decode every image, reduce it as `max_size` would, and store its pixels instead of a file.
        shard_records: records per shard.
        workers: processes.
        max_corrupt: undecodable records left out (and named in the manifest) before the preparation stops. Without
            `max_size` nothing is decoded: `check` finds such records.
        origin: what to note of where the records came from; a resumed preparation must have the same. Finished shards
            are kept if their records have not changed (`fingerprint`), and written again otherwise.
        progress: called after every shard.

    Raises:
        UserError: for an impossible argument, a folder that cannot be written or holds the split with other settings,
            or a label outside the classes: before anything is written if the source knows its labels.
        DecodeError: when more than `max_corrupt` records are undecodable.
    """
    for name, value, least in (
        ("max_size", max_size, 1), ("pixels", pixels, 1),
        ("shard_records", shard_records, 1), ("max_corrupt", max_corrupt, 0),
    ):  # fmt: skip
        if value is not None and value < least:
            raise UserError(f"{name} is {value}, but must be at least {least}.")
    if pixels is not None and max_size is not None:
        raise UserError("max_size and pixels both say how large images are stored: give one.")
    channel_names = tuple(getattr(source, "channel_names", ()))
    if pixels is not None and len(channel_names) not in (0, 1, 3):
        raise UserError(
            f"shards of pixels hold photographs, but these images have {len(channel_names)} channels: leave pixels out "
            "(--pixels); the pixels of channels are stored in any case."
        )
    if split.endswith("]"):
        advice = (
            f"prepare the whole, and take the part when training (--data.train-split {split!r})"
        )
        raise UserError(f"{split!r} is a part of a split, and no prepared split's name: {advice}.")
    if not split or Path(split).name != split:
        raise UserError(f"{split!r} cannot be a split's name here: give it a plain name.")
    folder = Path(out)
    # ArrayRecord's writer takes only UTF-8, and no system takes a null character.
    if printable(str(folder)) != str(folder) or "\0" in str(folder):
        raise UserError(
            f"{str(folder)!r} cannot be a folder for shards: its name must be UTF-8 without null characters."
        )
    refuse_stray_labels(source)
    fresh: dict[str, Any] = {
        "format": FORMAT if pixels is None else PIXELS_FORMAT,
        "complete": False,
        "split": split,
        "source_records": len(source),
        "class_names": list(source.class_names),
        "settings": {
            "shard_records": shard_records,
            **(
                {"max_size": max_size, "jpeg_quality": JPEG_QUALITY}
                if pixels is None
                else {"pixels": pixels}
            ),
        },
        "origin": origin or {},
        "left_out": {},
        "shards": {},
    }
    if channel_names:
        fresh["channel_names"] = list(channel_names)
    with contextlib.ExitStack() as opened:
        with explain_shard_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            opened.enter_context(locked_beside(folder / split, "folder"))
        return _write_shards(source, folder, fresh, workers, max_corrupt, progress)


def _write_shards(
    source: Source,
    folder: Path,
    fresh: dict[str, Any],
    workers: int,
    max_corrupt: int,
    progress: Progress | None,
) -> Prepared:
    """Write the shards that are missing, and the manifest, which begins as `fresh`."""
    split, settings = fresh["split"], fresh["settings"]
    shard_records, max_size, pixels = (
        settings.get(name) for name in ("shard_records", "max_size", "pixels")
    )
    file = folder / f"{split}.json"
    manifest = _resumed(file, fresh) if file.is_file() else fresh
    for leftover in folder.glob(f".{split}-*.tmp"):
        with explain_shard_errors(folder):
            leftover.unlink()
    count = -(-len(source) // shard_records)
    suffix = "array_record" if pixels is None else "pixels"
    finished, left_out, tasks, changed = manifest["shards"], manifest["left_out"], [], 0
    for number in range(count):
        shard = folder / f"{split}-{number:05}-of-{count:05}.{suffix}"
        key = str(number)
        start = number * shard_records
        stop = min(start + shard_records, len(source))
        if key in finished and shard.is_file():
            # The source may have been mended since: a shard is kept only if its records are the same.
            same = finished[key].get("source") == fingerprint(source, start, stop)
            if same and finished[key]["sha256"] == sha256(shard):
                continue
            changed += not same
        finished.pop(key, None)
        left_out.pop(key, None)
        tasks.append(_Task(number, start, stop, shard, max_size, pixels))
    done = len(source) - sum(task.stop - task.start for task in tasks)
    manifest["complete"] = not tasks
    _write_json(file, manifest)
    if progress:
        progress(done, len(source))
    for task, (entry, corrupt) in map_source(_write_shard, source, tasks, workers=workers):
        finished[str(task.number)] = entry
        if corrupt:
            left_out[str(task.number)] = corrupt
        manifest["complete"] = len(finished) == count
        absent = sum(map(len, left_out.values()))
        if absent > max_corrupt:
            raise DecodeError(
                f"{corrupt[-1]}\n{absent} undecodable record(s); max_corrupt allows {max_corrupt}. "
                "Mend or remove the file and give the command again, or raise max_corrupt."
            )
        _write_json(file, manifest)
        done += task.stop - task.start
        if progress:
            progress(done, len(source))
    return Prepared(
        file,
        sum(entry["records"] for entry in finished.values()),
        count,
        count - len(tasks),
        changed,
        sum(entry["bytes"] for entry in finished.values()),
        tuple(reason for reasons in left_out.values() for reason in reasons),
        tuple(note for entry in finished.values() for note in entry.get("notes", ())),
    )


def sha256(file: Path) -> str:
    """Compute the SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_shard(source: Source, task: _Task) -> tuple[dict[str, Any], list[str]]:
    """Write one shard; return its entry in the manifest, and why records were left out."""
    temporary = task.file.with_name(f".{task.file.name}.{os.getpid()}.tmp")
    folder = task.file.parent
    corrupt: list[str] = []
    notes: list[str] = []
    # Taken first: what changes while the shard is written is found by the next run.
    made_of = fingerprint(source, task.start, task.stop)
    try:
        with explain_shard_errors(folder):
            writer: Any = PixelShard(temporary) if task.pixels else EncodedShard(temporary)
        for index in range(task.start, task.stop):
            try:
                record = read_record(source, index)
                if not 0 <= record.target < len(source.class_names):
                    raise UserError(
                        stray_label(record.name, record.target, len(source.class_names))
                    )
                image = writer.encoded(record, task.pixels or task.max_size)
            except DecodeError as error:
                corrupt.append(str(error))
                continue
            if record.note:
                notes.append(record.note)
            with explain_shard_errors(folder):
                writer.write(image, record)
        with explain_shard_errors(folder):
            writer.close()
            with temporary.open("rb") as opened:
                os.fsync(opened.fileno())
        entry = {
            "file": task.file.name,
            "records": task.stop - task.start - len(corrupt),
            "bytes": temporary.stat().st_size,
            "sha256": sha256(temporary),
            "source": made_of,
        }
        if notes:
            entry["notes"] = notes
        with explain_shard_errors(folder):
            os.replace(temporary, task.file)
    finally:
        temporary.unlink(missing_ok=True)
    return entry, corrupt


def _resumed(file: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """Read the manifest of an earlier start, if it is of the same preparation."""
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") not in SOURCES_BY_FORMAT:
        raise UserError(f"{str(file)!r} exists and is no manifest of ours: choose another folder.")
    if "channel_names" in fresh:
        # Manifests of earlier versions do not name the channels. Their shards are judged by the records alone, whose
        # fingerprints depend on the order of the channels.
        found.setdefault("channel_names", fresh["channel_names"])
    keys = ("format", "source_records", "class_names", "channel_names", "settings", "origin")
    changed = [key for key in keys if found.get(key) != fresh.get(key)]
    if changed:
        raise UserError(
            f"{str(file)!r} holds this split prepared with other {', '.join(changed)}: choose another folder, "
            "or remove that file."
        )
    check_manifest(found, file)
    return found


def _write_json(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    with explain_shard_errors(file.parent):
        with temporary.open("w", encoding="utf-8") as opened:
            json.dump(content, opened, indent=1, ensure_ascii=False)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)

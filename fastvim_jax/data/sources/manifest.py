"""Manifests of prepared splits: `<root>/<split>.json`, which lists the shards that `fastvim data prepare` wrote.

A manifest holds the format, class names, settings, and each shard's file, number of records, bytes and SHA-256.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvim_jax.data.files import read_file
from fastvim_jax.data.records import DecodeError, printable
from fastvim_jax.errors import UserError, suggest
from fastvim_jax.json_text import parse_json

SOURCES_BY_FORMAT = {"fastvim-array-record-1": "array_record", "fastvim-pixels-1": "pixels"}
"""Name of the source that reads each format."""


def read_manifest(root: Path, split: str, format: str) -> dict[str, Any]:
    """Read the manifest of a finished split.

    Raises:
        UserError: when there is none, it cannot be read, is of another format, or the preparation was not finished.
    """
    file = root / f"{split}.json"
    if not file.is_file():
        splits = prepared_splits(root, SOURCES_BY_FORMAT[format])
        raise UserError(
            f"{str(file)!r} does not exist; prepared splits found there: {', '.join(splits) or 'none'}."
            + suggest(split, splits)
        )
    manifest = _load(file)
    found = manifest.get("format")
    if found != format and isinstance(found, str) and found in SOURCES_BY_FORMAT:
        raise UserError(
            f"{str(file)!r} lists shards of the source {SOURCES_BY_FORMAT[found]}: set data.source to it."
        )
    if found != format:
        raise UserError(f"{str(file)!r} is no manifest that `fastvim data prepare` wrote.")
    if not manifest.get("complete"):
        raise UserError(
            f"{str(file)!r}: the preparation was not finished; give the same `fastvim data prepare` command again."
        )
    check_manifest(manifest, file)
    if len(manifest["shards"]) != _count(manifest["shards"]) or _records(manifest) != manifest.get(
        "source_records"
    ):
        raise UserError(f"{str(file)!r} lacks shards or records: prepare the split again.")
    return manifest


def check_manifest(manifest: dict[str, Any], file: Path) -> None:
    """Check the types of a manifest's fields, because files that were edited or damaged hold anything.

    Raises:
        UserError: naming the first field that is not as `fastvim data prepare` writes it.
    """

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(
            isinstance(each, str) and printable(each) == each for each in value
        )

    def whole(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**53

    sound: dict[str, Any] = {
        "source_records": whole,
        "class_names": texts,
        "channel_names": lambda value: value is None or texts(value),
        "shards": lambda value: isinstance(value, dict),
        "left_out": lambda value: isinstance(value, dict) and all(map(texts, value.values())),
    }
    wrong = [name for name, fits in sound.items() if not fits(manifest.get(name))]
    of_shard = {"file": str, "records": whole, "bytes": whole, "sha256": str}
    for number, shard in {} if wrong else manifest["shards"].items():
        for name, kind in of_shard.items():
            value = shard.get(name) if isinstance(shard, dict) else None
            if not (isinstance(value, str) if kind is str else whole(value)):
                wrong.append(f"shards.{number}.{name}")
    if wrong:
        raise UserError(
            f"{str(file)!r} is damaged: {printable(wrong[0])} is not what `fastvim data prepare` writes. Remove the "
            "file and prepare the split again."
        )


def _count(shards: dict[str, Any]) -> int:
    """Count the shards that are numbered from 0 without a gap."""
    return next(number for number in range(len(shards) + 1) if str(number) not in shards)


def _records(manifest: dict[str, Any]) -> int:
    """Count the records in the shards, and those that were left out."""
    written = sum(shard["records"] for shard in manifest["shards"].values())
    return written + sum(map(len, manifest["left_out"].values()))


def prepared_splits(root: Path, source: str) -> list[str]:
    """List the splits in a folder that `fastvim data prepare` wrote for a source, finished or not."""
    return sorted(f.stem for f in root.glob("*.json") if _source_of(f) == source)


def find_shards(
    root: Path, split: str, manifest: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Return the manifest's entries of the shards, in order, and their files.

    Raises:
        UserError: when a shard is missing, lies elsewhere, or has another size.
    """
    entries = manifest["shards"]
    shards = [entries[str(number)] for number in range(len(entries))]
    for shard in shards:
        if Path(shard["file"]).name != shard["file"]:
            raise UserError(f"The manifest of {split!r} names a shard outside its own folder.")
    files = [root / shard["file"] for shard in shards]
    for file, shard in zip(files, shards, strict=True):
        if not file.is_file():
            raise UserError(f"The shard {str(file)!r} is missing: prepare the split again.")
        if file.stat().st_size != shard["bytes"]:
            raise UserError(
                f"The shard {str(file)!r} has {file.stat().st_size} bytes, but its manifest says "
                f"{shard['bytes']}: it was changed or copied in part; prepare the split again."
            )
    return shards, files


def _source_of(file: Path) -> str | None:
    found = _load(file).get("format")
    return SOURCES_BY_FORMAT.get(found) if isinstance(found, str) else None


def _load(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_file(file))
    except (DecodeError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

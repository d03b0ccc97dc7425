"""Manifests of prepared splits: `<root>/<split>.json`, which lists the shards that `fastvim data prepare` wrote.

A manifest holds the format, class names, settings, and each shard's file, number of records, bytes and SHA-256.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    return manifest


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
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

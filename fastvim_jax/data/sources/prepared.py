"""Define what all formats of prepared shards share: manifest, first record of each shard, classes, checked labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastvim_jax.data.records import DecodeError
from fastvim_jax.data.sources.class_lists import read_class_list
from fastvim_jax.data.sources.manifest import find_shards, read_manifest
from fastvim_jax.errors import counted


class PreparedSplit:
    """One prepared split, whose shards may differ in length. Sources of each format derive from it.

    Attributes:
        manifest: the manifest's content.
        shards: the manifest's entries of the shards.
        files: the shards' files.
        class_names: those of the class list, or else of the manifest.
        channel_names: names of the channels in order, where the source of the shards knew them.
    """

    def __init__(
        self, root: Path, split: str, format: str, class_list: Path | None, any_label: bool
    ) -> None:
        self.manifest: dict[str, Any] = read_manifest(root, split, format)
        self.shards, self.files = find_shards(root, split, self.manifest)
        # Where each shard begins, and the end of the last.
        counts = [shard["records"] for shard in self.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        names = read_class_list(class_list).names if class_list else self.manifest["class_names"]
        self.class_names = tuple(names)
        self.channel_names = tuple(self.manifest.get("channel_names", ()))
        self._any_label = any_label

    def __len__(self) -> int:
        return int(self._starts[-1])

    def stamp(self, index: int) -> str:
        """Return what changes with a record: its shard's checksum (`fingerprint.Stamped`)."""
        shard, place = self._find(index)
        return f"{self.shards[shard]['sha256']}[{place}]"

    def _find(self, index: int) -> tuple[int, int]:
        """Return a record's shard, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _check_label(self, label: int, name: str) -> int:
        if not (self._any_label or 0 <= label < len(self.class_names)):
            raise DecodeError(
                f"{name}: the label {label} is outside the {counted(len(self.class_names), 'class', 'classes')}."
            )
        return label

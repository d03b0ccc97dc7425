"""Read JUMP-CP plates: an index lists images with their wells (`plate_index`), and the plate map labels the wells.

A split is `train`, `val` or `test` (60, 20 and 20 % of the images, by a permutation of seed 0) or `all`. The plate's
kind comes before it unless the plate holds compounds: "crispr/train", "orf/all". Images of one well fall into several
splits, as for the published models. The generator of their permutation is not published, so the members differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastvim_jax.data.fingerprint import file_stamp
from fastvim_jax.data.multichannel import to_uint8
from fastvim_jax.data.records import Record
from fastvim_jax.data.sources.jump_target import PlateLabels, read_plate_labels, well_name
from fastvim_jax.data.sources.plate_images import PlateImages
from fastvim_jax.data.sources.plate_index import Site, find_index, read_index
from fastvim_jax.errors import UserError, counted, suggest

SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
SPLIT_SEED = 0


class JumpCpSource:
    """One split of a plate; records hold pixels uint8 `h w c` or the bytes of a file of all channels.

    Args:
        index: path or URL of the index, or the folder that holds it.
        split: see above.
        tables: folder of the plate maps and metadata; None: the index's folder.
        channels: channels to read, in this order, of an index of one file per channel; (): all.

    Attributes:
        channel_names: names of the channels in order, or () if the index does not name them.
        notes: one line for each kind of image that was left out, with the reason.
    """

    def __init__(
        self,
        index: str,
        split: str,
        *,
        tables: Path | None = None,
        channels: Sequence[str] = (),
    ) -> None:
        perturbation, _, part = split.rpartition("/")
        if part not in (*SHARES, "all"):
            raise UserError(
                f"The split {split!r} of a jump_cp source does not exist: use train, val, test or all, with compound/, "
                f"crispr/ or orf/ before it.{suggest(part, (*SHARES, 'all'))}"
            )
        self.index = find_index(index)
        if tables is None and "://" in self.index:
            raise UserError(
                f"{self.index!r} is a URL: name the folder of the plate maps and metadata of JUMP-Target-1 as class "
                "list (data.class_list; --class-list)."
            )
        self._images = PlateImages(self.index)
        folder = tables or Path(self.index).parent
        self._labels: PlateLabels = read_plate_labels(folder, perturbation or "compound")
        self.class_names = self._labels.class_names
        sites, found, notes = read_index(self.index)
        if found and (unknown := [name for name in channels if name not in found]):
            raise UserError(
                f"{self.index!r} has no channel {', '.join(unknown)}, but {', '.join(found)} (data.channel_names; "
                f"--channels).{suggest(unknown[0], found)}"
            )
        self.channel_names = tuple(channels) if found and channels else found
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

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        site, target = self._sites[index], int(self._targets[index])
        image, saturated = self._images.read(site, self.channel_names or None)
        name = self._images.name(site)
        note = f"{name}: saturated in {', '.join(saturated)}." if saturated else ""
        if not site.channels and image.names:  # Its names decide which channel is which.
            return Record(self._images.encoded(site), target, name, note)
        return Record(to_uint8(image.pixels), target, name, note)

    def stamp(self, index: int) -> str:
        """Return a text that changes when a record does: what disks and object stores say of its files.

        `fingerprint.Stamped` says what it is for.

        Raises:
            OSError: a file is not there.
            UserError: an object store does not answer.
        """
        site = self._sites[index]
        read = [site.channels.index(channel) for channel in self.channel_names] or [0]
        named = [site.files[i] for i in read] + [
            site.illumination[i] for i in read if site.illumination
        ]
        files = [file for file in named if file]
        remote = list(dict.fromkeys(file for file in files if "://" in file))
        versions = dict(zip(remote, self._images.versions(remote), strict=True))
        stamps = [f"{f} {versions[f]}" if f in versions else file_stamp(f) for f in files]
        return " ".join([*stamps, str(self._targets[index]), site.name])


def split_numbers(count: int, part: str) -> np.ndarray:
    """Return the sorted numbers of a split's images out of `count`. They depend on `count` alone."""
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    low, high = (round(share * count) for share in SHARES[part])
    return np.sort(order[low:high])


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
            named = sorted({well or "no name" for well in wells})
            shown = ", ".join(named[:8]) + (", ..." if len(named) > 8 else "")
            notes.append(f"left out: {counted(len(wells), 'image')} {what} ({shown}).")
    return kept, np.asarray(targets, np.int64), tuple(notes)

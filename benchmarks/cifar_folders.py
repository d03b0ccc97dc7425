"""Write CIFAR-10 photographs as two data sets of class folders, for the table of fine-tuning in docs/your_images.md.

    python benchmarks/cifar_folders.py $FASTVIM_DATA_DIR/cifar10 --out .

`source` holds the first 400 training images of each of the first 7 classes, and their first 50 test images to evaluate
on. `target` holds the first 40 training images of each of the 3 other classes, and their first 200 test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

SETS = {"source": (range(7), 400, 50), "target": (range(7, 10), 40, 200)}
"""Labels, training images per class, and test images per class."""


def write(packed: Path, out: Path) -> None:
    """Write both data sets, each image with the bytes of its JPEG file.

    Args:
        packed: folder of `train.npz` and `test.npz` (data.source packed_npz).
        out: folder to write `source` and `target` to.
    """
    from fastvim_jax.data.sources.packed_npz import PackedNpzSource

    for place, (split, read) in enumerate((("train", "train"), ("val", "test"))):
        images = PackedNpzSource(packed, read)
        for name, (classes, *counts) in SETS.items():
            for label in classes:
                folder = out / name / split / images.class_names[label]
                folder.mkdir(parents=True, exist_ok=True)
                for i in np.flatnonzero(images.labels == label)[: counts[place]].tolist():
                    (folder / f"{i:05}.jpg").write_bytes(images[i].image)


def main() -> None:
    """Write the folders that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("packed", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write(options.packed, options.out)


if __name__ == "__main__":
    main()

"""Make random images for the data tests, and find the real ones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support import data_dir


@pytest.fixture
def real_data() -> Path:
    folder = data_dir()
    if folder is None:
        pytest.skip("no real images: set FASTVIM_DATA_DIR, or put them in ../shared/data")
    return folder


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def image_tree(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Write a folder of three classes, 23 + 7 + 0 training images of several sizes; "test" lacks the first class."""
    for split, counts in {"train": (23, 7, 0), "test": (0, 4, 2)}.items():
        for name, count in zip(("ant", "bee", "cat"), counts, strict=True):
            if split == "test" and count == 0:
                continue
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                shape = (*rng.integers(9, 40, size=2), 3)
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                (tmp_path / split / name / f"{i:02}.png").write_bytes(
                    encode(Image.fromarray(pixels), "PNG")
                )
    return tmp_path


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Return a plate of four wells: a control, two genes, and one whose reagent is not in the metadata."""
    stem = tmp_path / "JUMP-Target-1_compound"
    Path(f"{stem}_platemap.tsv").write_text(
        "well_position\tbroad_sample\nA01\t\nA02\tB\nA03\tA\nA04\tunknown\n"
    )
    Path(f"{stem}_metadata.tsv").write_text("broad_sample\ttarget\nA\tZZZ\nB\tAAA\n\t\n")
    return tmp_path

"""Tell images of many channels from photographs: TIFFs of pages, planes and samples, and photographs."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import DecodeError, Record, open_source
from fastvim_jax.data.multichannel import read_channels
from fastvim_jax.data.prepare.check import check
from fastvim_jax.data.prepare.encoding import as_pixels, encoded
from fastvim_jax.data.stacks import as_stack

tifffile = pytest.importorskip("tifffile")
BANDS = {
    "pages": {"photometric": "minisblack", "planarconfig": None},
    "planes": {"photometric": "minisblack", "planarconfig": "separate"},
    "samples": {"photometric": "minisblack", "planarconfig": "contig"},
    "compressed": {
        "photometric": "minisblack",
        "planarconfig": "contig",
        "compression": "deflate",
    },
}


def tiff(pixels: np.ndarray, kind: str) -> bytes:
    """Return pixels `h w c` as a TIFF whose channels are pages, planes or samples."""
    file, options = io.BytesIO(), BANDS[kind]
    laid = pixels if options["planarconfig"] == "contig" else np.moveaxis(pixels, -1, 0)
    tifffile.imwrite(file, laid, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", BANDS)
@pytest.mark.parametrize(
    ("bands", "dtype"), [(13, np.uint16), (4, np.uint16), (2, np.uint16), (5, np.uint8)]
)
def test_bands_of_satellite_images_are_channels(
    kind: str, bands: int, dtype: Any, rng: np.random.Generator, tmp_path: Path, capfd: Any
) -> None:
    """Check and prepare every way in which a TIFF holds bands; shards of pixels refuse it by name."""
    pixels = rng.integers(0, np.iinfo(dtype).max, (24, 16, bands)).astype(dtype)
    data = tiff(pixels, kind)
    stack = as_stack(data, "a")
    assert stack is not None and np.array_equal(stack.pixels, pixels)
    folder = tmp_path / "train" / "lake"
    folder.mkdir(parents=True)
    for i in range(2):
        (folder / f"{i}.tif").write_bytes(tiff(pixels + np.asarray(i, dtype), kind))
    report = check(open_source("image_folder", "train", path=str(tmp_path)))
    assert (report.problems, report.channels) == ((), bands)
    assert encoded(Record(data, 0, "a"), 16) == data
    reduced = encoded(Record(data, 0, "a"), 8)
    assert read_channels(reduced, "a").pixels.shape == (12, 8, bands)
    with pytest.raises(DecodeError, match=rf"a: shards of pixels .* has {bands} channels"):
        as_pixels(Record(data, 0, "a"), 8)
    assert not capfd.readouterr().err, "readers of photographs complained of the bands"


def test_photographs_are_no_stacks(rng: np.random.Generator) -> None:
    """Leave colour, transparency, grey and grey with transparency to the readers of photographs."""
    for mode in ("RGB", "RGBA", "L", "LA", "I;16", "CMYK"):
        picture = Image.fromarray(rng.integers(0, 256, (9, 8, 4), np.uint8))
        file = io.BytesIO()
        deep = Image.fromarray(rng.integers(0, 60000, (9, 8)).astype(np.uint16))
        (deep if mode == "I;16" else picture.convert(mode)).save(file, "TIFF")
        assert as_stack(file.getvalue(), mode) is None
        assert as_pixels(Record(file.getvalue(), 0, mode), None).shape[:2] == (9, 8)
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG")
    assert as_stack(file.getvalue(), "png") is None
    with pytest.raises(DecodeError, match=r"^cut: "):
        as_stack(tiff(rng.integers(0, 9, (9, 8, 5)).astype(np.uint8), "samples")[:-20], "cut")


def test_a_compression_that_needs_a_package_is_no_damage(rng: np.random.Generator) -> None:
    if importlib.util.find_spec("imagecodecs"):
        pytest.skip("imagecodecs is installed")
    bands = io.BytesIO(tiff(rng.integers(0, 256, (9, 8, 5), np.uint8), "samples"))
    with tifffile.TiffFile(bands, mode="r+") as opened:
        opened.pages[0].tags["Compression"].overwrite(5)  # LZW, which Pillow reads of fewer bands.
    with pytest.raises(DecodeError, match=r"^bands: .*LZW.* package: pip install imagecodecs\.$"):
        as_stack(bands.getvalue(), "bands")

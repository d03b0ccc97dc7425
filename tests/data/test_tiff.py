"""TIFF files of any number of channels: pages written one by one, several images, depth and time, compression."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import DecodeError
from fastvim_jax.data.multichannel import read_channels
from fastvim_jax.data.stacks import as_stack
from fastvim_jax.data.tiff import SeveralImages, _ome_names

tifffile = pytest.importorskip("tifffile")


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 65536, (6, 9, 3)).astype(np.uint16)


def tiff(*writes: tuple[np.ndarray, dict[str, Any]], ome: bool = False) -> bytes:
    """Return a TIFF of one image for each pair of pixels and options."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file, ome=ome) as writer:
        for image, options in writes:
            writer.write(image, **options)
    return file.getvalue()


def test_pages_written_one_by_one_are_channels(pixels: np.ndarray) -> None:
    """Read all of them: tifffile calls each page a series, of which only the first was read."""
    data = tiff(*((pixels[..., i], {}) for i in range(3)))
    assert np.array_equal(read_channels(data, "a").pixels, pixels)
    stack = as_stack(data, "a")
    assert stack is not None and np.array_equal(stack.pixels, pixels)


@pytest.mark.parametrize("kind", ["sizes", "dtypes", "scenes", "grey scenes"])
def test_a_file_of_several_images_is_refused(kind: str, pixels: np.ndarray) -> None:
    """Name how many it holds: the first one was read, and scenes of OME lost their channels' names."""
    plane = pixels[..., 0]
    names = {"axes": "CYX", "Channel": {"Name": ["A", "B", "C"]}}
    scene = (np.moveaxis(pixels, -1, 0), {"metadata": names})
    data = {
        "sizes": tiff((plane, {}), (plane[:3], {})),
        "dtypes": tiff((plane, {}), (plane.astype(np.uint8), {})),
        "scenes": tiff(scene, scene, ome=True),
        "grey scenes": tiff((plane, {}), (plane, {}), ome=True),
    }[kind]
    with pytest.raises(SeveralImages, match=r"^a: the file holds 2 images, of shape .*: save one"):
        read_channels(data, "a")


def test_thumbnails_are_no_images(pixels: np.ndarray) -> None:
    """Leave a reduced copy out, and a grey photograph with a second page of another size to its own readers."""
    plane = pixels[..., 0]
    for small in (plane[::2, ::2], plane[:2, :5]):  # tifffile takes the first one for a pyramid.
        reduced = (small, {"subfiletype": 1, "metadata": None})
        found = read_channels(tiff((plane, {"metadata": None}), reduced), "a")
        assert np.array_equal(found.pixels[..., 0], plane)
    assert as_stack(tiff((plane, {}), (plane[::2, ::2], {})), "a") is None


@pytest.mark.parametrize(("axis", "what"), [("Z", "3 planes in depth"), ("T", "3 times")])
def test_depth_and_time_are_no_channels(axis: str, what: str, pixels: np.ndarray) -> None:
    """Refuse what OME metadata call so: three planes of one stain passed for three stains."""
    planes = np.moveaxis(pixels, -1, 0)
    options = {"metadata": {"axes": f"{axis}YX", "Channel": {"Name": ["DNA"]}}}
    with pytest.raises(DecodeError, match=rf"^a: by its OME metadata the file holds {what}"):
        read_channels(tiff((planes, options), ome=True), "a")


def test_planes_of_imagej_are_channels(pixels: np.ndarray) -> None:
    """Read a stack that ImageJ saved: it calls planes slices in depth where nobody named them."""
    file = io.BytesIO()
    tifffile.imwrite(file, np.moveaxis(pixels, -1, 0), imagej=True, metadata={"axes": "ZYX"})
    assert np.array_equal(read_channels(file.getvalue(), "a").pixels, pixels)


def test_names_of_an_ome_set_count_where_all_its_images_agree(pixels: np.ndarray) -> None:
    """Take the names of a set's images, which each of its files lists all, unless they differ."""
    own, other = ["A", "B", "C"], ["C", "B", "A"]

    def read(*of_images: list[str]) -> tuple[str, ...]:
        images = "".join(
            f'<Image ID="Image:{i}"><Pixels ID="Pixels:{i}" DimensionOrder="XYCZT" Type="uint16" SizeX="9" SizeY="6" '
            'SizeC="3" SizeZ="1" SizeT="1">'
            + "".join(f'<Channel ID="C:{i}:{j}" Name="{n}"/>' for j, n in enumerate(names))
            + f'<TiffData PlaneCount="3"><UUID FileName="{i}.ome.tif">urn:uuid:{i}</UUID></TiffData></Pixels></Image>'
            for i, names in enumerate(of_images)
        )
        space = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
        text = f'<?xml version="1.0" encoding="UTF-8"?><OME UUID="urn:uuid:0" xmlns="{space}">{images}</OME>'
        options = {"description": text.encode(), "metadata": None, "photometric": "minisblack"}
        found = read_channels(tiff((np.moveaxis(pixels, -1, 0), options)), "a")
        assert np.array_equal(found.pixels, pixels)
        return found.names

    assert read(own, own) == read([" A", "B", "C"]) == tuple(own)
    assert read(own, other) == ()


@pytest.mark.parametrize("mode", ["I;16", "L", "RGB"])
def test_lzw_is_read_without_another_package(mode: str, rng: np.random.Generator) -> None:
    """Read what microscopes write, by Pillow where tifffile has no decompressor."""
    dtype: Any = np.uint16 if mode == "I;16" else np.uint8
    shape = (6, 9, 3) if mode == "RGB" else (6, 9)
    pages = [rng.integers(0, np.iinfo(dtype).max, shape).astype(dtype) for _ in range(2)]
    count = 1 if mode == "RGB" else 2
    first, *more = (Image.fromarray(page) for page in pages[:count])
    file = io.BytesIO()
    first.save(file, "TIFF", save_all=True, append_images=more, compression="tiff_lzw")
    found = read_channels(file.getvalue(), "a").pixels
    assert found.dtype == dtype
    assert np.array_equal(found, pages[0] if mode == "RGB" else np.stack(pages, axis=-1))
    with pytest.raises(DecodeError, match=r"^a: (damaged|cut short)"):
        read_channels(file.getvalue()[: len(file.getvalue()) // 2], "a")


@pytest.mark.parametrize(("tag", "value"), [("Orientation", 3), ("ExtraSamples", 1)])
def test_pillow_changes_no_number(tag: str, value: int, rng: np.random.Generator) -> None:
    """Leave to imagecodecs what Pillow would turn, or divide by its transparency."""
    if importlib.util.find_spec("imagecodecs"):
        pytest.skip("imagecodecs is installed")
    file, image = io.BytesIO(), rng.integers(1, 255, (6, 9, 4)).astype(np.uint8)
    Image.fromarray(image).save(file, "TIFF", compression="tiff_lzw", tiffinfo={274: 1})
    assert np.array_equal(read_channels(file.getvalue(), "a").pixels, image)
    changed = io.BytesIO(file.getvalue())
    with tifffile.TiffFile(changed, mode="r+") as opened:
        opened.pages[0].tags[tag].overwrite(value)
    with pytest.raises(DecodeError, match=r"^a: .*LZW.* package: pip install imagecodecs\.$"):
        read_channels(changed.getvalue(), "a")


def test_names_with_entities_are_none() -> None:
    """An entity may stand for itself many times over, and fill the memory."""
    image = '<OME><Image><Pixels><Channel Name="{}"/></Pixels></Image></OME>'
    assert _ome_names(image.format("DNA")) == ("DNA",)
    assert _ome_names('<!DOCTYPE OME [<!ENTITY a "DNA">]>' + image.format("&a;")) == ()

"""Readers of images with any number of channels: what they return, and what they refuse."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data.multichannel import (
    MultiChannel,
    find_channel_files,
    find_image_files,
    in_order,
    read_channel_files,
    read_channels,
    to_uint8,
)
from fastvim_jax.data.records import DecodeError
from fastvim_jax.errors import UserError
from tests.support import data_dir


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 65536, (6, 9, 5)).astype(np.uint16)


def test_npy_comes_back_as_it_was_written(pixels: np.ndarray) -> None:
    assert np.array_equal(read_channels(npy(pixels), "a").pixels, pixels)
    assert np.array_equal(read_channels(npy(pixels.astype(">u2")), "a").pixels, pixels)
    assert read_channels(npy(pixels[..., 0]), "a").pixels.shape == (6, 9, 1)


def test_tiff_pages_are_channels_and_ome_names_them(pixels: np.ndarray, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    names = ["Mito", "AGP", "RNA", "ER", "DNA"]
    file = tmp_path / "a.ome.tif"
    planes = pixels.transpose(2, 0, 1)
    tifffile.imwrite(file, planes, metadata={"axes": "CYX", "Channel": {"Name": names}})
    image = read_channels(file.read_bytes(), "a")
    assert image.names == tuple(names) and np.array_equal(image.pixels, pixels)
    tifffile.imwrite(file, planes)
    image = read_channels(file.read_bytes(), "a")
    assert image.names == () and np.array_equal(image.pixels, pixels)
    for kept in (len(file.read_bytes()) // 2, 12):
        with pytest.raises(DecodeError, match=r"^a: (damaged|cut short)"):
            read_channels(file.read_bytes()[:kept], "a")


def test_one_file_of_an_ome_set_is_read_alone(pixels: np.ndarray) -> None:
    """Read a channel whose metadata name the files of the other channels, and a file that names itself twice."""
    tifffile = pytest.importorskip("tifffile")
    start = (
        '<?xml version="1.0" encoding="UTF-8"?><OME UUID="urn:uuid:own.ome.tif" '
        'xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="9" SizeY="6" SizeC="2" SizeZ="1" '
        'SizeT="1"><Channel ID="C:0" Name="DNA"/><Channel ID="C:1" Name="ER"/>'
    )
    planes = pixels[..., :2].transpose(2, 0, 1)

    def read(stored: np.ndarray, *files: str) -> MultiChannel:
        described = "".join(
            f'<TiffData FirstC="{i}" IFD="{i if len(stored) > 1 else 0}" PlaneCount="1">'
            f'<UUID FileName="{file}">urn:uuid:{file}</UUID></TiffData>'
            for i, file in enumerate(files)
        )
        buffer = io.BytesIO()
        text = f"{start}{described}</Pixels></Image></OME>".encode()
        tifffile.imwrite(buffer, stored, description=text, metadata=None)
        return read_channels(buffer.getvalue(), "a")

    found = read(planes[1:], "c0.ome.tif", "own.ome.tif")
    assert found.names == () and np.array_equal(found.pixels, pixels[..., 1:2])
    found = read(planes, "own.ome.tif", "own.ome.tif")
    assert found.names == ("DNA", "ER") and np.array_equal(found.pixels, pixels[..., :2])


def test_names_in_a_file_decide_the_order_of_its_channels(pixels: np.ndarray) -> None:
    image = MultiChannel(pixels, ("Mito", "AGP", "RNA", "ER", "DNA"))
    assert np.array_equal(in_order(image, ("DNA", "Mito"), "a"), pixels[..., [4, 0]])
    assert in_order(image, image.names, "a") is pixels
    assert in_order(image, ("0", "1"), "a") is pixels
    assert in_order(MultiChannel(pixels), ("DNA", "Mito"), "a") is pixels
    with pytest.raises(DecodeError, match="a: the channel Golgi is missing"):
        in_order(image, ("DNA", "Golgi"), "a")


def test_names_of_channels_differ_in_more_than_capitals(pixels: np.ndarray) -> None:
    """Take gfp for GFP: the channels of a file without a known name are taken in their order."""
    image = MultiChannel(pixels[..., :2], ("gfp", "dapi"))
    assert np.array_equal(in_order(image, ("DAPI", "GFP"), "a"), pixels[..., [1, 0]])
    assert in_order(image, ("Gfp", "GFP"), "a") is image.pixels
    with pytest.raises(DecodeError, match=r"a: several channels are called DNA \(.* DNA, ER, dna"):
        in_order(MultiChannel(pixels[..., :3], ("DNA", "ER", "dna")), ("DNA", "ER"), "a")


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (b"", "empty"),
        (b"\x93NUMPY nonsense", "damaged"),
        (npy(np.array([None, "x"], object)), "damaged"),  # A pickle is never read.
        (npy(np.zeros((4, 4, 2), np.float32)), "float32 pixels have no fixed scale"),
        (npy(np.zeros((2, 3, 4, 5), np.uint8)), "is no image"),
        (
            b"not an image",
            r"not an image, or of a kind that is not read \(.npy and JPEG, .* as OME-TIFF",
        ),
    ],
)
def test_what_is_no_image_is_refused_by_name(image: bytes, what: str) -> None:
    with pytest.raises(DecodeError, match=f"^somewhere: .*{what}"):
        read_channels(image, "somewhere")


def test_a_tiff_whose_pages_are_linked_in_a_circle_is_refused(pixels: np.ndarray) -> None:
    """Refuse it, because tifffile would read its pages without end."""
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, pixels[..., 0])
    image = bytearray(file.getvalue())
    first = int.from_bytes(image[4:8], "little")
    entries = int.from_bytes(image[first : first + 2], "little")
    after = first + 2 + 12 * entries  # Where the offset of the next page stands.
    image[after : after + 4] = image[4:8]
    with pytest.raises(DecodeError, match="linked in a circle"):
        read_channels(bytes(image), "somewhere")


@pytest.mark.parametrize("shape", [(20_000, 20_000), (300, 1000, 1000)])
def test_a_tiff_of_too_many_values_is_refused_before_it_is_decoded(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuse it by its header: some hundred kilobytes hold gigabytes of equal pixels."""
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    row = np.zeros(shape[1:], np.uint8)
    tifffile.imwrite(
        buffer, (row for _ in range(shape[0])) if len(shape) == 3 else np.zeros(shape, np.uint8),
        shape=shape, dtype=np.uint8, compression="zlib",
    )  # fmt: skip

    def decode(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", decode)
    with pytest.raises(DecodeError, match=r"^x: an image of shape .* has more than"):
        read_channels(buffer.getvalue(), "x")


def test_sixteen_bits_become_eight_by_division(pixels: np.ndarray) -> None:
    assert np.array_equal(to_uint8(pixels), np.round(pixels / 257).astype(np.uint8))
    narrow = pixels.astype(np.uint8)
    assert to_uint8(narrow) is narrow
    stretched = to_uint8(pixels // 100 + 7, "percentile")
    assert stretched.min() == 0 and stretched.max() == 255


def test_one_file_a_channel_is_found_by_pattern(pixels: np.ndarray, tmp_path: Path) -> None:
    for site in (1, 2):
        for channel, name in enumerate(("DNA", "ER")):
            file = tmp_path / f"P1_B03_s{site}" / f"ch{channel}_{name}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels[..., channel]).save(file)
    (tmp_path / "notes.txt").write_text("no image")
    pattern = "{plate}_{well}_s{site}/ch{}_{channel}.png"
    found = find_channel_files(tmp_path, pattern, ["ER", "DNA"])
    assert [dict(key) for key in found] == [
        {"plate": "P1", "well": "B03", "site": site} for site in ("1", "2")
    ]
    image = read_channel_files(next(iter(found.values())))
    assert image.names == ("ER", "DNA")
    assert np.array_equal(image.pixels, pixels[..., [1, 0]])
    Image.fromarray(pixels[:3, :, 0]).save(tmp_path / "P1_B03_s1" / "ch0_DNA.png")
    with pytest.raises(DecodeError, match="must agree"):
        read_channel_files(next(iter(found.values())))
    with pytest.raises(UserError, match="no file below"):
        find_channel_files(tmp_path, "{channel}.tiff")
    with pytest.raises(UserError, match="has no {channel}"):
        find_channel_files(tmp_path, "{well}.png")


def test_saturated_channels_are_told(pixels: np.ndarray) -> None:
    pixels = np.minimum(pixels, 60000)
    pixels[..., 2] = 65535
    assert read_channels(npy(pixels), "a").saturated() == (2,)


@pytest.mark.skipif(data_dir() is None, reason="no real images: set FASTVIM_DATA_DIR")
def test_real_cell_painting_fields_are_read() -> None:
    folder = data_dir() / "cell_painting"
    found = find_channel_files(folder, "{set}/{plate}_{well}_s{site}/ch{}_{channel}.png")
    images = {dict(key)["well"]: read_channel_files(files) for key, files in found.items()}
    assert len(images) == 6
    assert images["C03"].names == ("AGP", "Brightfield", "DNA", "ER", "Mito", "RNA")
    assert images["C03"].pixels.dtype == np.uint16 and images["A01"].pixels.shape == (720, 720, 3)


def test_a_well_is_found_behind_a_plate_whose_name_has_the_same_signs(tmp_path: Path) -> None:
    """Take letters and a number for the well where the pattern allows several readings, else any text."""
    names = ("BR_17_A01_s1.npy", "BR_17_AB012_s2.npy", "BR_17_blank_s1.npy", "P_x/A01_s1.npy")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, np.zeros((2, 2), np.uint8))
    found = find_image_files(tmp_path, "{plate}_{well}_s{site}.npy")
    assert [dict(key) for key in found] == [
        {"plate": "BR", "site": "1", "well": "17_blank"},
        {"plate": "BR_17", "site": "1", "well": "A01"},
        {"plate": "BR_17", "site": "2", "well": "AB012"},
    ]
    assert [dict(key)["well"] for key in find_image_files(tmp_path, "P_{}/{well}_{}.npy")] == [
        "A01"
    ]


def test_a_field_that_tells_channels_apart_is_refused(tmp_path: Path) -> None:
    """Refuse a named number of the channel: each channel would be an image of its own."""
    for site in "12":
        for number, channel in enumerate(("DNA", "ER")):
            np.save(tmp_path / f"A01_s{site}_ch{number}_{channel}.npy", np.zeros((2, 2), np.uint8))
    assert len(find_channel_files(tmp_path, "{well}_s{site}_ch{}_{channel}.npy")) == 2
    with pytest.raises(UserError, match=r"since {number} differs between .*: write {} for it"):
        find_channel_files(tmp_path, "{well}_s{site}_ch{number}_{channel}.npy")
    for file in tmp_path.glob("*ER*"):
        file.unlink()
    assert len(find_channel_files(tmp_path, "{well}_s{site}_ch{number}_{channel}.npy")) == 2

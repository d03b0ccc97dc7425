"""Fields of view to embed: plates by their index, folders by a pattern with and without channels, single files."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvim_jax.cli.main import main
from fastvim_jax.data import CellsData, DecodeError
from fastvim_jax.data.cells import load_image
from fastvim_jax.data.sources import plate_images
from fastvim_jax.errors import UserError
from fastvim_jax.inference.channel_scores import SubsetScore, draw
from fastvim_jax.inference.embed import describe_channels, draw_embeddings
from fastvim_jax.inference.embedding_table import (
    Embeddings,
    aggregate,
    averaged_over,
    normalise_to_controls,
    require_controls,
)
from fastvim_jax.inference.fields import find_fields, read_field, require_renamed

CHANNELS = ("ER", "DNA", "Golgi")
DATA = CellsData(
    source="digits", channels=3, channel_names=("DNA", "ER", "Mito"), image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3
)  # fmt: skip


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 60000, (8, 8, 3)).astype(np.uint16)


@pytest.fixture
def plate(tmp_path: Path, pixels: np.ndarray) -> Path:
    """Write two sites, named as microscopes name them; the second has no DNA."""
    rows = []
    for site in (1, 2):
        row = {"Metadata_Plate": "P", "Metadata_Well": "B07", "Metadata_Site": str(site)}
        for i, channel in enumerate(CHANNELS):
            name = f"r02c07f0{site}p01-ch{i}.npy"
            if (site, channel) != (2, "DNA"):
                np.save(tmp_path / name, pixels[..., i])
            row |= {f"FileName_Orig{channel}": name, f"FileName_Illum{channel}": "half.npy"}
        rows.append(row)
    np.save(tmp_path / "half.npy", np.full((8, 8), 2.0))
    with (tmp_path / "load_data.csv").open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def test_sites_of_a_plate_keep_their_columns_and_are_corrected(
    plate: Path, pixels: np.ndarray
) -> None:
    """Embed what a plate's index names: plates, wells and sites, with corrected illumination."""
    first, second = find_fields([plate], None)
    assert first.metadata == {"plate": "P", "well": "B07", "site": "1"}
    assert [f.metadata for f in find_fields([plate / "load_data.csv"], None)] == [
        first.metadata,
        second.metadata,
    ]
    found, ids = read_field(first, DATA, None, {}, "full")
    assert ids == (0, 1)
    halves = np.round(np.round(pixels[..., [1, 0]] / 2) / 257)
    assert np.array_equal(found, halves)
    assert read_field(second, DATA, None, {}, "full")[1] == (1,)
    renamed, ids = read_field(first, DATA, ["Mito"], {"Golgi": "Mito"}, "full")
    assert ids == (2,) and np.array_equal(
        renamed[..., 0], np.round(np.round(pixels[..., 2] / 2) / 257)
    )
    with pytest.raises(DecodeError, match="the channel DNA is missing"):
        read_field(second, DATA, ["DNA"], {}, "full")
    small = dataclasses.replace(DATA, channel_names=("dna", "Er", "Mito"))
    assert np.array_equal(read_field(first, small, None, {}, "full")[0], halves)
    (plate / "r02c07f01p01-ch0.npy").write_bytes(b"cut")
    found, ids = read_field(first, DATA, ["DNA"], {}, "full")
    assert ids == (0,) and np.array_equal(found, halves[..., :1])  # ER is damaged, and not needed.
    with pytest.raises(DecodeError, match="ch0.npy.*not an image"):
        read_field(first, DATA, None, {}, "full")
    (plate / "half.npy").unlink()
    said: list[str] = []
    find_fields([plate], None, note=said.append)
    assert ["pixels are not corrected" in text for text in said] == [True]


def test_files_of_all_channels_are_found_by_a_pattern(tmp_path: Path, pixels: np.ndarray) -> None:
    for well in ("A01", "A02"):
        np.save(tmp_path / f"P_{well}.npy", pixels)
    found = find_fields([tmp_path], "{plate}_{well}.npy")
    assert [f.metadata for f in found] == [{"plate": "P", "well": w} for w in ("A01", "A02")]
    assert np.array_equal(read_field(found[0], DATA, None, {}, "full")[0], np.round(pixels / 257))
    with pytest.raises(UserError, match="are one image by"):
        find_fields([tmp_path], "{plate}_{}.npy")
    with pytest.raises(UserError, match="no file below"):
        find_fields([tmp_path], "{plate}-{well}.npy")
    with pytest.raises(UserError, match=r"is a folder: say with --pattern.*load_data\.csv"):
        find_fields([tmp_path], None)


def test_fields_of_two_folders_are_told_apart(tmp_path: Path, pixels: np.ndarray) -> None:
    """Refuse wells of two plates that have the same name: their features would be averaged."""
    for plate in ("P1", "P2"):
        (tmp_path / plate).mkdir()
        np.save(tmp_path / plate / "A01.npy", pixels)
    both = [tmp_path / "P1", tmp_path / "P2"]
    with pytest.raises(
        UserError, match=r"P1' and '.*P2' both hold a field of well A01: name the plate"
    ):
        find_fields(both, "{well}.npy")
    assert len(find_fields([tmp_path], "{plate}/{well}.npy")) == 2
    files = [path / "A01.npy" for path in both]
    assert len(find_fields(files, None)) == 2
    assert len(find_fields([files[0], files[0]], None)) == 1


def test_a_plate_at_a_url_is_embedded(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Take a URL for an index, from the command line, too, where it was taken for a path that does not exist."""
    store = pytest.importorskip("fsspec").filesystem("memory")
    monkeypatch.setattr(plate_images.tempfile, "gettempdir", lambda: str(tmp_path))
    np.save(tmp_path / "dna.npy", pixels[..., 0])
    store.pipe("/embed/dna.npy", (tmp_path / "dna.npy").read_bytes())
    store.pipe("/embed/load_data.csv", b"Metadata_Well,FileName_OrigDNA\nB07,dna.npy\n")
    url = "memory://embed/load_data.csv"
    (field,) = find_fields([url], None)
    assert np.array_equal(
        read_field(field, DATA, None, {}, "full")[0], np.round(pixels[..., :1] / 257)
    )
    monkeypatch.setattr("fastvim_jax.inference.channel_model.has_channels", lambda run: True)
    monkeypatch.chdir(tmp_path)
    assert main(["embed", "no run", url, "--controls", "A01"]) == 1
    assert "no row of the control A01: wells are named B07" in capsys.readouterr().err


def test_renamed_channels_are_one_each(plate: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    """Refuse two channels of one name, of which only the first would be read, and names that no field has."""
    first, _ = find_fields([plate], None)
    with pytest.raises(DecodeError, match="channels DNA and Golgi would both be DNA: rename one"):
        read_field(first, DATA, None, {"Golgi": "DNA"}, "full")
    _, ids = read_field(first, DATA, None, {"Golgi": "DNA", "DNA": "other"}, "full")
    assert ids == (0, 1)
    require_renamed([first], {"Golgi": "DNA"})
    with pytest.raises(UserError, match=r"--rename Golgy=DNA: no field has .*Golgi"):
        require_renamed([first], {"Golgy": "DNA"})
    np.save(tmp_path / "one.npy", pixels)
    require_renamed(find_fields([tmp_path / "one.npy"], None), {"Golgy": "DNA"})  # not known yet


def test_what_cannot_be_written_is_refused_before_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastvim_jax.inference.channel_model.has_channels", lambda run: True)
    np.save(tmp_path / "A01.npy", np.zeros((8, 8, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    command = ["embed", "no run", str(tmp_path), "--pattern", "{well}.npy"]
    for options, message in (
        (["--out", "a.txt"], "write .parquet or .csv"),
        (["--plot", "a.xyz"], "name a file that ends in .png, .pdf or .svg"),
        (["--plot", "A01.npy/a.png"], "--plot A01.npy/a.png: "),
        (["--plot", "new/a.png", "--colour", "wel"], "--colour wel: there is no such column"),
        (["--pattern", "{well.npy"], "'{well.npy' is no pattern (expected '}'"),
        (["--pattern", "{well:02}.npy"], "write {well}, without '02' behind it"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--controls", "A2"], "there is no row of the control A2"),
        (["--controls", "A1"], "has 1 row in the wells A1: it needs two"),
        (["--controls", "A01"], "has 1 row in the wells A01: it needs two"),
    ):
        assert main([*command, *options]) != 0
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="has no column well"):
        require_controls([], [], ["A01"])
    np.save(tmp_path / "A02.npy", np.zeros((8, 8, 3), np.uint8))
    # A run is needed only then.
    assert main([*command, "--per", "well", "--controls", "A01", "A02"]) != 0
    assert "no run is no run folder" in capsys.readouterr().err


def test_a_model_without_names_takes_channels_in_their_order(
    tmp_path: Path, pixels: np.ndarray
) -> None:
    """Embed a TIFF that names its channels as training reads it: where the data names none, the order decides."""
    tifffile = pytest.importorskip("tifffile")
    names = {"axes": "CYX", "Channel": {"Name": ["Hoechst", "GFP", "RFP"]}}
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels.transpose(2, 0, 1), metadata=names)
    (field,) = find_fields([tmp_path / "a.ome.tif"], None)
    unnamed = dataclasses.replace(DATA, channel_names=())
    found, ids = read_field(field, unnamed, None, {}, "full")
    assert ids == (0, 1, 2) and np.array_equal(found, np.round(pixels / 257))
    found, ids = read_field(field, unnamed, None, {"GFP": "0"}, "full")
    assert ids == (0,) and np.array_equal(found, np.round(pixels[..., 1:2] / 257))
    with pytest.raises(DecodeError, match="none of its channels Hoechst, GFP, RFP is one of"):
        read_field(field, DATA, None, {}, "full")


def test_fields_with_fewer_channels_are_counted() -> None:
    """Say that features of fields with different channels differ, and which channels all have."""
    assert describe_channels(["DNA+ER"] * 3) is None
    text = describe_channels(["DNA+ER", "DNA", "DNA+ER"])
    assert text is not None and "1 field of 3 had not all of DNA, ER" in text
    assert "--channels DNA uses what all have" in text
    assert "--channels" not in str(describe_channels(["DNA", "ER"]))


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_plot_of_a_plate_has_room_for_its_points(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """Draw 384 wells: their legend covered the points, and matplotlib warned that nothing was left for the axes."""
    wells = [f"{row}{column:02}" for row in "ABCDEFGHIJKLMNOP" for column in range(1, 25)]
    table = Embeddings({"well": wells}, rng.normal(size=(384, 3)).astype(np.float32))
    draw_embeddings(table, "well", tmp_path / "plate.png")
    assert (tmp_path / "plate.png").stat().st_size > 1000


def test_what_else_wells_are_averaged_over_is_said() -> None:
    """Name a column, such as a time, of which a well's mean covers several values."""
    metadata = {"well": ["A01", "A01", "A02"], "site": ["1", "2", "1"], "day": ["1", "1", "2"]}
    table = Embeddings(metadata, np.zeros((3, 2), np.float32))
    assert averaged_over(table, ("plate", "well")) == []
    metadata["day"] = ["1", "2", "2"]
    assert averaged_over(table, ("plate", "well")) == ["day"]
    metadata["well"] = ["A01", "A1", "A02"]
    assert averaged_over(table, ("plate", "well")) == ["day"]


def test_a_well_is_one_however_it_is_written(rng: np.random.Generator) -> None:
    """Average A1 and A01 to one row, and take both for the control: they gave two rows, of one site each."""
    wells = ["A1", "A01", "B2", "B2", "blank", "blank"]
    features = rng.integers(-99, 100, (6, 3)).astype("f4")  # whose medians float32 can hold
    table = Embeddings({"well": wells, "plate": ["P"] * 6}, features)
    found = aggregate(table, ("plate", "well"))
    assert found.metadata["well"] == ["A01", "B2", "blank"]
    assert np.allclose(found.features, table.features.reshape(3, 2, 3).mean(axis=1))
    normal = [normalise_to_controls(table, controls).features for controls in (["A1"], ["a001"])]
    assert np.array_equal(*normal) and np.all(normal[0][:2].sum(axis=0) == 0)


def test_ids_of_a_parquet_index_are_kept(tmp_path: Path) -> None:
    """Keep them beside plate, well and site; they were dropped where the index has sites."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    columns = {"path": ["a.npy", "b.npy"], "well": ["A01"] * 2, "site": [1, 2], "id": ["x7", ""]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "index.parquet")
    first, second = find_fields([tmp_path], None)
    assert first.metadata == {"well": "A01", "site": "1", "id": "x7"}
    assert second.metadata == {"well": "A01", "site": "2"}


def test_rows_of_one_site_are_told_apart(plate: Path) -> None:
    """Note rows that share plate, well and site but not their files, and tell them apart by the column id."""
    table = plate / "load_data.csv"
    lines = table.read_text().splitlines()
    again = lines[1].replace("B07", "B7").replace("r02c07f01p01", "r02c07f02p01")
    table.write_text("\n".join([*lines, again]))
    said: list[str] = []
    fields = find_fields([table], None, note=said.append)
    assert ["2 rows of" in text and "the column id" in text for text in said] == [True]
    assert [field.metadata.get("id") for field in fields] == [
        "r02c07f01p01-ch0.npy",
        None,
        "r02c07f02p01-ch0.npy",
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the figures that are drawn and closed."""
    plt = pytest.importorskip("matplotlib.pyplot")
    figures: list[Any] = []
    close = plt.close
    monkeypatch.setattr(plt, "close", lambda f: (figures.append(f), close(f)))
    return figures


def test_a_plot_of_one_row_names_two_components(tmp_path: Path, drawn: list[Any]) -> None:
    draw_embeddings(Embeddings({}, np.ones((1, 3), np.float32)), None, tmp_path / "one.png")
    assert drawn[0].axes[0].get_ylabel() == "component 2 (0 % of the variance)"


def test_a_plot_of_channels_shows_no_more_than_all(tmp_path: Path, drawn: list[Any]) -> None:
    scores = [SubsetScore(names, 9, 0.95, 0.1) for names in (("A", "B"), ("A",), ("B",))]
    draw(scores, ("A", "B"), tmp_path / "channels.png")
    (axes,) = drawn[0].axes
    assert max(axes.get_yticks()) == 100 and axes.get_ylim()[1] > 120  # Room for the legend.


def test_channels_in_front_are_named(
    tmp_path: Path, pixels: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """Say what to do about arrays of channels, height and width, which PyTorch's users save."""
    np.save(tmp_path / "a.npy", np.moveaxis(pixels, -1, 0))
    (field,) = find_fields([tmp_path / "a.npy"], None)
    with pytest.raises(DecodeError, match="8 channels without names.* save arrays as height, wid"):
        read_field(field, DATA, None, {}, "full")
    with pytest.raises(DecodeError, match="8 channels, but data.channels is 3.* The first axis"):
        load_image(tmp_path / "a.npy", DATA)
    (tmp_path / "train" / "x").mkdir(parents=True)
    (tmp_path / "a.npy").rename(tmp_path / "train" / "x" / "a.npy")
    assert main(["data", "stats", str(tmp_path), "--channels", *DATA.channel_names]) == 1
    assert "save arrays as height, width, channels" in capsys.readouterr().err

"""JUMP-CP: labels of wells, both kinds of index, and what is left out of them."""

from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from fastvim_jax.cli.main import main
from fastvim_jax.data import CellsData, DecodeError, open_source
from fastvim_jax.data.multichannel import read_channels
from fastvim_jax.data.prepare.shards import prepare
from fastvim_jax.data.sources import plate_images
from fastvim_jax.data.sources.jump_target import read_plate_labels, well_name
from fastvim_jax.data.sources.layout import guess_source
from fastvim_jax.data.sources.plate_index import read_index
from fastvim_jax.errors import UserError
from tests.support import data_dir

REAL = None if data_dir() is None else data_dir() / "jump_target"


@pytest.mark.skipif(REAL is None, reason="no plate maps here: set FASTVIM_DATA_DIR")
@pytest.mark.parametrize(
    ("perturbation", "classes", "wells"), [("compound", 161, 384), ("crispr", 161, 380), ("orf", 176, 384)]
)  # fmt: skip
def test_plate_maps_give_the_published_classes(perturbation: str, classes: int, wells: int) -> None:
    labels = read_plate_labels(REAL, perturbation)
    assert len(labels.class_names) == classes and len(labels.label_of_well) == wells
    assert labels.class_names[0] == "control"
    assert set(labels.label_of_well.values()) == set(range(classes))
    if perturbation == "compound":
        control = [well for well, label in labels.label_of_well.items() if label == 0]
        assert len(control) == 64 and "A02" in control
        assert labels.class_names[labels.label("a1")] == "CACNB4"


def test_wells_are_named_one_way() -> None:
    assert [well_name(text) for text in ("a1", "B007", "P24", "AF48")] == [
        "A01",
        "B07",
        "P24",
        "AF48",
    ]
    for text in ("", "12", "A", "ABC1", "A-1"):
        with pytest.raises(UserError, match="is no well"):
            well_name(text)


def test_a_parquet_index_is_split_the_same_way_every_time(
    tables: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    wells = ["A01", "A02", "A03", "A04", "Z"] * 8
    paths = [f"images/{i}.npy" for i in range(len(wells))]
    (tables / "images").mkdir()
    for path in paths:
        np.save(tables / path, rng.integers(0, 256, (6, 6, 8)).astype(np.uint8))
    parquet.write_table(pyarrow.table({"path": paths, "well": wells}), tables / "index.parquet")
    parts = {s: open_source("jump_cp", s, path=str(tables)) for s in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [14, 5, 5]
    names = [part[i].name for part in parts.values() for i in range(len(part))]
    assert len(set(names)) == 24
    again = open_source("jump_cp", "train", path=str(tables / "index.parquet"))
    assert [again[i].name for i in range(14)] == names[:14]
    assert again.class_names == ("control", "AAA", "ZZZ")
    assert set(again.labels.tolist()) == {0, 1, 2}
    assert any(
        "8 images in a well without a label" in note and "A04" in note for note in again.notes
    )
    assert any("whose well is none" in note and "Z" in note for note in again.notes)
    assert open_source("jump_cp", "train[:3]", path=str(tables)).notes == again.notes
    assert main(["data", "check", str(tables)]) == 0
    said = capsys.readouterr().out  # Once for all splits.
    assert said.count("8 images in a well without a label (A04)") == 1
    assert main(["data", "prepare", str(tables), "--out", str(tables / "shards")]) == 0
    assert capsys.readouterr().out.count("8 images in a well without a label (A04)") == 1
    for names, error in (
        (["DNA"], "holds all channels of an image"),
        (["DNA"] * 2, "each channel once"),
    ):
        assert main(["data", "check", str(tables), "--channels", *names]) == 2
        assert error in capsys.readouterr().err
    with pytest.raises(UserError, match="'tran' of a jump_cp source does not exist.*'train'"):
        open_source("jump_cp", "tran", path=str(tables))


def write_gallery(folder: Path, rng: np.random.Generator) -> None:
    """Return a load_data CSV and its TIFFs: one site per well, of which two are damaged or lack a channel."""
    tifffile = pytest.importorskip("tifffile")
    rows = []
    for site, well in enumerate(["A01", "A02", "A03", "A01"]):
        row = {"Metadata_Plate": "P", "Metadata_Well": well, "Metadata_Site": str(site)}
        for channel in ("ER", "DNA", "Mito", "AGP"):
            name = f"{well}_{site}_{channel}.tiff"
            pixels = rng.integers(0, 60000, (10, 12)).astype(np.uint16)
            if (site, channel) == (0, "DNA"):
                pixels[:] = 65535
            file = folder / "Images" / name
            file.parent.mkdir(exist_ok=True)
            tifffile.imwrite(file, pixels)
            if (site, channel) == (2, "ER"):
                file.write_bytes(file.read_bytes()[:-40])
            row |= {f"FileName_Orig{channel}": name, f"PathName_Orig{channel}": "/elsewhere/Images"}
        rows.append(row)
    (folder / "Images" / "A01_3_AGP.tiff").unlink()
    with (folder / "load_data.csv").open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_the_gallerys_layout_becomes_shards_and_says_what_it_left_out(
    tables: Path, rng: np.random.Generator, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write_gallery(tables, rng)
    source = open_source("jump_cp", "all", path=str(tables))
    assert source.channel_names == ("Mito", "AGP", "ER", "DNA")
    assert source[1].image.shape == (10, 12, 4) and source[1].target == 1
    with pytest.raises(DecodeError, match="cut short|damaged"):
        source[2]
    with pytest.raises(DecodeError, match="the channel AGP is missing"):
        source[3]
    out = tmp_path_factory.mktemp("shards")
    done = prepare(source, out, "all", max_corrupt=2)
    assert done.records == 2 and len(done.left_out) == 2
    assert len(done.notes) == 1 and "saturated in DNA" in done.notes[0]
    with pytest.raises(UserError, match="these images have 4 channels: leave pixels out"):
        prepare(source, out, "pixels", pixels=8, max_corrupt=4)  # All four were left out.
    some = open_source("jump_cp", "all", path=str(tables), channels=("DNA", "Mito"))
    assert some.channel_names == ("DNA", "Mito")
    assert np.array_equal(some[1].image, source[1].image[..., [3, 0]])
    assert some[2].image.shape == (10, 12, 2)  # The damaged channel is another one.
    assert some.stamp(1) != source.stamp(1) and "ER" not in some.stamp(1)
    with pytest.raises(UserError, match=r"no channel Mitto, but Mito, AGP, ER, DNA .*'Mito'"):
        open_source("jump_cp", "all", path=str(tables), channels=("Mitto",))
    shards = open_source("array_record", "all", path=str(out))
    assert np.array_equal(read_channels(shards[1].image, "a").pixels, source[1].image)
    assert prepare(source, out, "all", max_corrupt=2).kept == done.shards


@pytest.mark.parametrize("ending", [".csv.gz", ".parquet", " of a spreadsheet.csv"])
def test_a_load_data_table_of_another_kind_is_read(
    tables: Path, rng: np.random.Generator, ending: str
) -> None:
    """Read load_data tables as the Gallery has them: compressed, as Parquet; and in UTF-16 with rows cut short."""
    write_gallery(tables, rng)
    plain = open_source("jump_cp", "all", path=str(tables))
    given = tables / "load_data.csv"
    path, text = tables, given.read_text()
    if ending == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(
            pyarrow.Table.from_pylist(list(csv.DictReader(text.splitlines()))),
            tables / "load_data.parquet",
        )
    elif ending == ".csv.gz":
        (tables / "load_data.csv.gz").write_bytes(gzip.compress(text.encode()))
    else:
        path = tables / f"load_data{ending}"
        path.write_bytes((text + "P\n\n").encode("utf-16"))
    given.unlink()
    found = open_source("jump_cp", "all", path=str(path))
    assert found.channel_names == plain.channel_names and len(found) == len(plain) == 4
    assert np.array_equal(found[1].image, plain[1].image)
    cut = [note for note in found.notes if "whose well is none (no name)" in note]
    assert len(cut) == (path != tables)


def test_files_of_all_channels_are_decoded_before_they_are_stored(
    tables: Path, rng: np.random.Generator, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Leave damaged files of a Parquet index out of the shards, and name saturated ones, as those of a CSV."""
    tifffile = pytest.importorskip("tifffile")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    pixels = rng.integers(0, 60000, (6, 6, 3)).astype(np.uint16)
    np.save(tables / "good.npy", pixels)
    np.save(tables / "saturated.npy", np.where([0, 1, 0], 65535, pixels).astype(np.uint16))
    (tables / "cut.npy").write_bytes((tables / "good.npy").read_bytes()[:-9])
    np.save(tables / "float.npy", pixels.astype(np.float32))
    named = {"axes": "CYX", "Channel": {"Name": ["c", "b", "a"]}}
    tifffile.imwrite(tables / "named.tif", pixels.transpose(2, 0, 1), ome=True, metadata=named)
    paths = ["good.npy", "saturated.npy", "cut.npy", "float.npy", "named.tif"]
    table = {"path": paths, "well": ["A01"] * 5, "plate": ["P"] * 5}
    parquet.write_table(pyarrow.table(table), tables / "index.parquet")
    source = open_source("jump_cp", "all", path=str(tables))
    assert np.array_equal(source[0].image, np.round(pixels / 257))
    done = prepare(source, tmp_path_factory.mktemp("shards"), "all", max_corrupt=2)
    assert done.records == 3 and len(done.left_out) == 2
    assert "cut.npy" in done.left_out[0] and "float.npy" in done.left_out[1]
    assert [note.endswith("saturated.npy]: saturated in 1.") for note in done.notes] == [True]
    assert read_channels(source[4].image, "a").names == ("c", "b", "a")


def test_a_plate_at_a_url_needs_tables_and_prints_its_statistics(
    tables: Path,
    rng: np.random.Generator,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Count what nothing can be stored beside, and print what training is to be given instead."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(plate_images.tempfile, "gettempdir", lambda: str(tables))
    store = fsspec.filesystem("memory")
    pixels = rng.integers(0, 256, (5, 4, 2)).astype(np.uint8)
    rows = "Metadata_Well,URL_OrigDNA\nA02,memory://far/dna.npy\n"
    (tables / "load_data.csv.gz").touch()
    np.save(tables / "dna.npy", pixels[..., 0])
    store.pipe("/far/dna.npy", (tables / "dna.npy").read_bytes())
    store.pipe("/far/load_data.csv", rows.encode())
    url = "memory://far/load_data.csv"
    with pytest.raises(UserError, match="is a URL: name the folder of the plate maps"):
        open_source("jump_cp", "all", path=url)
    given = ["--class-list", str(tables), "--split", "all"]
    prepare_far = ["data", "prepare", url, *given, "--out", str(tables / "shards")]
    for folder, said in ((tables, "all: 1 record"), (tables.parent, "1 was there already")):
        monkeypatch.chdir(folder)  # The URL was noted as a path below the current folder.
        assert main(prepare_far) == 0 and said in capsys.readouterr().out
    assert guess_source(str(tables / "load_data.csv.gz")) == "jump_cp"
    assert main(["data", "stats", url, *given, "--channels", "DNA"]) == 0
    shown = capsys.readouterr().out
    mean = float(shown.partition("--data.mean ")[2].split()[0])
    assert mean == pytest.approx(pixels[..., 0].mean() / 255)
    data = CellsData(source="jump_cp", path=url, channels=1, channel_names=("DNA",))
    with pytest.raises(UserError, match="set data.mean and data.std"):
        data.resolved()


def test_illumination_is_divided_out(tables: Path, rng: np.random.Generator) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = rng.integers(10000, 20000, (8, 8)).astype(np.uint16)
    function = rng.uniform(0.5, 2.0, (8, 8))
    tifffile.imwrite(tables / "dna.tiff", pixels)
    np.save(tables / "illum.npy", function)
    (tables / "load_data_with_illum.csv").write_text(
        "Metadata_Well,FileName_OrigDNA,FileName_IllumDNA\nA02,dna.tiff,illum.npy\n"
    )
    image = open_source("jump_cp", "all", path=str(tables))[0].image
    assert np.array_equal(image[..., 0], np.round(np.round(pixels / function) / 257))


def test_illumination_lies_elsewhere_than_the_images(tables: Path) -> None:
    """Find functions by name in a folder of their own, though the table names one folder for them and the images."""
    for folder, name, value in (("P1", "dna.npy", 257 * 8), ("illum", "i.npy", 2.0)):
        (tables / folder).mkdir()
        kind = np.uint16 if folder == "P1" else np.float64
        np.save(tables / folder / name, np.full((4, 4), value, kind))
    header = "Metadata_Well,PathName_OrigDNA,FileName_OrigDNA,PathName_IllumDNA,FileName_IllumDNA\n"
    (tables / "load_data.csv").write_text(f"{header}A02,/far/P1,dna.npy,/far/P1,i.npy\n")
    assert (open_source("jump_cp", "all", path=str(tables))[0].image == 4).all()


def test_illumination_that_is_not_there_is_told(tables: Path, rng: np.random.Generator) -> None:
    """Leave a channel without an illumination function as it is, and refuse a damaged or lost one.

    If no function is there at all, a note says so.
    """
    for name in ("dna", "er"):
        np.save(tables / f"{name}.npy", rng.integers(10000, 20000, (8, 8)).astype(np.uint16))
    header = "Metadata_Well,FileName_OrigDNA,FileName_OrigER,FileName_IllumDNA,FileName_IllumER"
    (tables / "load_data.csv").write_text(
        f"{header}\nA02,dna.npy,er.npy,,two.npy\nA03,dna.npy,er.npy,,lost.npy\nA03,dna.npy,er.npy,,none.npy\n"
    )
    without = open_source("jump_cp", "all", path=str(tables))
    assert any("none is there: pixels are not corrected" in note for note in without.notes)
    plain = without[0].image
    np.save(tables / "two.npy", np.full((8, 8), 2.0))
    (tables / "none.npy").write_bytes(b"\x93NUMPY nothing")
    source = open_source("jump_cp", "all", path=str(tables))
    er, dna = (source.channel_names.index(name) for name in ("ER", "DNA"))
    assert not any("illumination" in note for note in source.notes)
    assert np.array_equal(source[0].image[..., dna], plain[..., dna])
    assert abs(source[0].image[..., er] - plain[..., er] / 2).max() <= 1
    with pytest.raises(DecodeError, match=r"lost\.npy: No such file"):
        source[1]
    with pytest.raises(DecodeError, match=r"none\.npy is no illumination function"):
        source[2]


def test_fields_of_two_plates_are_told_apart_by_their_folders(tables: Path) -> None:
    """Tell fields of two plates apart by their folders, because microscopes name the fields of every plate alike."""
    for number, plate in enumerate(("P1", "P2")):
        (tables / plate / "Images").mkdir(parents=True)
        np.save(tables / plate / "Images" / "r1c1.npy", np.full((4, 4), 257 * number, np.uint16))
    row = "Metadata_Well,PathName_OrigDNA,FileName_OrigDNA\nA02,{},r1c1.npy\n"
    index = tables / "load_data.csv"
    for number, plate in enumerate(("P1", "P2")):
        index.write_text(row.format(f"/elsewhere/{plate}/Images"))
        assert (open_source("jump_cp", "all", path=str(tables))[0].image == number).all()
    index.write_text(row.format("/elsewhere/Images"))
    with pytest.raises(UserError, match="lies in several folders"):
        open_source("jump_cp", "all", path=str(tables))


def test_a_missing_file_is_not_taken_from_another_plate(tables: Path) -> None:
    """Leave out a field whose file is missing, though another plate's folder has a file of that name."""
    for number, plate in enumerate(("P1", "P2")):
        (tables / plate / "Images").mkdir(parents=True)
        for name in ("r1c1.npy", "r1c2.npy", "i.npy"):
            np.save(tables / plate / "Images" / name, np.full((4, 4), 257 * number, np.uint16))
    (tables / "P1" / "Images" / "r1c2.npy").unlink()
    header = "Metadata_Well,PathName_OrigDNA,FileName_OrigDNA\n"
    for folder in ("/elsewhere/P1/Images", "P1/Images", str(tables / "P1/Images")):
        rows = (f"{well},{folder},r1c{i}.npy\n" for i, well in enumerate(("A02", "A03"), 1))
        (tables / "load_data.csv").write_text(header + "".join(rows))
        source = open_source("jump_cp", "all", path=str(tables))
        assert (source[0].image == 0).all()
        with pytest.raises(DecodeError, match="the channel DNA is missing"):
            source[1]


def test_a_row_that_stands_twice_counts_once(tables: Path) -> None:
    """Drop equal rows: the same image would be trained on and tested on."""
    for name in ("a.npy", "b.npy"):
        np.save(tables / name, np.zeros((4, 4), np.uint16))
    rows = ("A03,b.npy", "A02,a.npy", "A03,b.npy", "A02,no.npy", "A02,none.npy", "A01,a.npy")
    (tables / "load_data.csv").write_text("\n".join(("Metadata_Well,FileName_OrigDNA", *rows)))
    source = open_source("jump_cp", "all", path=str(tables))
    assert source.labels.tolist() == [2, 1, 1, 1, 0]
    assert [note for note in source.notes if "1 row repeats another row" in note]


def test_files_of_a_linked_folder_are_found(
    tables: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Find images by name in a folder that a link leads to, and walk a circle of links once."""
    disk = tmp_path_factory.mktemp("disk")
    np.save(disk / "r1c1.npy", np.full((4, 4), 257, np.uint16))
    (disk / "back").symlink_to(tables)
    (tables / "Images").symlink_to(disk)
    (tables / "load_data.csv").write_text(
        "Metadata_Well,PathName_OrigDNA,FileName_OrigDNA\nA02,/elsewhere/P1,r1c1.npy\n"
    )
    assert (open_source("jump_cp", "all", path=str(tables))[0].image == 1).all()


def test_a_file_of_one_channel_holds_one_plane(tables: Path) -> None:
    """Refuse a stack of planes where one channel is named: the planes would take the other channels' names."""
    for channel in ("ER", "DNA"):
        np.save(tables / f"{channel}.npy", np.zeros((4, 4, 2), np.uint16))
    (tables / "load_data.csv").write_text(
        "Metadata_Well,FileName_OrigER,FileName_OrigDNA\nA02,ER.npy,DNA.npy\n"
    )
    source = open_source("jump_cp", "all", path=str(tables))
    with pytest.raises(DecodeError, match=r"ER\.npy holds 2 planes, but one file per channel"):
        source[0]


def test_a_part_of_a_plate_is_checked_and_prepared(
    tables: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Count classes without a record instead of calling them faults, and say when statistics are to be counted."""
    rows = []
    for site in "12":
        for channel in ("ER", "DNA"):
            np.save(tables / f"{channel}{site}.npy", rng.integers(0, 999, (8, 8)).astype(np.uint16))
        rows.append(f"A02,ER{site}.npy,DNA{site}.npy\n")
    header = "Metadata_Well,FileName_OrigER,FileName_OrigDNA\n"
    (tables / "load_data.csv").write_text(header + "".join(rows))
    shards = tmp_path / "shards"

    def said(task: str, *arguments: str, status: int = 0) -> str:
        assert main(["data", task, *arguments]) == status
        return "".join(capsys.readouterr())

    assert "2 classes have no record" in said("check", str(tables), "--split", "all")
    prepare_all = (str(tables), "--split", "compound/all", "--out", str(shards))
    stats = f"stats {shards} --split all --channels ER DNA`"
    assert f"{stats} counts them" in said("prepare", *prepare_all)
    assert "2 classes have no record" in said("check", str(shards))
    said("stats", str(shards), "--split", "all", "--channels", "ER", "DNA")
    assert "statistics.json" not in said("prepare", *prepare_all)
    np.save(tables / "ER1.npy", np.zeros((8, 8), np.uint16))
    text = said("prepare", *prepare_all)
    assert "statistics.json is older than these shards: count again" in text and stats in text
    part = (str(tables), "--split", "compound/train[1/2]", "--out", str(shards))
    assert "'train[1/2]' is a part of a split" in said("prepare", *part, status=1)


@pytest.mark.parametrize("name", ["load_data.csv", "load_data.csv.gz", "index.parquet"])
def test_a_damaged_index_is_named(tables: Path, name: str) -> None:
    index = tables / name
    for content in (b"", b"\xff\xfe,\x00\n1", b"a,b\n" + b"x" * 200_000, b"PAR1" * 9):
        index.write_bytes(content)
        with pytest.raises(UserError, match=name):
            open_source("jump_cp", "train", path=str(index))
    index.unlink()
    os.mkfifo(index)
    with pytest.raises(UserError, match="is no index of images"):
        open_source("jump_cp", "train", path=str(index))


def test_numbers_of_a_parquet_table_are_called_as_in_csv(tmp_path: Path) -> None:
    """Read sites as pandas stores them where one is missing, and channels of which one has URLs alone."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    columns = {
        "Metadata_Plate": [7.0, None], "Metadata_Well": ["A01", "A02"], "Metadata_Site": [1.0, float("nan")],
        "URL_OrigER": ["s3://plate/er.tif"] * 2, "FileName_OrigDNA": [None, "dna.tif"],
    }  # fmt: skip
    index = tmp_path / "load_data.parquet"
    parquet.write_table(pyarrow.table(columns), index)
    (first, second), channels, _ = read_index(str(index))
    assert (first.plate, first.site, first.name) == ("7", "1", "7_A01_1")
    assert (second.plate, second.site, second.name) == ("", "", "A02")
    assert channels == ("ER", "DNA") and first.files == ("s3://plate/er.tif", "")
    parquet.write_table(pyarrow.table(columns).slice(0, 0), index)
    with pytest.raises(UserError, match="has no row of an image"):
        read_index(str(index))

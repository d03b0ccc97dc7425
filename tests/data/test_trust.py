"""Files that strangers made: only regular files inside the data set's folder are read, and nothing in them is run."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvim_jax.data import DecodeError, open_source
from fastvim_jax.data.files import read_file, walk
from fastvim_jax.data.prepare.check import check
from fastvim_jax.data.prepare.shards import prepare
from fastvim_jax.data.records import printable
from fastvim_jax.data.sources.layout import guess_source, list_splits
from fastvim_jax.data.tar_members import list_members
from fastvim_jax.errors import UserError


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "elsewhere" / "secret.png"
    file.parent.mkdir()
    file.write_bytes(b"BEGIN PRIVATE KEY")
    return file


def _parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir(exist_ok=True)
    table = pa.table({"image": rows, "label": [i % 2 for i in range(len(rows))]})
    parquet.write_table(table, folder / "train-00000-of-00001.parquet")


@pytest.mark.parametrize("kind", ["absolute", "relative", "link", "null", "device", "fifo"])
def test_a_record_s_path_stays_inside_the_data_set(kind: str, tmp_path: Path, secret: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    (root / "link.png").symlink_to(secret)
    os.mkfifo(root / "fifo.png")
    path = {
        "absolute": str(secret), "relative": "../elsewhere/secret.png", "link": "link.png", "null": "a\0b",
        "device": "/dev/zero", "fifo": "fifo.png",
    }[kind]  # fmt: skip
    (root / "inside.png").write_bytes(b"inside")
    _parquet(root, [{"bytes": None, "path": path}, {"bytes": None, "path": "inside.png"}])
    source = open_source("hugging_face", "train", path=str(root))
    with pytest.raises(DecodeError, match=r"leads out of|not a regular file|null"):
        source[0]
    assert source[1].image == b"inside"
    with pytest.raises(DecodeError):
        prepare(source, tmp_path / "out", "train")
    assert not any(b"PRIVATE" in file.read_bytes() for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("place", ["train", "train/ant", "train/ant/more", "train/ant/09.png"])
def test_links_out_of_an_image_folder_are_read_on_request(
    place: str, image_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("elsewhere") / "outside"
    link = image_tree / place
    if place == "train/ant/more":
        (image_tree / "train" / "ant").rename(outside)
        (image_tree / "train" / "ant").mkdir()
    else:
        link.rename(outside)
    link.symlink_to(outside)
    with pytest.raises(UserError, match=r"is a link out of the data set's folder.*follow_links"):
        open_source("image_folder", "train", path=str(image_tree))
    source = open_source("image_folder", "train", path=str(image_tree), follow_links=True)
    assert len(source) == 30 and source[0].target == 0 and source[0].image


def test_links_inside_are_followed_and_circles_end(image_tree: Path) -> None:
    ant = image_tree / "train" / "ant"
    (ant / "again").symlink_to(image_tree / "train" / "bee")
    (ant / "circle").symlink_to(ant)
    (ant / ".ipynb_checkpoints").mkdir()
    (ant / ".ipynb_checkpoints" / "00-checkpoint.png").write_bytes(b"hidden")
    (ant / ".hidden.png").write_bytes(b"hidden")
    bees = len(list((image_tree / "train" / "bee").iterdir()))
    source = open_source("image_folder", "train", path=str(image_tree))
    assert len(source) == 30 + bees
    assert all("/." not in source[i].name for i in range(len(source)))
    found = list(walk(image_tree, image_tree, follow_links=False))
    assert found == list(walk(image_tree, image_tree, follow_links=True))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for file in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        with pytest.raises(DecodeError, match=r"not a regular file|Is a directory") as raised:
            read_file(file)
        assert str(raised.value).count(str(file)) == 1


@pytest.mark.parametrize("kind", ["fifo", "device", "itself"])
@pytest.mark.parametrize("file", ["train-0.tar", "train.json"])
def test_neither_a_fifo_nor_a_device_in_the_place_of_a_shard_or_manifest_is_opened(
    kind: str, file: str, tmp_path: Path
) -> None:
    """Refuse them, in finding out what kind of set it is, too: a FIFO waits for a writer, a device never ends."""
    place = tmp_path / file
    if kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero" if kind == "device" else place)
    for read in (
        lambda: open_source("webdataset", "train", path=str(tmp_path)),
        lambda: open_source("pixels", "train", path=str(tmp_path)),
        lambda: list_splits(guess_source(str(tmp_path)), str(tmp_path)) and 1 / 0,
    ):
        with pytest.raises((UserError, ZeroDivisionError)):
            read()


def _npz(folder: Path, **members: Any) -> str:
    folder.mkdir(exist_ok=True)
    arrays = {
        "jpeg": np.arange(6, dtype=np.uint8), "offsets": np.arange(0, 7, 2), "labels": np.arange(3), **members,
    }  # fmt: skip
    np.savez(folder / "train.npz", **arrays)
    return str(folder)


@pytest.mark.parametrize(
    "labels",
    [
        np.arange(3, dtype=np.uint64), np.arange(3.0), np.arange(3)[:, None], np.eye(3), np.eye(3, dtype=bool),
        np.asarray(["ant", "bee", "cat"]), np.asarray([b"ant", b"bee", b"cat"]),
    ],
    ids=str,
)  # fmt: skip
def test_labels_of_every_shape_and_type_are_understood(labels: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    source = open_source("packed_npz", "train", path=_npz(tmp_path, labels=labels))
    assert [source[i].target for i in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"labels": np.asarray([0.0, np.nan, 1])}, r"record 1 is nan"),
        ({"labels": np.asarray([0.0, 0.5, 1])}, r"record 1 is 0.5"),
        ({"labels": np.asarray([0, 2**64 - 1, 1], np.uint64)}, r"record 1 is 18446744073709551615"),
        ({"labels": np.asarray([0, 10**9, 1])}, r"holds the label 1000000000, and no class list"),
        ({"labels": np.ones((3, 2))}, r"one-hot"),
        ({"labels": np.asarray(1)}, r"one a record"),
        ({"labels": np.asarray(["ant", "bee", "cat"])}, r"labels are text.*classes.txt"),
        ({"labels": np.asarray([None, {}, 1], object)}, r"pickled objects, which could run code"),
        ({"labels": np.asarray([1j, 0, 1])}, r"complex128"),
        ({"offsets": np.arange(0.0, 7, 2)}, r"offsets must be integers"),
        ({"offsets": np.arange(3)}, r"offsets do not fit"),
        ({"jpeg": np.arange(6)}, r"jpeg must be uint8"),
        ({"names": np.asarray(["a"])}, r"names must be 3 texts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arrays_that_do_not_fit_are_named(
    members: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        open_source("packed_npz", "train", path=_npz(tmp_path, **members))


@pytest.mark.parametrize("damage", ["text", "short", "array", "empty"])
def test_a_damaged_npz_is_named(damage: str, tmp_path: Path) -> None:
    file = Path(_npz(tmp_path)) / "train.npz"
    content = file.read_bytes()
    array = io.BytesIO()
    np.save(array, np.arange(3))
    changed = {
        "text": b"no archive",
        "short": content[:-40],
        "array": array.getvalue(),
        "empty": b"",
    }
    file.write_bytes(changed[damage])
    with pytest.raises(UserError, match=r"train.npz.*(cannot be read|holds one array)"):
        open_source("packed_npz", "train", path=str(tmp_path))


def test_one_huge_label_is_listed_without_taking_memory(tmp_path: Path) -> None:
    path = _npz(tmp_path, labels=np.asarray([0, 10**9, 1]))
    report = check(open_source("packed_npz", "train", path=path, any_label=True))
    assert [p.index for p in report.problems if p.kind == "label"] == [1]
    assert report.classes == 2


def _tar(folder: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(folder / "train-0000.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(folder)


def test_every_image_of_a_shard_is_a_record(tmp_path: Path) -> None:
    members = [
        ("a.png", b"1"), ("a.cls", b"0"), ("x/scan.2024.01.png", b"2"), ("x/scan.2024.01.cls", b"1"),
        ("x/scan.2024.02.png", b"3"), ("x/scan.2024.02.cls", b"2"), ("a.png", b"4"), ("a.cls", b"1"),
        ("c.left.png", b"5"), ("c.right.PNG", b"6"), ("c.json", b'{"label": 2}'), ("b.jpg", b"7"), ("b.png", b"8"),
        ("b.cls", b"0\n"), ("README.txt", b"-"),
    ]  # fmt: skip
    source = open_source("webdataset", "train", path=_tar(tmp_path, members))
    found = [(source[i].image, source[i].target) for i in range(len(source))]
    labels = [0, 1, 2, 1, 2, 2, 0, 0]
    assert found == [(str(i + 1).encode(), label) for i, label in enumerate(labels)]


@pytest.mark.parametrize("damage", ["header", "cut", "zeros", "joined"])
def test_a_shard_that_cannot_be_read_to_its_end_is_refused(damage: str, tmp_path: Path) -> None:
    """Refuse damage behind the first member: `tarfile` ends there without an error, and later images are missing."""
    members = [(f"{i}.{kind}", b"1") for i in range(3) for kind in ("png", "cls")]
    shard = Path(_tar(tmp_path, members)) / "train-0000.tar"
    content = bytearray(shard.read_bytes())
    if damage == "header":
        content[2 * 1024 + 3] ^= 1
    elif damage == "cut":
        del content[2 * 1024 + 100 :]
    elif damage == "zeros":
        content[2 * 1024 : 2 * 1024 + 512] = bytes(512)
    else:
        content += bytes(content)
    shard.write_bytes(content)
    for read in (
        lambda: open_source("webdataset", "train", path=str(tmp_path)),
        lambda: list_members(str(shard)),
    ):
        with pytest.raises(
            UserError, match=r"train-0000.tar cannot be read as a tar file from byte"
        ):
            read()


def test_a_shard_without_an_end_mark_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = Path(_tar(tmp_path, [("a.png", b"1"), ("a.cls", b"0")])) / "train-0000.tar"
    shard.write_bytes(shard.read_bytes()[: 2 * 1024])
    assert len(open_source("webdataset", "train", path=str(tmp_path))) == 1
    assert "train-0000.tar has no end mark: it may be cut short" in caplog.text


@pytest.mark.parametrize(
    "label",
    [b"1e20", b"cat", b"", b"-1", b"[" * 100_000, b"1" * 5000, b"\xff\xfe"],
    ids=lambda label: repr(label[:8]),
)
def test_a_label_that_is_no_number_is_named(label: bytes, tmp_path: Path) -> None:
    path = _tar(tmp_path, [("a.png", b"1"), ("a.cls", label)])
    with pytest.raises(UserError, match=r"a.png \(a.cls holds no whole number"):
        open_source("webdataset", "train", path=path)


def test_names_that_are_not_utf8_are_printed_and_stored(tmp_path: Path, image_tree: Path) -> None:
    os.rename(
        image_tree / "train" / "ant" / "00.png",
        os.fsencode(image_tree) + b"/train/ant/\xff\xfe.png",
    )
    os.rename(image_tree / "train" / "ant", os.fsencode(image_tree) + b"/train/\xffant")
    source = open_source("image_folder", "train", path=str(image_tree))
    assert prepare(source, tmp_path / "out", "train").records == 30
    names = [source[i].name for i in range(30)] + list(source.class_names)
    assert any("\\xff\\xfe.png" in name for name in names)
    json.dumps(names).encode()
    "".join(names).encode()


def test_halves_of_surrogate_pairs_are_written_out(tmp_path: Path) -> None:
    """Write out halves of surrogate pairs, which JSON of strangers may hold and no file can."""
    assert printable("a\ud800") == "a\\ud800" and printable("a\udcff") == "a\\xff"
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    feature = {"_type": "ClassLabel", "names": ["a\ud800", "b"]}
    about = json.dumps({"info": {"features": {"label": feature}}})
    table = pa.table({"image": [{"bytes": b"x", "path": None}], "label": [1]})
    table = table.replace_schema_metadata({"huggingface": about})
    parquet.write_table(table, tmp_path / "train.parquet")
    source = open_source("hugging_face", "train", path=str(tmp_path))
    assert source.class_names == ("a\\ud800", "b")


def test_an_evaluation_split_may_lack_the_highest_class(tmp_path: Path) -> None:
    for split, labels in (("train", [0, 1, 2]), ("val", [0, 1, 0])):
        _npz(tmp_path, labels=np.asarray(labels))
        (tmp_path / "train.npz").rename(tmp_path / f"{split}.npz.kept")
    for split in ("train", "val"):
        (tmp_path / f"{split}.npz.kept").rename(tmp_path / f"{split}.npz")
    assert open_source("packed_npz", "val", path=str(tmp_path)).class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 1], [0, 1, 1]), ([0.0, 1.0, 1.0], [0, 1, 1]), ([False, True, True], [0, 1, 1]),
        (["ant", "bee", "bee"], [0, 1, 1]), ([[1, 0], [0, 1], [0, 1]], [0, 1, 1]),
        ([0, 1, None], r"holds the label -1"), ([0.5, 1, 1], r"record 0 is 0.5"),
        (["ant", "bee", "cow"], "'cow' is none"), (["ant", "bee", None], r"1 record has no label"),
    ],
    ids=str,
)  # fmt: skip
def test_label_columns_of_every_type_are_understood_or_named(
    labels: list[Any], expected: Any, tmp_path: Path
) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    table = pa.table({"image": [{"bytes": b"x", "path": None}] * 3, "label": labels})
    parquet.write_table(table, tmp_path / "train.parquet")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            open_source("hugging_face", "train", path=str(tmp_path))
    else:
        source = open_source("hugging_face", "train", path=str(tmp_path))
        assert [source[i].target for i in range(3)] == expected


@pytest.mark.parametrize("source", ["packed_npz", "webdataset", "hugging_face", "array_record"])
def test_files_of_another_kind_are_an_error_that_names_them(source: str, tmp_path: Path) -> None:
    endings = {
        "packed_npz": "npz",
        "webdataset": "tar",
        "hugging_face": "parquet",
        "array_record": "json",
    }
    for content in (
        b"",
        b"x" * 600,
        bytes(1024),
        b'{"format": "fastvim-array-record-1", "complete": 1}',
    ):
        (tmp_path / f"train.{endings[source]}").write_bytes(content)
        with pytest.raises(UserError, match="train"):
            open_source(source, "train", path=str(tmp_path))

"""Each source: length, labels, class names, and an error that says what is wrong with a folder."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fastvim_jax.data import DecodeError, Source, decode_image, open_source
from fastvim_jax.errors import UserError
from tests.data.conftest import encode


def test_digits_split_and_scale() -> None:
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert isinstance(train, Source)
    assert (len(train), len(test)) == (1437, 360)
    assert test.class_names == tuple("0123456789")
    images, labels = load_digits(return_X_y=True)
    for source, offset, index in ((train, 0, 17), (test, 1437, 359)):
        record = source[index]
        assert record.target == labels[offset + index]
        np.testing.assert_allclose(
            record.image, images[offset + index].reshape(8, 8) * 255 / 16, atol=0.5
        )
    with pytest.raises(UserError, match=r"'tset'.*Did you mean 'test'"):
        open_source("digits", "tset")


def _pack(file: Path, images: list[bytes], labels: list[int], **extra: np.ndarray) -> None:
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in images])]).astype(np.int64)
    np.savez_compressed(
        file,
        jpeg=np.frombuffer(b"".join(images), np.uint8),
        offsets=offsets,
        labels=np.asarray(labels, np.uint8),
        **extra,
    )


def test_packed_npz_gives_back_each_file(tmp_path: Path, rng: np.random.Generator) -> None:
    images = [
        encode(Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)), "PNG")
        for _ in range(6)
    ]
    _pack(tmp_path / "train.npz", images, [0, 1, 2, 0, 1, 2], names=np.array(list("abcdef")))
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    source = open_source("packed_npz", "train", path=str(tmp_path))
    assert source.class_names == ("red", "green", "blue")
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert [copy[i].image for i in range(len(copy))] == images
        assert [copy[i].target for i in range(6)] == [0, 1, 2, 0, 1, 2]
        assert copy[4].name.endswith("train.npz[4] (e)")


def test_packed_npz_says_what_is_wrong(tmp_path: Path) -> None:
    _pack(tmp_path / "train.npz", [b"xx", b"yyy"], [0, 3])
    path = str(tmp_path)
    assert open_source("packed_npz", "train", path=path).class_names == ("0", "1", "2", "3")
    with pytest.raises(UserError, match=r"splits found there: train. Did you mean 'train'"):
        open_source("packed_npz", "trian", path=path)
    (tmp_path / "classes.txt").write_text("only\nthree\nnames\n")
    with pytest.raises(UserError, match=r"label 3.*names only 3"):
        open_source("packed_npz", "train", path=path)
    np.savez(tmp_path / "other.npz", labels=np.zeros(2))
    with pytest.raises(UserError, match=r"lacks the arrays jpeg, offsets"):
        open_source("packed_npz", "other", path=path)
    np.savez(
        tmp_path / "short.npz",
        jpeg=np.zeros(9, np.uint8),
        offsets=np.array([0, 4]),
        labels=np.zeros(1, int),
    )
    with pytest.raises(UserError, match=r"offsets do not fit"):
        open_source("packed_npz", "short", path=path)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "train.npz").read_bytes()[:200])
    with pytest.raises(UserError, match=r"cannot be read"):
        open_source("packed_npz", "cut", path=path)


def test_image_folder_labels_come_from_train(image_tree: Path) -> None:
    train = open_source("image_folder", "train", path=str(image_tree))
    test = open_source("image_folder", "test", path=str(image_tree))
    assert train.class_names == test.class_names == ("ant", "bee", "cat")
    labels = [train[i].target for i in range(len(train))]
    assert labels == [0] * 23 + [1] * 7
    assert [test[i].target for i in range(len(test))] == [1] * 4 + [2] * 2
    assert test[5].name.endswith("test/cat/01.png")


def test_image_folder_takes_a_class_list(image_tree: Path) -> None:
    rows = ["label\tfolder\tname", "0\tcat\tA cat", "1\tbee\tA bee", "2\tant\tAn ant"]
    (image_tree / "classes.tsv").write_text("\n".join(rows) + "\n")
    test = open_source("image_folder", "test", path=str(image_tree))
    assert test.class_names == ("A cat", "A bee", "An ant")
    assert [test[i].target for i in range(len(test))] == [1] * 4 + [0] * 2
    other = image_tree / "mine.txt"
    other.write_text("bee\ncat\n")
    named = open_source("image_folder", "test", path=str(image_tree), class_list=str(other))
    assert [named[i].target for i in range(len(named))] == [0] * 4 + [1] * 2
    with pytest.raises(UserError, match=r"no known class: ant"):
        open_source("image_folder", "train", path=str(image_tree), class_list=str(other))


def test_image_folder_says_what_is_wrong(image_tree: Path) -> None:
    path = str(image_tree)
    with pytest.raises(UserError, match=r"does not exist.*test, train. Did you mean 'test'"):
        open_source("image_folder", "tset", path=path)
    (image_tree / "val" / "ant").mkdir(parents=True)
    with pytest.raises(UserError, match=r"No images in"):
        open_source("image_folder", "val", path=path)
    with pytest.raises(UserError, match=r"does not exist"):
        open_source("image_folder", "train", path=path + "-elsewhere")
    source = open_source("image_folder", "train", path=path)
    shutil.rmtree(image_tree / "train")
    with pytest.raises(DecodeError, match=r"00.png"):
        source[0]


def test_paths_expand_variables(image_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TREE", str(image_tree))
    assert len(open_source("image_folder", "train", path="$SOME_TREE")) == 30
    monkeypatch.delenv("SOME_TREE")
    with pytest.raises(UserError, match=r"environment variable"):
        open_source("image_folder", "train", path="$SOME_TREE/x")


def test_unknown_source_is_suggested() -> None:
    with pytest.raises(UserError, match=r"'digit'.*Did you mean 'digits'"):
        open_source("digit", "train")


def test_real_sets(real_data: Path) -> None:
    cifar = open_source("packed_npz", "test", path=str(real_data / "cifar10"))
    assert len(cifar) == 10_000
    assert cifar.class_names[0] == "airplane" and cifar.class_names[9] == "truck"
    assert [cifar[i].target for i in range(10)] == list(range(10))
    assert decode_image(cifar[123].image, channels=3).size == (32, 32)
    tiny = open_source("packed_npz", "val", path=str(real_data / "tiny_imagenet"))
    assert len(tiny) == 2000 and len(tiny.class_names) == 200
    samples = real_data / "imagenet_samples"
    classes = str(samples / "imagenet1k_classes.tsv")
    imagenet = open_source("image_folder", "val", path=str(samples), class_list=classes)
    assert len(imagenet) == 41 and len(imagenet.class_names) == 1000
    rows = (samples / "labels.tsv").read_text().splitlines()
    columns = rows[0].split("\t")
    label_of = {r.split("\t")[0]: int(r.split("\t")[columns.index("label")]) for r in rows[1:]}
    for i in range(41):
        record = imagenet[i]
        assert record.target == label_of[str(Path(record.name).relative_to(samples))]


def test_decode_error_is_a_user_error() -> None:
    assert issubclass(DecodeError, UserError)


@pytest.mark.parametrize(
    ("part", "numbers"),
    [("[5:]", range(5, 360)), ("[:7]", range(7)), ("[-3:]", range(357, 360)), ("[2:4]", (2, 3))],
)
def test_a_slice_takes_a_part_of_a_split(part: str, numbers: range) -> None:
    whole, some = open_source("digits", "test"), open_source("digits", f"test{part}")
    assert len(some) == len(numbers) and some.class_names == whole.class_names
    for ours, number in zip((0, len(some) - 1), (numbers[0], numbers[-1]), strict=True):
        assert some[ours].name == whole[number].name and some[ours].target == whole[number].target
    with pytest.raises(IndexError):
        some[len(some)]
    copy = pickle.loads(pickle.dumps(some))
    assert copy[0].name == some[0].name


def test_a_part_that_is_none_is_refused() -> None:
    for name in ("test[5]", "test[a:b]", "test[1:9:2]", "[3:]"):
        with pytest.raises(UserError, match=r"write it like train\[5000:\]"):
            open_source("digits", name)
    with pytest.raises(UserError, match=r"'test\[400:\]' is empty: the whole holds 360"):
        open_source("digits", "test[400:]")
    with pytest.raises(UserError, match="no split 'tset'"):
        open_source("digits", "tset[:5]")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", "\ufeffant\r\nbee\r\n\r\ncat\r\n".encode()),
        ("classes.txt", "ant\nbee\ncat\n".encode("utf-16")),
        ("classes.tsv", "\ufeffLabel\tName\n1\tbee\n0\tant\n2\tcat\n".encode()),
        ("classes.csv", b"label;folder;name\n0;ant;an ant\n\n1;bee;a bee\n2;cat;a cat\n"),
        ("classes.csv", b'"label","name"\n"0","ant"\n"1","bee"\n"2","cat"\n'),
    ],
)
def test_class_lists_as_people_have_them(name: str, content: bytes, image_tree: Path) -> None:
    (image_tree / name).write_bytes(content)
    source = open_source("image_folder", "train", path=str(image_tree))
    assert len(source.class_names) == 3 and source[0].target == 0 and source[29].target == 1


def test_a_class_list_of_windows_is_read_with_a_warning(
    image_tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (image_tree / "classes.txt").write_bytes("ant\nbee\ncat\nbécasse\n".encode("cp1252"))
    source = open_source("image_folder", "train", path=str(image_tree))
    assert source.class_names[3] == "bécasse" and "read as Windows-1252" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classes.tsv", b"label\tname\nzero\tant\n1\tbee\n", "'zero' of 'ant' is no whole number"),
        ("classes.tsv", b"label\tname\n\tant\n1\tbee\n", "'' of 'ant' is no whole number"),
        ("classes.tsv", b"label\tname\n0\tant\n0\tbee\n", "label 0 twice, to 'ant' and 'bee'"),
        ("classes.tsv", b"label\tname\n0\tant\n2\tbee\n", "without gaps: 1 is missing"),
        ("classes.tsv", b"label\tname\n0\tant\n1\n", "lacks a column"),
        ("classes.tsv", b"label\tname\n" + b"9" * 5000 + b"\tant\n", "no whole number"),
        ("classes.txt", b"cat\nant\nbee\ncat\n", "gives the folder 'cat' two labels, 0 and 3"),
        ("classes.txt", b"\x00\x80\xff", "is no text"),
        ("classes.txt", b"\n", "is empty"),
    ],
)
def test_a_class_list_that_cannot_be_read_is_named(
    name: str, content: bytes, message: str, image_tree: Path
) -> None:
    (image_tree / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        open_source("image_folder", "train", path=str(image_tree))
    assert name in str(raised.value)

"""Prepared shards: the same records, bytes and names; finished shards survive a kill; damage is found by checksum."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import ClassificationData, DecodeError, make_train_iterator, open_source
from fastvim_jax.data.multichannel import read_channels
from fastvim_jax.data.prepare.check import check
from fastvim_jax.data.prepare.encoding import encoded
from fastvim_jax.data.prepare.shards import prepare
from fastvim_jax.data.records import Record
from fastvim_jax.data.sources.layout import guess_source, list_splits
from fastvim_jax.data.sources.part import SourcePart
from fastvim_jax.errors import UserError
from fastvim_jax.lock import locked_beside
from tests.data.conftest import encode


def test_the_records_come_back(image_tree: Path, tmp_path: Path) -> None:
    tree, out = open_source("image_folder", "train", path=str(image_tree)), tmp_path / "shards"
    calls: list[tuple[int, int]] = []
    done = prepare(tree, out, "train", shard_records=7, progress=lambda *c: calls.append(c))
    assert (done.records, done.shards, done.kept, done.left_out) == (30, 5, 0, ())
    assert calls == [(n, 30) for n in (0, 7, 14, 21, 28, 30)]
    assert guess_source(str(out)) == "array_record"
    assert list_splits("array_record", str(out)) == ["train"]
    source = open_source("array_record", "train", path=str(out))
    assert source.class_names == ("ant", "bee", "cat")  # the empty class too
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert [copy[i].image for i in range(30)] == [tree[i].image for i in range(30)]
        assert [copy[i].target for i in range(30)] == [tree[i].target for i in range(30)]
    assert source[8].name == f"{out / 'train-00001-of-00005.array_record'}[1] ({tree[8].name})"
    with pytest.raises(IndexError):
        source[30]
    assert done.bytes == sum(file.stat().st_size for file in out.glob("*.array_record"))
    assert not list(out.glob(".*"))


def test_processes_write_the_same_shards(image_tree: Path, tmp_path: Path) -> None:
    tree = open_source("image_folder", "train", path=str(image_tree))
    for workers in (0, 2):
        prepare(tree, tmp_path / str(workers), "train", shard_records=11, workers=workers)
    manifests = [json.loads((tmp_path / name / "train.json").read_text()) for name in ("0", "2")]
    assert manifests[0]["shards"].keys() == {"0", "1", "2"}
    for number, shard in manifests[0]["shards"].items():
        assert manifests[1]["shards"][number] == shard


@pytest.mark.drawn("data pipelines", one_in=6)
def test_workers_and_threads_read_the_same(image_tree: Path, tmp_path: Path, seed: int) -> None:
    prepare(open_source("image_folder", "train", path=str(image_tree)), tmp_path / "s", "train")
    taken = []
    for source, path, workers in (
        ("image_folder", image_tree, 0),
        ("array_record", tmp_path / "s", 0),
        ("array_record", tmp_path / "s", 1),
    ):
        config = ClassificationData(
            source=source, path=str(path), image_size=8, batch_size=10, workers=workers
        )
        iterator = make_train_iterator(config, seed=seed)
        taken.append([next(iterator) for _ in range(4)])
        iterator.close()
    for other in taken[1:]:
        for a, b in zip(taken[0], other, strict=True):
            np.testing.assert_array_equal(a["image"], b["image"])
            np.testing.assert_array_equal(a["label"], b["label"])


def test_large_images_are_reduced(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "tree" / "train" / "a"
    folder.mkdir(parents=True)
    waves = np.sin(np.arange(240)[:, None] / 23) + np.cos(np.arange(180)[None] / 17)
    smooth = np.uint8((waves[..., None] + 2) / 4 * np.array([255, 200, 150]))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise: 180 wide becomes 240 wide
    (folder / "0.jpg").write_bytes(encode(Image.fromarray(smooth), "JPEG", quality=95, exif=exif))
    (folder / "1.png").write_bytes(encode(Image.fromarray(smooth[..., 0]), "PNG"))
    (folder / "2.png").write_bytes(encode(Image.fromarray(smooth[:60, :50]), "PNG"))
    tree = open_source("image_folder", "train", path=str(tmp_path / "tree"))
    prepare(tree, tmp_path / "out", "train", max_size=60)
    source = open_source("array_record", "train", path=str(tmp_path / "out"))
    images = [Image.open(io.BytesIO(source[i].image)) for i in range(3)]  # type: ignore[arg-type]
    assert [(i.size, i.mode, i.format) for i in images[:2]] == [
        ((80, 60), "RGB", "JPEG"),
        ((60, 80), "L", "JPEG"),
    ]
    assert source[2].image == tree[2].image  # as small already
    expected = Image.fromarray(np.rot90(smooth, -1)).resize((80, 60), Image.Resampling.BICUBIC)
    error = np.abs(np.asarray(images[0]).astype(float) - np.asarray(expected))
    assert error.mean() < 2 and error.max() < 25, (error.mean(), error.max())


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("side", [9, 40])
def test_a_photograph_with_a_second_page_stays_one(
    mode: str, side: int, rng: np.random.Generator
) -> None:
    """Keep a photograph with a second page one image: cameras write a thumbnail there, scanners the next sheet.

    Grey pages are channels.
    """
    photo = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).convert(mode)
    more = photo.resize((side, side))
    tiff = encode(photo, "TIFF", save_all=True, append_images=[more])
    stored = encoded(Record(tiff, 0, "photo.tif"), 20)
    if (mode, side) == ("L", 40):
        assert read_channels(stored, "stack").pixels.shape == (20, 20, 2)
    else:
        image = Image.open(io.BytesIO(stored))
        assert (image.format, image.mode, image.size) == ("JPEG", mode, (20, 20))


def test_pixel_arrays_are_kept_exactly(tmp_path: Path) -> None:
    digits = open_source("digits", "test")
    prepare(digits, tmp_path, "test")
    source = open_source("array_record", "test", path=str(tmp_path))
    image = Image.open(io.BytesIO(source[17].image))  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.asarray(image), digits[17].image)


_SLOW = """
import sys, time
from pathlib import Path
from fastvim_jax.data import open_source
from fastvim_jax.data.prepare.shards import prepare
from fastvim_jax.data.sources.image_folder import ImageFolderSource

class Slow(ImageFolderSource):
    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)

prepare(Slow(Path(sys.argv[1]), "train"), sys.argv[2], "train", shard_records=3, max_size=20)
"""


def test_a_killed_preparation_goes_on(image_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = subprocess.Popen([sys.executable, "-c", _SLOW, image_tree, out])
    deadline = time.monotonic() + 60
    while len(list(out.glob("train-*"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    with pytest.raises(UserError, match=r"not finished; give the same `fastvim data prepare`"):
        open_source("array_record", "train", path=str(out))
    tree = open_source("image_folder", "train", path=str(image_tree))
    before = {file: file.stat().st_mtime_ns for file in out.glob("train-*")}
    done = prepare(tree, out, "train", shard_records=3, max_size=20)
    # The last shard seen may have been renamed just before its entry was written.
    assert 3 <= done.kept < 10 and done.records == 30
    kept = [file for file, written in before.items() if file.stat().st_mtime_ns == written]
    assert len(kept) == done.kept
    assert not list(out.glob(".*"))
    prepare(tree, tmp_path / "whole", "train", shard_records=3, max_size=20)
    for file in (tmp_path / "whole").glob("train-*"):
        assert file.read_bytes() == (out / file.name).read_bytes()
    assert prepare(tree, out, "train", shard_records=3, max_size=20).kept == 10
    with pytest.raises(UserError, match=r"prepared with other settings"):
        prepare(tree, out, "train", shard_records=3, max_size=10)


def test_two_at_once_are_refused(image_tree: Path, tmp_path: Path) -> None:
    """Only where they write the same split: they would remove each other's unfinished shards."""
    tree = open_source("image_folder", "train", path=str(image_tree))
    with locked_beside(tmp_path / "train", "folder"):
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} .*another folder"):
            prepare(tree, tmp_path, "train")
        assert prepare(tree, tmp_path, "val").records == 30
    assert prepare(tree, tmp_path, "train").records == 30


def test_what_changed_in_the_source_is_written_again(image_tree: Path, tmp_path: Path) -> None:
    ant, bee = image_tree / "train" / "ant", image_tree / "train" / "bee"
    out = tmp_path / "out"

    def again() -> tuple[int, int]:
        tree = open_source("image_folder", "train", path=str(image_tree))
        done = prepare(tree, out, "train", shard_records=10)
        assert done.records == 30
        source = open_source("array_record", "train", path=str(out))
        assert [(source[i].image, source[i].target) for i in range(30)] == [
            (tree[i].image, tree[i].target) for i in range(30)
        ]
        return done.kept, done.changed

    assert again() == (0, 0)
    assert again() == (3, 0)
    # The label of the last ant: same count, same order of names.
    (ant / "22.png").rename(bee / "!.png")
    assert again() == (2, 1)
    mended = bytearray((ant / "12.png").read_bytes())
    mended[-1] ^= 1  # as long as before
    (ant / "12.png").write_bytes(mended)
    assert again() == (2, 1)
    (ant / "03.png").unlink()
    (ant / "03.png").symlink_to(ant / "missing.png")
    tree = open_source("image_folder", "train", path=str(image_tree))
    done = prepare(tree, out, "train", shard_records=10, max_corrupt=1)
    assert (done.kept, done.changed, done.records) == (2, 1, 29)
    done = prepare(tree, out, "train", shard_records=10, max_corrupt=1)
    assert (done.kept, done.changed, done.records) == (3, 0, 29)
    (ant / "03.png").unlink()
    (ant / "03.png").write_bytes((bee / "00.png").read_bytes())
    assert again() == (2, 1)


def test_a_source_without_stamps_is_read(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (6, 4, 5), dtype=np.uint8)
    records = [Record(image, i % 2, f"r{i}") for i, image in enumerate(pixels)]

    class Plain:
        class_names = ("a", "b")

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Record:
            return records[index]

    source = Plain()
    prepare(source, tmp_path, "train", shard_records=2)
    for changes in (
        {"target": 1},
        {"name": "other"},
        {"image": source[2].image ^ np.uint8(1)},
        {"image": source[2].image.reshape(5, 4)},
    ):
        records[2] = dataclasses.replace(source[2], **changes)
        done = prepare(source, tmp_path, "train", shard_records=2)
        assert (done.kept, done.changed) == (2, 1), changes


@pytest.mark.parametrize("known", [True, False])
def test_a_label_outside_the_classes_is_refused(
    known: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    pixels = rng.integers(0, 256, (6, 4, 5), dtype=np.uint8)

    class Stray:
        class_names = ("a", "b", "c")
        stray = np.array([0, 1, 2, 0, 3, -1])

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Record:
            return Record(pixels[index], int(self.stray[index]), f"record {index}")

    if known:
        Stray.labels = Stray.stray  # type: ignore[attr-defined]
    message = r"record 4: the label 3 is outside the 3 classes.*`fastvim data check`"
    with pytest.raises(UserError, match=message) as refused:
        prepare(Stray(), tmp_path / "out", "train", shard_records=2, max_corrupt=6)
    assert ("2 of 6 records" in str(refused.value)) == known
    assert (tmp_path / "out").exists() != known
    if known:
        part = SourcePart(Stray(), slice(2, 4), "part")
        assert prepare(part, tmp_path / "out", "train").records == 2
        with pytest.raises(UserError, match=r"record 5: the label -1 is.*1 of 1 record"):
            prepare(SourcePart(Stray(), slice(5, 6), "part"), tmp_path / "last", "train")


def test_undecodable_records_stop_it_or_are_left_out(image_tree: Path, tmp_path: Path) -> None:
    bad = image_tree / "train" / "ant" / "05.png"
    bad.write_bytes(b"no image")
    tree = open_source("image_folder", "train", path=str(image_tree))
    with pytest.raises(DecodeError, match=r"05.png: not an image(.|\n)*max_corrupt allows 0"):
        prepare(tree, tmp_path / "out", "train", max_size=5, shard_records=4)
    done = prepare(tree, tmp_path / "out", "train", max_size=5, shard_records=4, max_corrupt=1)
    assert done.records == 29 and done.kept == 1 and str(bad) in done.left_out[0]
    source = open_source("array_record", "train", path=str(tmp_path / "out"))
    assert len(source) == 29 and source[5].name.endswith(f"({tree[6].name})")


def test_damage_is_found(image_tree: Path, tmp_path: Path) -> None:
    tree = open_source("image_folder", "train", path=str(image_tree))
    done = prepare(tree, tmp_path, "train", shard_records=10)
    clean = check(open_source("array_record", "train", path=str(tmp_path)))
    assert [p.kind for p in clean.problems] == ["empty class"]
    shard = tmp_path / "train-00001-of-00003.array_record"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    found = check(open_source("array_record", "train", path=str(tmp_path)))
    assert {p.kind for p in found.problems} >= {"checksum"} and str(shard) in found.problems[
        0
    ].message
    # Given again, the command mends it.
    again = prepare(tree, tmp_path, "train", shard_records=10)
    assert (again.kept, again.shards) == (2, 3) and again.bytes == done.bytes
    assert (
        check(open_source("array_record", "train", path=str(tmp_path))).problems == clean.problems
    )
    shard.write_bytes(bytes(content[:-9]))
    with pytest.raises(UserError, match=r"changed or copied in part"):
        open_source("array_record", "train", path=str(tmp_path))
    shard.unlink()
    with pytest.raises(UserError, match=r"00001-of-00003.array_record' is missing"):
        open_source("array_record", "train", path=str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_names", "abc"), ("class_names", ["ant", 3, "cat"]), ("class_names", None), ("channel_names", "RGB"),
        ("source_records", 31), ("shards", []), ("shards.0", None), ("shards.0.records", 1e20),
        ("shards.0.records", -3), ("shards.0.sha256", None), ("shards.1.bytes", "9"), ("shards.1.file", 3),
        ("left_out", {"0": "a"}),
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_named(
    field: str, value: Any, image_tree: Path, tmp_path: Path
) -> None:
    """Name a damaged manifest, rather than read fewer records or take a text for a list of letters."""
    tree = open_source("image_folder", "train", path=str(image_tree))
    prepare(tree, tmp_path / "out", "train", shard_records=15)
    file = tmp_path / "out" / "train.json"
    manifest = inner = json.loads(file.read_text())
    *path, last = field.split(".")
    for key in path:
        inner = inner[key]
    inner[last] = value
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"train.json.*(is damaged|lacks shards or records)"):
        open_source("array_record", "train", path=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"train.json.*(is damaged|prepared with other)"):
        prepare(tree, tmp_path / "out", "train", shard_records=15)


_FULL = """
import resource, signal, sys
from fastvim_jax.data import open_source
from fastvim_jax.data.prepare.shards import prepare

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tree = open_source("image_folder", "train", path=sys.argv[1])
# The manifest and the shard of the small images fit, the other does not.
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
    prepare(tree, sys.argv[2], "train", shard_records=20)
except ValueError as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_is_named(image_tree: Path, tmp_path: Path) -> None:
    (image_tree / "train" / "bee" / "06.png").write_bytes(b"x" * 400_000)
    arguments = [sys.executable, "-c", _FULL, image_tree, tmp_path / "out"]
    text = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert text.startswith(f"UserError {str(tmp_path / 'out')!r} could not be written: "), text
    assert "File too large" in text and "MB free" in text and "finished shards are kept" in text
    assert not list((tmp_path / "out").glob(".*"))
    tree = open_source("image_folder", "train", path=str(image_tree))
    assert prepare(tree, tmp_path / "out", "train", shard_records=20).kept == 1


def test_it_says_what_is_wrong(image_tree: Path, tmp_path: Path) -> None:
    tree = open_source("image_folder", "train", path=str(image_tree))
    for changes, message in (
        ({"max_size": 0}, "max_size is 0"),
        ({"shard_records": 0}, "shard_records is 0"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(tree, tmp_path, "train", **changes)
    with pytest.raises(UserError, match="cannot be a split's name"):
        prepare(tree, tmp_path, "a/b")
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file.* cannot be a folder for shards: it is a file"):
            prepare(tree, taken, "train")
    assert (tmp_path / "file").read_text() == "mine"
    for name in ("\udcff", "a\0b"):  # a byte that is not UTF-8, as Python has it in a path
        with pytest.raises(
            UserError, match="cannot be a folder for shards: its name must be UTF-8"
        ):
            prepare(tree, tmp_path / name, "train")
    out = tmp_path / "out"
    prepare(tree, out, "train")
    with pytest.raises(
        UserError, match=r"prepared splits found there: train. Did you mean 'train'"
    ):
        open_source("array_record", "trian", path=str(out))
    (out / "val.json").write_text("{}")
    with pytest.raises(UserError, match=r"no manifest that"):
        open_source("array_record", "val", path=str(out))
    with pytest.raises(UserError, match=r"no manifest of ours"):
        prepare(tree, out, "val")

"""`fastvim data`: exit statuses, what is printed, and the way from a folder to shards."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import open_source
from tests.cli.conftest import Cli


@pytest.fixture
def pets(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Write two classes of three training images and a validation image each."""
    root = tmp_path / "pets"
    for split, count in (("train", 3), ("val", 1)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_a_clean_set(fastvim: Cli, pets: Path) -> None:
    status, out, err = fastvim("data", "check", pets)
    assert status == 0 and err == ""
    *lines, train = out.splitlines()
    assert train.endswith(
        f"train your_images/fastvim --data.path {pets} --data.batch-size 6 --model.num-classes 2"
    )
    assert lines == [
        "image_folder train: 6 records, 2 of 2 classes, 0 repeated images, 0 problems",
        "image_folder val: 2 records, 2 of 2 classes, 0 repeated images, 0 problems",
        "Nothing is wrong.",
    ]


def test_a_folder_of_classes_without_splits(fastvim: Cli, pets: Path, tmp_path: Path) -> None:
    root = pets / "train"
    (root / "cat" / "more").mkdir()  # what is below a class folder belongs to the class
    (root / "cat" / "0.png").rename(root / "cat" / "more" / "0.png")
    status, out, _ = fastvim("data", "check", root)
    assert status == 0 and "image_folder .: 6 records, 2 of 2 classes" in out
    assert "--data.train-split '.[-1/2]' --data.eval-split '.[1/2]'" in out
    held_out, rest = (open_source("image_folder", f".[{n}/2]", path=str(root)) for n in (1, -1))
    names = {source[i].name for source in (held_out, rest) for i in range(len(source))}
    assert len(names) == len(held_out) + len(rest) == 6
    arguments = ("train", "your_images/fastvim", "--data.path", root, "--run-dir", tmp_path / "run")
    status, _, err = fastvim(*arguments)
    assert status == 1 and "--data.train-split" in err
    assert fastvim("data", "prepare", root, "--out", tmp_path / "shards")[0] == 0
    assert len(open_source("array_record", "train", path=str(tmp_path / "shards"))) == 6


def test_no_clean_bill_for_what_training_refuses(fastvim: Cli, pets: Path) -> None:
    (pets / "train").rename(pets / "summer")
    (pets / "winter" / "cat").mkdir(parents=True)
    (pets / "summer" / "cat" / "0.png").rename(pets / "winter" / "cat" / "0.png")
    status, out, _ = fastvim("data", "check", pets)
    assert status == 1 and "Training would refuse" in out and "Nothing is wrong" not in out


def test_files_that_are_not_read_are_named(fastvim: Cli, pets: Path) -> None:
    train = pets / "train"
    (train / "cat" / "0.png").rename(train / "cat" / "0.JFIF")  # read all the same
    (train / "cat" / ".hidden").write_bytes(b"")
    (train / ".checkpoints").mkdir()
    (train / ".checkpoints" / "0.png").write_bytes(b"")
    status, out, _ = fastvim("data", "check", pets)
    assert status == 0 and "train: 6 records" in out and "not read" not in out
    (train / "cat" / "1.png").rename(train / "cat" / "1.heic")
    (train / "dog" / "2.png").rename(train / "2.png")  # beside the class folders
    status, out, _ = fastvim("data", "check", pets)
    assert "train: 4 records" in out and "val: 2 records" in out
    (note,) = [line for line in out.splitlines() if "not read" in line]
    assert "2 files are not read" in note and note.endswith("folder: 2.png, cat/1.heic")
    for i in range(4):
        (train / "dog" / f"{i}.raw").write_bytes(b"")
    report = json.loads(fastvim("data", "check", pets, "--json")[1])
    assert report["splits"]["train"]["unread"] == [
        "2.png", "cat/1.heic", "dog/0.raw", "dog/1.raw", "dog/2.raw", "dog/3.raw",
    ]  # fmt: skip
    assert report["splits"]["val"]["unread"] == []
    out = fastvim("data", "check", pets)[1]
    assert "6 files are not read" in out and "dog/2.raw, ...\n" in out and "3.raw" not in out


def test_a_set_with_faults(fastvim: Cli, pets: Path) -> None:
    (pets / "train" / "cat" / "1.png").write_bytes(b"no image")
    (pets / "val" / "dog" / "0.png").write_bytes((pets / "train" / "dog" / "0.png").read_bytes())
    status, out, _ = fastvim("data", "check", pets)
    assert status == 1 and "1 problem\n" in out and "Something is wrong" in out
    assert f"undecodable: {pets / 'train' / 'cat' / '1.png'}: not an image" in out
    assert "note: train and val share 1 image" in out
    status, out, _ = fastvim("data", "check", pets, "--json", "--split", "train")
    report = json.loads(out)
    assert status == 1 and report["splits"].keys() == {"train"}
    assert report["splits"]["train"]["problems"][0]["kind"] == "undecodable"
    status, out, _ = fastvim("data", "check", pets, "--split", "val", "train")
    assert status == 1 and out.index("val:") < out.index("train:")


def test_prepare_and_check_the_shards(fastvim: Cli, pets: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "shards"
    arguments = ("data", "prepare", pets, "--out", out_dir, "--max-size", "10")
    status, out, _ = fastvim(*arguments)
    assert status == 0 and "train: 6 records of 2 classes" in out and "in 1 shard\n" in out
    assert f"--data.source array_record --data.path {out_dir}" in out
    for split, count in (("train", 6), ("val", 2)):
        assert len(open_source("array_record", split, path=str(out_dir))) == count
    status, out, _ = fastvim(*arguments)
    assert status == 0 and "1 shard (1 was there already)" in out
    (pets / "train" / "cat" / "2.png").rename(pets / "train" / "dog" / "!.png")
    status, out, _ = fastvim(*arguments)
    assert status == 0 and "1 shard (1 written again, because records have changed)" in out
    assert "1 shard (1 was there already)" in out
    train = open_source("array_record", "train", path=str(out_dir))
    assert [train[i].target for i in range(6)] == [0, 0, 1, 1, 1, 1]
    assert fastvim("data", "check", out_dir)[0] == 0
    shard = next(out_dir.glob("val-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    status, out, _ = fastvim("data", "check", out_dir)
    assert status == 1 and "checksum:" in out and str(shard) in out
    assert "note: training does not compare checksums" in out


def test_prepare_refuses_the_set_itself_and_parts(
    fastvim: Cli, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(pets.rglob("*"))
    monkeypatch.chdir(pets)
    for out in (pets, ".", pets / "train" / "..", pets / "shards"):
        status, _, err = fastvim("data", "prepare", pets, "--out", out)
        assert status == 2 and "choose one outside" in " ".join(err.split()), err
    out = tmp_path / "out"
    status, _, err = fastvim("data", "prepare", pets, "--out", out, "--split", "train[:5]")
    assert status == 1 and "--data.train-split 'train[:5]'" in " ".join(err.split()), err
    assert sorted(pets.rglob("*")) == before and not out.exists()
    assert fastvim("data", "prepare", pets, "--out", out)[0] == 0
    status, _, err = fastvim("data", "prepare", out, "--out", out)
    assert status == 2 and "choose one outside" in " ".join(err.split()), err


def test_prepare_refuses_labels_outside_the_classes(
    fastvim: Cli, tmp_path: Path, rng: np.random.Generator
) -> None:
    file, image = io.BytesIO(), rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(image).save(file, "PNG")
    data = np.frombuffer(file.getvalue() * 3, np.uint8)
    np.savez(
        tmp_path / "train.npz", jpeg=data, offsets=np.arange(4) * (len(data) // 3), labels=[0, 1, 2]
    )
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    arguments = ("data", "prepare", tmp_path, "--out", tmp_path / "out")
    status, _, err = fastvim(*arguments)
    text = " ".join(err.split())
    assert status == 1 and "train.npz[2]: the label 2 is outside the 2 classes" in text, err
    assert "fastvim data check" in text and not (tmp_path / "out").exists()
    _, found, _ = fastvim("data", "check", tmp_path)
    assert "3 records, 2 of 2 classes" in found
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    assert fastvim(*arguments)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("data",), 2, "Usage: fastvim data check PATH"),
        (("data", "chek", "x"), 2, "Did you mean 'check'"),
        (("data", "check", "nowhere"), 2, "'nowhere' does not exist"),
        (("data", "check", "digits", "--source", "digit"), 2, "Did you mean 'digits'"),
        (("data", "check", "digits", "--split", "tset"), 1, "Did you mean 'test'"),
        (("data", "prepare", "digits"), 2, "--out"),
        (("data", "prepare", "digits", "--out", "o", "--max-size", "0"), 1, "max_size is 0"),
    ],
)
def test_wrong_usage(
    fastvim: Cli, arguments: tuple[str, ...], status: int, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found, out, err = fastvim(*arguments)
    assert found == status and message in out + err and "Traceback" not in out + err

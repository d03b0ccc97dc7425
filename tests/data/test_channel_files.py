"""Labelled images with one file per channel, found by a naming pattern."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.cli.main import main
from fastvim_jax.data import CellsData, DecodeError, open_source
from fastvim_jax.data.cells import make_eval_iterator, make_train_iterator
from fastvim_jax.data.multichannel import read_channels
from fastvim_jax.data.sources.layout import guess_source, list_splits
from fastvim_jax.errors import UserError

CHANNELS = ("ER", "DNA")  # Not in alphabetical order: the order is the caller's.


@pytest.fixture
def fields(tmp_path: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Write 2 splits x 2 classes x 3 sites of 2 channels; return name → pixels `h w c` in the order of CHANNELS."""
    images = {}
    for split in ("train", "val"):
        for name in ("control", "drug"):
            for site in range(3):
                pixels = rng.integers(0, 256, (20, 20, 2), np.uint8)
                folder = tmp_path / "plate" / split / name
                folder.mkdir(parents=True, exist_ok=True)
                for i, channel in enumerate(CHANNELS):
                    file = folder / f"A1_s{site}_{channel}.png"
                    Image.fromarray(pixels[..., i]).save(file)
                images[f"{split}/{name}/{site}"] = pixels
    return images


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    return f"{tmp_path}/plate/{{split}}/{{class}}/{{well}}_s{{site}}_{{channel}}.png"


def test_every_image_comes_with_its_label_and_the_channels_in_order(fields, pattern):
    source = open_source("channel_files", "val", path=pattern, channels=CHANNELS)
    assert source.class_names == ("control", "drug") and len(source) == 6
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for index in range(6):
        record = source[index]
        name = source.class_names[record.target]
        assert np.array_equal(record.image, fields[f"val/{name}/{index % 3}"])
        assert source.stamp(index) != source.stamp((index + 1) % 6)
    by_name = open_source("channel_files", "val", path=pattern)
    assert by_name.channel_names == ("DNA", "ER")
    assert np.array_equal(by_name[0].image, source[0].image[..., ::-1])
    assert guess_source(pattern) == "channel_files"
    assert list_splits("channel_files", pattern) == ["train", "val"]


def test_a_split_keeps_the_classes_of_train(fields, pattern, tmp_path):
    for file in (tmp_path / "plate" / "val" / "control").iterdir():
        file.unlink()
    source = open_source("channel_files", "val", path=pattern)
    assert source.class_names == ("control", "drug") and set(source.labels) == {1}
    (tmp_path / "plate" / "val" / "new").mkdir()
    (tmp_path / "plate" / "val" / "new" / "A1_s0_ER.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"finds new, which is no known class"):
        open_source("channel_files", "val", path=pattern)


def test_a_missing_channel_and_a_damaged_file_are_named_and_left_out(fields, pattern, tmp_path):
    (tmp_path / "plate" / "train" / "drug" / "A1_s1_DNA.png").unlink()
    (tmp_path / "plate" / "train" / "control" / "A1_s0_ER.png").write_bytes(b"none")
    source = open_source("channel_files", "train", path=pattern, channels=CHANNELS)
    with pytest.raises(DecodeError, match=r"A1_s1_ER\.png: no file of the channel DNA"):
        source[4]
    with pytest.raises(DecodeError, match=r"A1_s0_ER\.png"):
        source[0]
    config = CellsData(
        source="channel_files", path=pattern, channels=2, channel_names=CHANNELS, image_size=16,
        batch_size=6, mean=(0.5, 0.5), std=(0.2, 0.2), max_corrupt=2,
    )  # fmt: skip
    batch = next(make_train_iterator(config, seed=1))
    assert batch["image"].shape == (6, 16, 16, 2)
    held = [
        fields[f"train/{name}/{site}"][2:18, 2:18]
        for name in ("control", "drug")
        for site in range(3)
    ]
    found = next(make_eval_iterator(config, split="train"))
    assert np.asarray(found["valid"]).tolist() == [False, True, True, True, False, True]
    assert np.array_equal(np.asarray(found["image"])[1], held[1])


def test_statistics_lie_beside_the_splits_and_training_finds_them(
    fields, pattern, tmp_path, capsys
):
    config = CellsData(
        source="channel_files", path=pattern, channels=2, channel_names=CHANNELS, image_size=16
    )
    with pytest.raises(UserError) as missing:
        config.resolved()
    command = str(missing.value).partition("`fastvim ")[2].partition("`")[0]
    assert main(shlex.split(command)) == 0
    assert (tmp_path / "plate" / "statistics.json").is_file()
    train = np.stack([pixels for name, pixels in fields.items() if name.startswith("train")])
    assert np.allclose(config.resolved().mean, train.mean((0, 1, 2)) / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("{class}", "*"), r"has no \{class\}"),
        (("{channel}", "x"), r"has no \{channel\}"),
        (("{split}", "train"), r"has no \{split\}, so the only split is 'all'"),
        ((".png", ".tif"), r"no file below"),
        (("plate", "other"), r"does not exist"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_pattern_is_said(fields, pattern, change, message):
    with pytest.raises(UserError, match=message):
        open_source("channel_files", "train", path=pattern.replace(*change))


def test_without_a_split_there_is_one(fields, pattern):
    whole = open_source("channel_files", "all[2:]", path=pattern.replace("{split}", "train"))
    assert len(whole) == 4


def test_a_link_out_of_the_folder_is_refused(fields, pattern, tmp_path):
    file = tmp_path / "plate" / "train" / "drug" / "A1_s1_DNA.png"
    file.rename(tmp_path / "away.png")
    file.symlink_to(tmp_path / "away.png")
    with pytest.raises(UserError, match="is a link out of the data set"):
        open_source("channel_files", "train", path=pattern)
    assert len(open_source("channel_files", "train", path=pattern, follow_links=True)) == 6


def test_linked_folders_are_read_and_hidden_ones_are_not(fields, pattern, tmp_path):
    drug = tmp_path / "plate" / "train" / "drug"
    drug.rename(tmp_path / "plate" / "away")
    drug.symlink_to(tmp_path / "plate" / "away")
    (drug / ".A9_s0_DNA.png").write_bytes(b"hidden")
    assert len(open_source("channel_files", "train", path=pattern)) == 6


def test_two_files_of_one_channel_are_refused(fields, pattern, tmp_path):
    """Refuse them: the second took the first one's place without a word."""
    drug = tmp_path / "plate" / "train" / "drug"
    (drug / "A1_s1_DNA.tif").write_bytes((drug / "A1_s1_DNA.png").read_bytes())
    with pytest.raises(UserError, match=r"A1_s1_DNA.png and .*A1_s1_DNA.tif are the channel DNA"):
        open_source("channel_files", "train", path=pattern.replace(".png", ".{}"))


def test_images_that_match_no_pattern_are_counted(fields, pattern, tmp_path, capsys):
    """Name them: a plate of .tif and .TIF files lost half of its images without a word."""
    source = open_source("channel_files", "train[1/2]", path=pattern)
    assert source.notes == ()
    file = tmp_path / "plate" / "train" / "drug" / "A1_s1_DNA.png"
    for other in ("A2_s1_DNA.PNG", "A1.png", "notes.txt"):
        (file.parent / other).write_bytes(file.read_bytes())
    assert main(["data", "check", pattern]) == 0
    said = capsys.readouterr().out
    assert said.count("left out: 2 image files do not match the pattern") == 1
    assert "(train/drug/A1.png, train/drug/A2_s1_DNA.PNG)" in said


def test_shards_hold_the_channels_that_are_named(fields, pattern, tmp_path, capsys):
    """Prepare the channels named, in their order; otherwise images without one more channel are left out."""
    extra = tmp_path / "plate" / "train" / "drug" / "A1_s0_Mask.png"
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(extra)
    assert main(["data", "check", pattern, "--split", "train"]) == 1
    assert "no file of the channel Mask" in capsys.readouterr().out
    chosen, shards = ["--channels", *CHANNELS], tmp_path / "shards"
    assert main(["data", "check", pattern, "--split", "train", *chosen]) == 0
    assert main(["data", "prepare", pattern, "--out", str(shards), *chosen]) == 0
    said = capsys.readouterr().out
    assert f"--channels {' '.join(CHANNELS)}` counts them" in said
    found = open_source("array_record", "train", path=str(shards))
    assert len(found) == 6 and found.channel_names == CHANNELS
    pixels = read_channels(found[0].image, "a").pixels
    assert np.array_equal(pixels, fields["train/control/0"])
    assert main(["data", "check", str(shards), "--channels", "ER"]) == 2
    assert "the source array_record holds its channels together" in capsys.readouterr().err

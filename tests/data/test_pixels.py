"""Shards of decoded pixels: the images that decoding gives, cropped from the mapped file."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import (
    ClassificationData,
    decode_image,
    make_eval_iterator,
    make_train_iterator,
    open_source,
)
from fastvim_jax.data.prepare.check import check
from fastvim_jax.data.prepare.shards import prepare
from fastvim_jax.data.sources.layout import guess_source, list_splits
from fastvim_jax.data.turbo import MappedPixels, open_image
from fastvim_jax.errors import UserError


@pytest.fixture
def shards(image_tree: Path, tmp_path: Path) -> Path:
    """Return the image tree, one image of it greyscale and one wide, at most 16 pixels on the shorter side."""
    train = image_tree / "train" / "ant"
    Image.open(train / "02.png").convert("L").save(train / "02.png")
    Image.open(train / "04.png").resize((90, 30)).save(train / "04.png")
    for split in ("train", "test"):
        tree = open_source("image_folder", split, path=str(image_tree))
        prepare(tree, tmp_path / "pixels", split, pixels=16, shard_records=7)
    return tmp_path / "pixels"


def test_records_are_the_decoded_images(image_tree: Path, shards: Path) -> None:
    assert guess_source(str(shards)) == "pixels"
    assert list_splits("pixels", str(shards)) == ["test", "train"]
    tree = open_source("image_folder", "train", path=str(image_tree))
    source = open_source("pixels", "train", path=str(shards))
    assert source.class_names == tree.class_names and len(source) == len(tree)
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for i in range(len(tree)):
            ours, theirs = copy[i], tree[i]
            assert isinstance(ours.image, np.memmap) and not ours.image.flags.writeable
            image = decode_image(theirs.image, channels=1 if i == 2 else 3)
            shorter = min(image.size)
            if shorter > 16:
                size = [round(side * 16 / shorter) for side in image.size]
                image = image.resize(size, Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(ours.image, np.asarray(image))
            assert ours.target == theirs.target and theirs.name in ours.name
    assert source[4].image.shape == (16, 48, 3) and source[2].image.ndim == 2
    np.testing.assert_array_equal(source.labels, [tree[i].target for i in range(len(tree))])
    assert source[8].name.startswith(f"{shards / 'train-00001-of-00005.pixels'}[1] (")
    with pytest.raises(IndexError):
        source[30]


def test_batches_are_those_of_the_same_images_in_files(
    image_tree: Path, tmp_path: Path, seed: int
) -> None:
    """Compare batches with those of the same images in files, which `prepare` need not reduce.

    In processes and threads the crops are the same, up to the resizer's rounding.
    """
    tree = open_source("image_folder", "train", path=str(image_tree))
    for split in ("train", "test"):
        tree = open_source("image_folder", split, path=str(image_tree))
        prepare(tree, tmp_path / "pixels", split, pixels=64, shard_records=9)
    files = ClassificationData(
        source="image_folder", path=str(image_tree), image_size=(12, 16), batch_size=15
    )
    pixels = dataclasses.replace(files, source="pixels", path=str(tmp_path / "pixels"))
    for decoder, bound in (("pillow", 0), ("auto", 0.5)):
        for make in (lambda c: make_train_iterator(c, seed=seed), make_eval_iterator):
            ours = make(dataclasses.replace(pixels, decoder=decoder))
            theirs = make(dataclasses.replace(files, decoder="pillow"))
            for _ in range(ours.steps_per_epoch):
                a, b = next(ours), next(theirs)
                np.testing.assert_array_equal(a["label"], b["label"])
                off = np.abs(a["image"].astype(int) - b["image"])
                # The resizer clips intermediate values elsewhere, which noise such as this shows.
                assert off.mean() <= bound
            ours.close()
            theirs.close()


def test_only_mapped_colour_pixels_skip_pillow(shards: Path) -> None:
    source = open_source("pixels", "train", path=str(shards))
    assert isinstance(
        open_image(source[0].image, channels=3, name="", decoder="turbo"), MappedPixels
    )
    for image, channels, decoder in (
        (source[0].image, 1, "turbo"),
        (source[0].image, 3, "pillow"),
        (source[2].image, 3, "turbo"),
        (np.array(source[0].image), 3, "turbo"),
    ):
        opened = open_image(image, channels=channels, name="", decoder=decoder)
        assert isinstance(opened, Image.Image)


def test_damage_is_found(image_tree: Path, shards: Path) -> None:
    clean = check(open_source("pixels", "train", path=str(shards)))
    assert {p.kind for p in clean.problems} == {"empty class"}
    shard = shards / "train-00001-of-00005.pixels"
    whole = shard.read_bytes()

    def damage(place: int, content: bytes) -> None:
        shard.write_bytes(whole[:place] + content + whole[place + len(content) :])

    damage(5, bytes([whole[5] ^ 1]))
    found = check(open_source("pixels", "train", path=str(shards)))
    assert "checksum" in {p.kind for p in found.problems}
    at_index = int(np.frombuffer(whole[-24:-16], "<u8")[0])
    for place, content, message in (
        (len(whole) - 8, b"XXXXXXXX", "no shard of pixels"),
        (len(whole) - 24, (2**63).to_bytes(8, "little"), "no shard of pixels"),
        (len(whole) - 24, (at_index + 8).to_bytes(8, "little"), "does not hold"),
        (at_index + 8, (2**62).to_bytes(8, "little"), "damaged index"),
        (at_index, (2**63 - 1).to_bytes(8, "little"), "damaged index"),
        (at_index + 24, (2).to_bytes(8, "little"), "damaged index"),
    ):
        damage(place, content)
        with pytest.raises(UserError, match=message):
            open_source("pixels", "train", path=str(shards))
    # Given again, the command mends it; other settings want another folder.
    tree = open_source("image_folder", "train", path=str(image_tree))
    again = prepare(tree, shards, "train", pixels=16, shard_records=7)
    assert (again.kept, again.shards) == (4, 5) and shard.read_bytes() == whole
    for other in ({"pixels": 17}, {"max_size": 16}, {}):
        with pytest.raises(UserError, match="other (format|settings)"):
            prepare(tree, shards, "train", shard_records=7, **other)
    with pytest.raises(UserError, match="set data.source to it"):
        open_source("array_record", "train", path=str(shards))
    with pytest.raises(UserError, match="give one"):
        prepare(tree, shards, "train", pixels=16, max_size=16)


def test_an_image_folder_that_holds_shards_names_their_kind(shards: Path, tmp_path: Path) -> None:
    """Name data.source where a folder of shards is opened as an image folder, the default of experiments."""
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "train-0.tar").touch()
    for folder, kind in ((shards, "pixels"), (tmp_path / "tars", "webdataset")):
        with pytest.raises(UserError, match=f"of the kind {kind}: set data.source={kind}"):
            open_source("image_folder", "train", path=str(folder))

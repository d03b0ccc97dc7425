"""Batches of any number of channels: which channels a step sees, cuts, augmentation, stored statistics."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvim_jax.cli.main import main
from fastvim_jax.data import cells, cells_device, open_source
from fastvim_jax.data.cells_config import CellsData
from fastvim_jax.data.prepare.shards import prepare
from fastvim_jax.data.records import Record
from fastvim_jax.data.statistics import count_statistics, read_statistics, write_statistics
from fastvim_jax.errors import UserError

NAMES = ("a", "b", "c", "d")


class Images:
    """Random images of four channels, a little larger than the input."""

    class_names = ("x", "y")

    def __init__(self, count: int, rng: np.random.Generator):
        self.pixels = rng.integers(0, 256, (count, 11, 12, 4)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Record:
        return Record(self.pixels[index], index % 2, f"image {index}")


@pytest.fixture
def config(tmp_path: Path, rng: np.random.Generator) -> CellsData:
    prepare(Images(24, rng), tmp_path, "train")
    return CellsData(
        path=str(tmp_path), train_split="train", eval_split="train", channels=4, channel_names=NAMES,
        image_size=8, batch_size=4, mean=(0.1, 0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7, 0.8),
        channel_sampling="sorted",
    )  # fmt: skip


def test_a_step_sees_the_same_channels_in_every_process_and_after_a_restart(
    config: CellsData,
) -> None:
    whole = cells.make_train_iterator(config, seed=3)
    batches = [next(whole) for _ in range(5)]
    halves = [
        cells.make_train_iterator(config, seed=3, process_index=i, process_count=2) for i in (0, 1)
    ]
    for number, batch in enumerate(batches):
        ids = cells.draw_channels(3, number, 4, "sorted")
        assert np.array_equal(batch["channel_ids"], np.tile(ids, (4, 1)))
        assert batch["image"].shape == (4, 8, 8, len(ids))
        shares = [next(half) for half in halves]
        for key in ("image", "channel_ids", "label"):
            assert np.array_equal(batch[key], np.concatenate([share[key] for share in shares]))
        if number == 2:
            state = whole.get_state() | {"batches": 3}
    resumed = cells.make_train_iterator(config, seed=3)
    resumed.set_state(state)
    for batch in batches[3:]:
        again = next(resumed)
        assert all(np.array_equal(batch[key], again[key]) for key in batch)
    for iterator in (whole, *halves, resumed):
        iterator.close()


def test_images_of_other_channels_than_the_configs_are_named(config: CellsData) -> None:
    """Say why nothing can be read: the number of channels, which no other record mends."""
    less = dataclasses.replace(
        config, channels=3, channel_names=(), mean=(0.1,) * 3, std=(1.0,) * 3, max_corrupt=99
    )
    batches = cells.make_train_iterator(less, seed=0)
    with pytest.raises(UserError, match=r"the last because: .* 4 channels, but data.channels is 3"):
        next(batches)
    batches.close()


def test_draws_are_uniform_in_number_and_in_channel() -> None:
    draws = [cells.draw_channels(1, step, 4, "unsorted") for step in range(4000)]
    sizes = np.bincount([len(d) for d in draws], minlength=5)[1:]
    assert (abs(sizes - 1000) < 6 * np.sqrt(1000 * 0.75)).all()
    seen = np.bincount(np.concatenate(draws), minlength=4)
    assert (abs(seen - 2500) < 6 * np.sqrt(4000 * 0.25)).all()
    assert any((np.diff(d) < 0).any() for d in draws)
    assert all((np.diff(cells.draw_channels(1, step, 4, "sorted")) > 0).all() for step in range(50))


def test_evaluation_takes_a_subset_by_name_in_the_order_named(config: CellsData) -> None:
    subset = dataclasses.replace(config, eval_channels=("c", "a"))
    batches, every = cells.make_eval_iterator(subset), cells.make_eval_iterator(config)
    batch = next(batches)
    assert batch["channel_ids"].tolist() == [[2, 0]] * 4
    assert np.array_equal(batch["image"], next(every)["image"][..., [2, 0]])
    batches.close()
    every.close()
    with pytest.raises(UserError, match="eval_channels"):
        dataclasses.replace(config, eval_channels=("e",))


def test_channels_come_in_the_order_of_their_names_or_are_refused(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Read, count and reduce OME-TIFFs by channel name where their names stand in another order than the config's."""
    tifffile = pytest.importorskip("tifffile")
    pixels = rng.integers(0, 256, (2, 12, 12), np.uint8) // np.array([[[1]], [[9]]], np.uint8)
    folder = tmp_path / "train" / "x"
    folder.mkdir(parents=True)
    metadata = {"axes": "CYX", "Channel": {"Name": ["DNA", "ER"]}}
    for number in range(2):
        tifffile.imwrite(folder / f"{number}.ome.tif", pixels, metadata=metadata)
    assert main(["data", "stats", str(tmp_path), "--channels", "ER", "DNA"]) == 0
    out = tmp_path.parent / f"{tmp_path.name}-shards"
    prepare(open_source("image_folder", "train", path=str(tmp_path)), out, "train", max_size=12)
    small = tmp_path.parent / f"{tmp_path.name}-small"
    prepare(open_source("image_folder", "train", path=str(tmp_path)), small, "train", max_size=6)
    sets = {"image_folder": tmp_path, "array_record": out}
    for source, path in [*sets.items(), ("array_record", small)]:
        config = CellsData(
            source=source, path=str(path), train_split="train", eval_split="train", channels=2,
            channel_names=("ER", "DNA"), image_size=6, batch_size=2, workers=0, mean=(0.0, 0.0), std=(1.0, 1.0),
        )  # fmt: skip
        batches = cells.make_eval_iterator(config)
        image = np.asarray(next(batches)["image"])[0]
        assert image[..., 0].max() < 256 // 9 + 3 < image[..., 1].max()
        if path != small:
            assert np.array_equal(image[..., 1], pixels[0, 3:9, 3:9])
        batches.close()
    mean, _ = read_statistics(tmp_path, ("DNA", "ER"))
    assert np.allclose(mean, pixels.mean(axis=(1, 2)) / 255)


def test_names_in_another_order_than_the_shards_are_refused(
    config: CellsData, rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Images(8, rng)
    images.channel_names = ("d", "a", "b", "c")
    prepare(images, tmp_path / "named", "train")
    named = dataclasses.replace(config, path=str(tmp_path / "named"))
    with pytest.raises(UserError, match="the images hold d, a, b, c: give the names in this order"):
        cells.make_eval_iterator(named)
    with pytest.raises(UserError, match="the images hold d, a, b, c"):
        cells.make_train_iterator(dataclasses.replace(named, train_split="train[:4]"), seed=1)
    assert main(["data", "stats", str(tmp_path / "named"), "--channels", *NAMES]) == 2
    assert "give these names, in this order" in capsys.readouterr().err


def test_shards_of_versions_that_did_not_name_channels_are_kept_and_named(rng, tmp_path) -> None:
    images = Images(8, rng)
    prepare(images, tmp_path, "train", shard_records=4)
    assert "channel_names" not in json.loads((tmp_path / "train.json").read_text())
    images.channel_names = ("d", "a", "b", "c")
    assert prepare(images, tmp_path, "train", shard_records=4).kept == 2
    source = open_source("array_record", "train", path=str(tmp_path))
    assert source.channel_names == images.channel_names
    images.channel_names = ("a", "d", "b", "c")
    with pytest.raises(UserError, match="prepared with other channel_names"):
        prepare(images, tmp_path, "train", shard_records=4)


def test_small_images_are_padded_and_large_ones_cut(rng: np.random.Generator) -> None:
    pixels = rng.integers(1, 256, (5, 9, 3)).astype(np.uint8)
    centre = cells.cut(pixels, (7, 6))
    assert np.array_equal(centre[1:6], pixels[:, 1:7])
    assert not centre[0].any() and not centre[6].any()
    places = {cells.cut(pixels, (5, 6), rng)[0, 0].tobytes() for _ in range(100)}
    assert len(places) == 4


def test_each_channel_is_normalised_by_its_own_statistics(
    config: CellsData, rng: np.random.Generator
) -> None:
    images = jnp.asarray(rng.integers(0, 256, (2, 3, 3, 2)).astype(np.uint8))
    ids = jnp.array([[3, 1], [0, 2]])
    mean, std = np.asarray(config.mean)[ids], np.asarray(config.std)[ids]
    expected = (np.asarray(images) / 255 - mean[:, None, None]) / std[:, None, None]
    preprocess = cells_device.make_preprocess(config)
    assert np.allclose(preprocess(images, ids), expected, atol=1e-5)
    full = preprocess(jnp.zeros((1, 1, 1, 4), jnp.uint8))
    assert np.allclose(full[0, 0, 0], -np.asarray(config.mean) / config.std, atol=1e-6)


def test_turns_are_the_five_that_the_recipe_names(rng: np.random.Generator) -> None:
    images = jnp.asarray(rng.integers(0, 256, (400, 3, 3, 1)).astype(np.uint8)[:1].repeat(400, 0))
    turned = np.asarray(
        cells_device.turn(jax.random.key(int(rng.integers(2**31))), images, probability=0.5)
    )
    image = np.asarray(images[0])
    ways = [image, image[:, ::-1], image[::-1], *(np.rot90(image, k) for k in (1, 2, 3))]
    counts = [sum(np.array_equal(t, way) for t in turned) for way in ways]
    assert sum(counts) == 400 and abs(counts[0] - 200) < 60
    assert all(10 < count < 80 for count in counts[1:])


def test_defocus_is_a_disk_and_leaves_a_flat_image_alone(rng: np.random.Generator) -> None:
    key = jax.random.key(int(rng.integers(2**31)))
    spot = np.zeros((64, 9, 9, 2), np.float32)
    spot[:, 4, 4] = 1.0
    blurred = np.asarray(
        cells_device.defocus(key, jnp.asarray(spot), probability=0.75, radius=(1, 3))
    )
    padded = {0: np.pad(np.ones((1, 1)), 4)} | {
        r: np.pad(cells_device.disk(r), 4 - r) for r in (1, 2, 3)
    }
    met = {
        radius for image in blurred for radius, kernel in padded.items()
        if np.allclose(image[..., 0], kernel, atol=1e-6) and np.allclose(image[..., 1], kernel, atol=1e-6)
    }  # fmt: skip
    assert met == {0, 1, 2, 3}
    flat = jnp.full((8, 5, 5, 1), 3.0)
    assert np.allclose(
        cells_device.defocus(key, flat, probability=1.0, radius=(1, 3)), 3.0, atol=1e-5
    )


def test_holes_are_few_small_and_in_all_channels(rng: np.random.Generator) -> None:
    key = jax.random.key(int(rng.integers(2**31)))
    options = {"probability": 0.5, "holes": 2, "size": 3}
    holed = np.asarray(cells_device.drop_holes(key, jnp.ones((200, 12, 12, 2)), **options))
    assert np.array_equal(holed[..., 0], holed[..., 1])
    dropped = (holed[..., 0] == 0).sum(axis=(1, 2))
    assert dropped.max() <= 18 and 60 < (dropped == 0).sum() < 140


def test_statistics_are_counted_stored_and_used(
    config: CellsData, rng: np.random.Generator, tmp_path: Path
) -> None:
    images = Images(5, rng).pixels
    statistics = count_statistics(iter(images), NAMES)
    flat = images.reshape(-1, 4) / 255
    assert np.allclose(statistics.mean, flat.mean(axis=0)) and np.allclose(
        statistics.std, flat.std(axis=0)
    )
    plain = dataclasses.replace(config, mean=(), std=())
    with pytest.raises(UserError, match="fastvim data stats"):
        plain.resolved()
    with pytest.raises(UserError, match=r"/none' does not exist \(data.path\)"):
        dataclasses.replace(plain, path=str(tmp_path / "none")).resolved()
    write_statistics(tmp_path, statistics)
    resolved = plain.resolved()
    assert resolved.mean == statistics.mean and resolved.resolved() is resolved
    assert resolved.notes == ()
    (note,) = config.notes  # It names a mean of its own.
    assert "not those that statistics.json of" in note
    assert read_statistics(tmp_path, ("c", "a"))[1] == (statistics.std[2], statistics.std[0])
    (tmp_path / "statistics.json").write_text(
        json.dumps({"names": ["a"], "mean": [1.0], "std": [1.0]})
    )
    with pytest.raises(UserError, match="no channel or entry 'b'"):
        plain.resolved()
    with pytest.raises(UserError, match="the same value everywhere"):
        count_statistics([np.zeros((2, 2, 4), np.uint8)], NAMES)


def test_links_are_followed_where_that_is_asked_for(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read linked images in training and statistics; say what was left out, and why, even of all images."""
    folder, elsewhere = tmp_path / "cells", tmp_path / "elsewhere"
    for number in range(4):
        file = elsewhere / f"{number}.npy"
        linked = folder / "train" / "xy"[number % 2] / file.name
        for each in (file, linked):
            each.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, rng.integers(0, 256, (8, 8, 2)).astype(np.uint8))
        linked.symlink_to(file)
    config = CellsData(
        source="image_folder", path=str(folder), channels=2, channel_names=("a", "b"), image_size=8,
        batch_size=4, mean=(0.0,) * 2, std=(1.0,) * 2, follow_links=True,
    )  # fmt: skip
    assert next(cells.make_train_iterator(config, seed=0))["image"].shape == (4, 8, 8, 2)

    def stats(*options: str, status: int) -> str:
        assert main(["data", "stats", str(folder), *options]) == status
        return "".join(capsys.readouterr())

    assert "--follow-links" in stats("--channels", "a", "b", status=2)
    np.save(elsewhere / "0.npy", np.zeros((8, 8, 3), np.uint8))
    text = stats("--channels", "a", "b", "--follow-links", status=0)
    assert "0.npy: 3 channels, but --channels names 2" in text and "3 images of train" in text
    assert "no pixel" not in text
    stored = json.loads((folder / "statistics.json").read_text())
    assert stored["images"] == 3 and "0.npy" in stored["skipped"][0]
    text = stats("--channels", "a", "--follow-links", status=1)
    assert (
        "there is no image to count" in text and "1.npy: 2 channels, but --channels names 1" in text
    )
    for number in range(4):
        np.save(elsewhere / f"{number}.npy", rng.integers(0, 4096, (8, 8, 2)).astype(np.uint16))
    text = stats("--channels", "a", "b", "--follow-links", status=0)
    assert "no pixel of a, b is above 1" in text and "12-bit camera" in text
    for names in ((), ("a", "a")):
        assert "name each channel once" in stats("--channels", *names, status=2)
    assert "--every 0 must be at least 1" in stats("--channels", "a", "--every", "0", status=2)


def test_statistics_name_channels_that_no_name_is_known_of(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Say which files are read in their own order, since their channels have other names than those given."""
    tifffile = pytest.importorskip("tifffile")
    for number, names in enumerate((["405", "488"], ["er", "dna"])):
        file = tmp_path / "train" / "x" / f"{number}.ome.tif"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (2, 8, 8)).astype(np.uint8)
        tifffile.imwrite(file, pixels, metadata={"axes": "CYX", "Channel": {"Name": names}})
    assert main(["data", "stats", str(tmp_path), "--channels", "DNA", "ER"]) == 0
    said = capsys.readouterr().out
    assert said.count("note: there are files whose channels are called") == 1
    assert "called 405, 488, none of which --channels names" in said

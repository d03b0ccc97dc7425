"""TensorFlow Datasets prepared as ArrayRecord, read without TensorFlow; the sets here are written by TFDS itself."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import ClassificationData, make_eval_iterator, open_source
from fastvim_jax.data.fingerprint import fingerprint
from fastvim_jax.data.sources.layout import guess_source, list_splits
from fastvim_jax.errors import UserError
from tests.data.conftest import encode

pytest.importorskip("tensorflow_datasets", reason="no tensorflow-datasets (extra: data)")

_BUILD = """
import io, pathlib, sys
import tensorflow_datasets as tfds

folder, images = pathlib.Path(sys.argv[1]), sorted(pathlib.Path(sys.argv[2]).iterdir())

class TinyPets(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = {"image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"])}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label"))
    def _split_generators(self, manager):
        return {"train": self._generate_examples(0, 7), "validation": self._generate_examples(7, 9)}
    def _generate_examples(self, start, stop):
        for i, file in enumerate(images[start:stop]):
            yield i, {"image": io.BytesIO(file.read_bytes()), "label": i % 3}

TinyPets(data_dir=folder, file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """Return a TFDS folder holding tiny_pets 1.0.0, and the bytes of its nine images."""
    rng = np.random.default_rng()
    files, folder = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("tfds")
    images = []
    for i in range(9):
        pixels = rng.integers(0, 256, (8 + i, 9, 3), dtype=np.uint8)
        images.append(encode(Image.fromarray(pixels), "JPEG"))
        (files / f"{i}.jpg").write_bytes(images[-1])
    # In a process of its own: TFDS registers every builder by its name.
    subprocess.run([sys.executable, "-c", _BUILD, folder, files], check=True, capture_output=True)
    return folder, images


def test_the_stored_bytes_come_back(pets: tuple[Path, list[bytes]]) -> None:
    folder, images = pets
    for path in (folder / "tiny_pets" / "1.0.0", folder / "tiny_pets"):
        assert guess_source(str(path)) == "tfds"
        assert list_splits("tfds", str(path)) == ["train", "validation"]
        source = open_source("tfds", "train", path=str(path))
        assert source.class_names == ("ant", "bee", "cat")
        for copy in (source, pickle.loads(pickle.dumps(source))):
            # TFDS shuffles when it writes.
            found = [copy[i] for i in range(len(copy))]
            assert sorted(r.image for r in found) == sorted(images[:7])
            assert all(r.target == images.index(r.image) % 3 for r in found)
            assert fingerprint(copy, 0, 7) == fingerprint(source, 0, 7) != fingerprint(copy, 1, 8)
    assert source[4].name.endswith("tiny_pets/1.0.0 train[4]")
    with pytest.raises(IndexError):
        source[7]
    assert len(open_source("tfds", "validation", path=str(path))) == 2
    assert "tensorflow" not in sys.modules


def test_a_set_is_found_by_name(
    pets: tuple[Path, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = pets
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    for name in ("tiny_pets", "tiny_pets:1.0.0", "tiny_pets/1.0.0"):
        assert len(open_source("tfds", "train", path=name)) == 7
    with pytest.raises(UserError, match=r"No prepared TFDS set 'tiny_cats'") as caught:
        open_source("tfds", "train", path="tiny_cats")
    assert f"tfds.builder('tiny_cats', data_dir='{folder}', file_format='array_record')" in str(
        caught.value
    )


@pytest.mark.drawn("data pipelines", one_in=6)
def test_it_feeds_the_pipeline_in_workers(pets: tuple[Path, list[bytes]]) -> None:
    folder, _ = pets
    taken = []
    for workers in (0, 1):
        config = ClassificationData(
            source="tfds", path=str(folder / "tiny_pets"), eval_split="train", image_size=8,
            batch_size=4, workers=workers,
        )  # fmt: skip
        batches = make_eval_iterator(config)
        taken.append(list(batches))
        batches.close()
    assert sum(int(batch["valid"].sum()) for batch in taken[0]) == 7
    for a, b in zip(*taken, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


def test_tfrecord_is_answered_with_the_command(
    pets: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    """Refuse TFRecord with the command that converts it.

    Writing TFRecord needs TensorFlow, so the test changes the format's note instead.
    """
    copy = shutil.copytree(pets[0] / "tiny_pets", tmp_path / "tiny_pets")
    info = copy / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=r"prepared as tfrecord.*no random access") as caught:
        open_source("tfds", "train", path=str(copy))
    assert "tfds.builder('tiny_pets', data_dir=" in str(caught.value)
    assert "file_format='array_record').download_and_prepare()" in str(caught.value)


def test_wrong_split_and_missing_package(
    pets: tuple[Path, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(pets[0] / "tiny_pets")
    with pytest.raises(UserError, match=r"found there: train, validation. Did you mean 'train'"):
        open_source("tfds", "trian", path=path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'fastvim-jax\[data\]'"):
        open_source("tfds", "train", path=path)


def test_a_decoded_record_is_the_stored_image(pets: tuple[Path, list[bytes]]) -> None:
    record = open_source("tfds", "train", path=str(pets[0] / "tiny_pets"))[0]
    assert isinstance(record.image, bytes)
    assert Image.open(io.BytesIO(record.image)).format == "JPEG"

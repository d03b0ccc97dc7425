"""Folders as the Hugging Face hub lays them out: every record of unequal shards, class names, and named errors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import (
    ClassificationData,
    make_eval_iterator,
    make_train_iterator,
    open_source,
)
from fastvim_jax.data.fingerprint import fingerprint
from fastvim_jax.data.sources import hugging_face
from fastvim_jax.data.sources.layout import guess_source, list_splits
from fastvim_jax.errors import UserError
from tests.data.conftest import encode

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra: data)")
from pyarrow import parquet as pq  # noqa: E402

NAMES = ("ant", "bee", "cat", "dog")


def _write(
    file: Path,
    images: list[bytes],
    labels: list[int],
    *,
    names: tuple[str, ...] | None = NAMES,
    label: str = "label",
    group: int = 2,
    **columns: list[Any],
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    structs = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    table = pa.table({"image": pa.array(structs, kind), label: pa.array(labels, pa.int64())})
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    if names is not None:
        features = {
            "image": {"_type": "Image"},
            label: {"names": list(names), "_type": "ClassLabel"},
        }
        metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, file, row_group_size=group)


@pytest.fixture
def hub(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, list[bytes], list[int]]:
    """Write three training shards of 5, 1 and 3 images in row groups of 2, and a test shard."""
    images, labels = [], []
    for number, count in enumerate((5, 1, 3)):
        part = [
            encode(Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)), "PNG")
            for _ in range(count)
        ]
        chosen = [int(v) for v in rng.integers(0, 4, count)]
        _write(tmp_path / "data" / f"train-{number:05}-of-00003.parquet", part, chosen)
        images += part
        labels += chosen
    _write(tmp_path / "data" / "test-00000-of-00001.parquet", images[:1], [3])
    return tmp_path, images, labels


def test_every_image_is_there_with_its_label(hub: tuple[Path, list[bytes], list[int]]) -> None:
    root, images, labels = hub
    assert guess_source(str(root)) == "hugging_face"
    assert list_splits("hugging_face", str(root)) == ["test", "train"]
    source = open_source("hugging_face", "train", path=str(root))
    assert source.class_names == NAMES
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert [copy[i].image for i in range(len(copy))] == images
        assert [copy[i].target for i in range(9)] == labels == copy.labels.tolist()
        assert len({fingerprint(copy, i, i + 1) for i in range(9)}) == 9
        assert fingerprint(copy, 0, 9) == fingerprint(source, 0, 9)
    assert [source[i].image for i in (8, 0, 5)] == [images[i] for i in (8, 0, 5)]
    assert source[7].name == f"{root / 'data' / 'train-00002-of-00003.parquet'}[1] (1.png)"
    assert len(open_source("hugging_face", "test", path=str(root))) == 1
    with pytest.raises(IndexError):
        source[9]


def test_the_cache_is_bounded(
    hub: tuple[Path, list[bytes], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, images, _ = hub
    source = open_source("hugging_face", "train", path=str(root))
    assert isinstance(source, hugging_face.ParquetSource)
    limit = 3 * max(map(len, images))
    monkeypatch.setattr(hugging_face, "CACHE_BYTES", limit)
    for i in (*range(9), *reversed(range(9))):
        assert source[i].image == images[i]
        held = sum(group.nbytes for group in source._cache.values())
        assert held <= limit or len(source._cache) == 1
    assert len(source._cache) < 6
    assert b"PNG" not in pickle.dumps(source), "images travel to the workers"


def test_it_feeds_the_pipeline_in_workers(
    hub: tuple[Path, list[bytes], list[int]], seed: int
) -> None:
    root, _, labels = hub
    config = ClassificationData(
        source="hugging_face", path=str(root), eval_split="train", image_size=8, batch_size=4
    )
    batches = list(make_eval_iterator(config))
    found = np.concatenate([batch["label"][batch["valid"]] for batch in batches])
    assert found.tolist() == labels
    taken = []
    for workers in (0, 1):
        iterator = make_train_iterator(
            ClassificationData(**{**config.__dict__, "workers": workers}), seed=seed
        )
        taken.append([next(iterator) for _ in range(3)])
        iterator.close()
    for a, b in zip(*taken, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_folders_of_images_are_read_too(image_tree: Path) -> None:
    source = open_source("hugging_face", "train", path=str(image_tree))
    folder = open_source("image_folder", "train", path=str(image_tree))
    assert len(source) == 30 and source.class_names == folder.class_names
    assert source[29] == folder[29]


def test_other_columns_and_names(tmp_path: Path, rng: np.random.Generator) -> None:
    image = encode(Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)), "PNG")
    file = tmp_path / "plain" / "train.parquet"
    _write(file, [image] * 3, [0, 2, 1], names=None, caption=["x", "y", "z"], width=[4, 4, 4])
    source = open_source("hugging_face", "train", path=str(tmp_path))  # the only config
    assert source.class_names == ("0", "1", "2")
    assert [source[i].target for i in range(3)] == [0, 2, 1]
    listed = tmp_path / "names.txt"
    listed.write_text("a\nb\nc\n")
    assert open_source(
        "hugging_face", "train", path=str(tmp_path), class_list=str(listed)
    ).class_names == ("a", "b", "c")
    _write(tmp_path / "other" / "train.parquet", [image], [0], label="fine_label")
    with pytest.raises(UserError, match=r"several configs: other, plain"):
        open_source("hugging_face", "train", path=str(tmp_path))
    fine = open_source("hugging_face", "train", path=str(tmp_path / "other"))
    assert fine.class_names == NAMES


def test_it_says_what_is_wrong(hub: tuple[Path, list[bytes], list[int]]) -> None:
    root, images, _ = hub
    path, data = str(root), root / "data"
    with pytest.raises(UserError, match=r"splits found there: test, train. Did you mean 'train'"):
        open_source("hugging_face", "trian", path=path)
    _write(data / "secret-00000-of-00001.parquet", images[:2], [-1, -1])
    with pytest.raises(UserError, match=r"label -1, which means none, 2 times in 2 records"):
        open_source("hugging_face", "secret", path=path)
    _write(data / "high.parquet", images[:2], [1, 4])
    with pytest.raises(UserError, match=r"label 4, but the class list names only 4"):
        open_source("hugging_face", "high", path=path)
    assert open_source("hugging_face", "high", path=path, any_label=True)[1].target == 4
    _write(data / "empty.parquet", [], [])
    with pytest.raises(UserError, match="holds no record"):
        open_source("hugging_face", "empty", path=path)
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), data / "words.parquet")
    with pytest.raises(UserError, match=r"no image column; its columns are text, label"):
        open_source("hugging_face", "words", path=path)
    (data / "junk.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"junk.parquet.*cannot be read as Parquet"):
        open_source("hugging_face", "junk", path=path)

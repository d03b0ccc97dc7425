"""The same batches whatever the workers, processes and restarts; exact counts; damaged records counted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastvim_jax.data import (
    BatchIterator,
    ClassificationData,
    DataConfig,
    DecodeError,
    labelled,
    load_image,
    make_eval_iterator,
    make_train_iterator,
    open_source,
)
from fastvim_jax.errors import UserError

DIGITS = ClassificationData(
    source="digits", channels=1, image_size=16, batch_size=100, crop="pad_shift", pad=2,
    flip=0.5, eval_crop=1.0, mean=(0.5,), std=(0.5,),
)  # fmt: skip


def _tree(path: Path, **options: object) -> ClassificationData:
    base = ClassificationData(
        source="image_folder", path=str(path), image_size=(12, 16), batch_size=8
    )
    return dataclasses.replace(base, **options)  # type: ignore[arg-type]


def _take(iterator: BatchIterator, count: int) -> list[dict[str, np.ndarray]]:
    return [dict(next(iterator)) for _ in range(count)]


def _assert_same(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_have_the_promised_form(image_tree: Path, seed: int) -> None:
    batch = next(make_train_iterator(_tree(image_tree), seed=seed))
    assert batch.keys() == {"image", "label"}
    assert batch["image"].shape == (8, 12, 16, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32


@pytest.mark.drawn("data pipelines", one_in=6)
def test_worker_processes_change_nothing(image_tree: Path, seed: int) -> None:
    taken = {}
    for workers in (0, 1, 2):
        iterator = make_train_iterator(_tree(image_tree, workers=workers), seed=seed)
        taken[workers] = _take(iterator, 9)  # three epochs
        iterator.close()
    _assert_same(taken[1], taken[0])
    _assert_same(taken[2], taken[0])
    assert not np.array_equal(taken[0][0]["image"], taken[0][3]["image"])


@pytest.mark.drawn("data pipelines", one_in=6)
@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0)])
def test_a_restart_mid_epoch_continues(
    image_tree: Path, seed: int, before: int, after: int
) -> None:
    first = make_train_iterator(_tree(image_tree, workers=before), seed=seed)
    _take(first, 4)  # the second batch of the second epoch comes next
    state = json.loads(json.dumps(first.get_state()))
    expected = _take(first, 5)
    first.close()
    second = make_train_iterator(_tree(image_tree, workers=after), seed=seed)
    _take(second, 1)
    second.set_state(state)
    _assert_same(_take(second, 5), expected)
    second.close()


@pytest.mark.drawn("data pipelines", one_in=6)
def test_a_restart_in_a_new_process_continues(seed: int) -> None:
    iterator = make_train_iterator(DIGITS, seed=seed)
    _take(iterator, 15)
    state = iterator.get_state()
    expected = [float(b["image"].astype(np.float64).sum()) for b in _take(iterator, 3)]
    program = (
        "import json, sys\n"
        "from fastvim_jax.data import ClassificationData, make_train_iterator\n"
        "config, state = json.loads(sys.argv[1]), json.loads(sys.argv[2])\n"
        "config['mean'], config['std'] = tuple(config['mean']), tuple(config['std'])\n"
        "it = make_train_iterator(ClassificationData(**config), seed=state['seed'])\n"
        "it.set_state(state)\n"
        "print(json.dumps([float(next(it)['image'].astype('float64').sum()) for _ in range(3)]))\n"
    )
    arguments = [json.dumps(dataclasses.asdict(DIGITS)), json.dumps(state)]
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == expected


@pytest.mark.drawn("data pipelines", one_in=6)
def test_each_epoch_is_a_new_order_of_the_same_records(seed: int) -> None:
    # Nothing is dropped at this batch size: 1437 = 3 * 479.
    config = dataclasses.replace(DIGITS, batch_size=479, crop="resize", flip=0.0, image_size=8)
    iterator = make_train_iterator(config, seed=seed)
    assert iterator.steps_per_epoch == 3

    def epoch() -> list[bytes]:
        return [image.tobytes() for batch in _take(iterator, 3) for image in batch["image"]]

    one, two = epoch(), epoch()
    source = open_source("digits", "train")
    pixels = np.stack([source[i].image for i in range(len(source))])[..., None]
    expected = Counter(image.tobytes() for image in pixels)
    assert Counter(one) == expected
    assert Counter(one) == Counter(two) and one != two
    assert len(set(one)) > 1400  # not one record over and over
    other = make_train_iterator(config, seed=seed + 1)
    assert [i.tobytes() for i in next(other)["image"]] != one[:479]


def test_labels_stay_with_their_images(seed: int) -> None:
    config = dataclasses.replace(DIGITS, crop="resize", flip=0.0, image_size=8)
    source = open_source("digits", "train")
    label_of = {source[i].image.tobytes(): source[i].target for i in range(len(source))}  # type: ignore[union-attr]
    batch = next(make_train_iterator(config, seed=seed))
    assert [label_of[image.tobytes()] for image in batch["image"]] == batch["label"].tolist()


def test_the_remainder_is_dropped_each_epoch(image_tree: Path, seed: int) -> None:
    config = _tree(image_tree, batch_size=11, crop="resize", flip=0.0)
    iterator = make_train_iterator(config, seed=seed)
    assert iterator.steps_per_epoch == 2
    for _ in range(3):
        images = [image.tobytes() for batch in _take(iterator, 2) for image in batch["image"]]
        assert len(images) == 22 == len(set(images))


def test_processes_share_one_global_batch(seed: int) -> None:
    whole = _take(make_train_iterator(DIGITS, seed=seed), 3)
    shares = [
        _take(make_train_iterator(DIGITS, seed=seed, process_index=i, process_count=4), 3)
        for i in range(4)
    ]
    joined = [
        {key: np.concatenate([share[step][key] for share in shares]) for key in whole[0]}
        for step in range(3)
    ]
    _assert_same(joined, whole)
    with pytest.raises(UserError, match=r"not divisible by 3"):
        make_train_iterator(DIGITS, seed=seed, process_count=3)


def test_evaluation_counts_every_record_once() -> None:
    iterator = make_eval_iterator(DIGITS, batch_size=48)
    batches = list(iterator)
    assert len(batches) == iterator.steps_per_epoch == 8
    assert {batch["image"].shape for batch in batches} == {(48, 16, 16, 1)}
    assert sum(int(batch["valid"].sum()) for batch in batches) == 360
    labels = np.concatenate([batch["label"][batch["valid"]] for batch in batches])
    source = open_source("digits", "test")
    assert labels.tolist() == [source[i].target for i in range(360)]
    last = batches[-1]
    assert last["valid"].tolist() == [True] * 24 + [False] * 24
    assert not last["image"][24:].any()
    shares = [
        list(make_eval_iterator(DIGITS, batch_size=48, process_index=i, process_count=2))
        for i in range(2)
    ]
    assert [len(share) for share in shares] == [8, 8]
    valid = sum(int(batch["valid"].sum()) for share in shares for batch in share)
    assert valid == 360


def test_evaluation_in_workers_is_the_same(image_tree: Path) -> None:
    inline = make_eval_iterator(_tree(image_tree), batch_size=4)
    workers = make_eval_iterator(_tree(image_tree, workers=1), batch_size=4)
    _assert_same([dict(b) for b in workers], [dict(b) for b in inline])
    workers.close()


def test_state_of_another_run_is_refused(seed: int) -> None:
    state = make_train_iterator(DIGITS, seed=seed).get_state()
    smaller = dataclasses.replace(DIGITS, batch_size=50)
    with pytest.raises(UserError, match=r"batch_size = 100.*50"):
        make_train_iterator(smaller, seed=seed).set_state(state)
    with pytest.raises(UserError, match=r"seed"):
        make_train_iterator(DIGITS, seed=seed + 1).set_state(state)


def test_impossible_requests_fail_early() -> None:
    with pytest.raises(UserError, match=r"holds only 1437 images.*at most 1437"):
        make_train_iterator(dataclasses.replace(DIGITS, batch_size=2000), seed=0)
    with pytest.raises(UserError, match=r"seed is -1"):
        make_train_iterator(DIGITS, seed=-1)
    for size in (0, -4):
        with pytest.raises(UserError, match=rf"batch_size={size} must be at least 1"):
            make_eval_iterator(DIGITS, batch_size=size)


def _damage(tree: Path) -> Path:
    file = tree / "train" / "ant" / "03.png"
    file.write_bytes(file.read_bytes()[:60])
    return file


def test_a_corrupt_record_stops_the_run_by_name(image_tree: Path, seed: int) -> None:
    file = _damage(image_tree)
    iterator = make_train_iterator(_tree(image_tree, batch_size=30), seed=seed)
    with pytest.raises(DecodeError) as caught:
        next(iterator)
    iterator.close()
    assert str(file) in str(caught.value) and "max_corrupt allows 0" in str(caught.value)


def test_a_set_without_a_good_record_says_why(image_tree: Path, seed: int) -> None:
    for file in (image_tree / "train").rglob("*.png"):
        file.write_bytes(b"")
    iterator = make_train_iterator(_tree(image_tree, batch_size=30, max_corrupt=30), seed=seed)
    with pytest.raises(UserError, match=r"the last because: .*\.png: the file is empty"):
        next(iterator)
    iterator.close()


@pytest.mark.drawn("data pipelines", one_in=6)
def test_corrupt_records_are_replaced_and_counted_once(image_tree: Path, seed: int) -> None:
    _damage(image_tree)
    config = _tree(image_tree, batch_size=30, max_corrupt=1)
    iterator = make_train_iterator(config, seed=seed)
    batches = _take(iterator, 3)  # three epochs meet it three times
    assert iterator.corrupt == {3}
    assert all(batch["image"].shape[0] == 30 for batch in batches)
    with_workers = make_train_iterator(dataclasses.replace(config, workers=1), seed=seed)
    _assert_same(_take(with_workers, 3), batches)
    assert with_workers.corrupt == {3}
    with_workers.close()
    resumed = make_train_iterator(config, seed=seed)
    resumed.set_state(iterator.get_state())
    assert resumed.corrupt == {3}
    (image_tree / "train" / "bee" / "02.png").unlink()
    with pytest.raises(DecodeError, match=r"bee/02.png.*\n2 undecodable"):
        next(resumed)


def test_evaluation_leaves_corrupt_records_out(image_tree: Path) -> None:
    file = image_tree / "test" / "bee" / "01.png"
    file.write_bytes(b"no image")
    with pytest.raises(DecodeError, match=r"bee/01.png: not an image"):
        list(make_eval_iterator(_tree(image_tree), batch_size=4))
    iterator = make_eval_iterator(_tree(image_tree, max_corrupt=5), batch_size=4)
    batches = list(iterator)
    assert [batch["valid"].tolist() for batch in batches] == [
        [True, False, True, True],
        [True, True, False, False],
    ]
    assert iterator.corrupt == {1}


def test_a_folder_of_nothing_but_damage_says_so(image_tree: Path, seed: int) -> None:
    for file in (image_tree / "train").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"undecodable"):
        next(make_train_iterator(_tree(image_tree, max_corrupt=10_000), seed=seed))


def test_load_image_is_what_evaluation_sees(image_tree: Path) -> None:
    config = _tree(image_tree)
    batch = next(make_eval_iterator(config))
    image = load_image(image_tree / "test" / "bee" / "00.png", config)
    np.testing.assert_array_equal(image, batch["image"][0])
    with pytest.raises(DecodeError, match=r"nowhere.png: No such file"):
        load_image(image_tree / "nowhere.png", config)
    with pytest.raises(DecodeError, match=r"Is a directory"):
        load_image(image_tree, config)


def test_a_config_of_no_pipeline_is_refused(image_tree: Path) -> None:
    config = DataConfig(source="image_folder", path=str(image_tree))
    for call in (
        lambda: labelled.load_image(image_tree / "test" / "bee" / "00.png", config),
        lambda: labelled.make_train_iterator(config, seed=0),
        lambda: labelled.make_eval_iterator(config),
        lambda: labelled.make_augment(config, 3),
    ):
        with pytest.raises(UserError, match="must be a ClassificationData"):
            call()


def test_real_cifar(real_data: Path, seed: int) -> None:
    config = ClassificationData(
        source="packed_npz", path=str(real_data / "cifar10"), image_size=32, crop="pad_shift"
    )
    train = next(make_train_iterator(config, seed=seed))
    assert train["image"].shape == (128, 32, 32, 3)
    assert len(set(train["label"].tolist())) == 10

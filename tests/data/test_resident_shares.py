"""Resident sets in shares: the law of shuffling, the same batches on any number of devices, crops in the step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import (
    ClassificationData,
    DecodeError,
    make_eval_iterator,
    make_train_iterator,
    open_source,
    resident_shares,
)
from fastvim_jax.data.batches import decode_record
from fastvim_jax.data.device_transforms import make_augment
from fastvim_jax.errors import UserError
from tests.support import assert_says_same

DIGITS = ClassificationData(
    source="digits", channels=1, image_size=8, batch_size=96, crop="resize", flip=0.0,
    eval_crop=1.0, mean=(0.0,), std=(1.0,), resident=True, resident_shares=4,
)  # fmt: skip
SHARE, STEPS = 1437 // 4, 1437 // 4 // 24


def _take(iterator, count):
    return [jax.device_get(dict(next(iterator))) for _ in range(count)]


def _identified(batches):
    """Return the indices of the digits in each batch, by their pixels; all digits of the training split differ."""
    source = open_source("digits", "train")
    known = {source[i].image.tobytes(): i for i in range(len(source))}
    assert len(known) == len(source)
    return np.array([[known[image.tobytes()] for image in b["image"]] for b in batches])


def test_every_batch_takes_equally_many_of_each_share(seed: int) -> None:
    iterator = make_train_iterator(DIGITS, seed=seed)
    assert iterator.steps_per_epoch == STEPS
    epochs = [_take(iterator, STEPS) for _ in range(2)]
    source = open_source("digits", "train")
    numbers = np.stack([_identified(epoch) for epoch in epochs])  # epochs steps batch
    labels = np.array([[b["label"] for b in epoch] for epoch in epochs])
    np.testing.assert_array_equal(labels, np.vectorize(lambda i: source[int(i)].target)(numbers))
    shares = numbers.reshape(2, STEPS, 4, 24).swapaxes(1, 2).reshape(2, 4, -1)
    for epoch in shares:
        assert all(len(set(share)) == share.size for share in epoch)  # each record at most once
    both = [set(shares[0, i]) | set(shares[1, i]) for i in range(4)]
    assert all(len(share) <= SHARE for share in both)
    assert not any(both[i] & both[j] for i in range(4) for j in range(i))
    assert (shares[0] != shares[1]).mean() > 0.9
    assert (
        _identified(_take(make_train_iterator(DIGITS, seed=seed + 1), 1)) != numbers[0, 0]
    ).any()


def test_a_restart_continues(seed: int) -> None:
    first = make_train_iterator(DIGITS, seed=seed)
    _take(first, STEPS + 2)
    state = json.loads(json.dumps(first.get_state()))
    second = make_train_iterator(DIGITS, seed=seed)
    second.set_state(state)
    for a, b in zip(_take(first, 3), _take(second, 3), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    with pytest.raises(UserError, match="order"):
        other = dataclasses.replace(DIGITS, resident_shares=2)
        make_train_iterator(other, seed=seed).set_state(state)


@pytest.mark.drawn("data pipelines", one_in=6)
def test_crops_and_operations_of_resident_squares(
    image_tree: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep images of any proportions as squares; a crop of the whole image has the image's own proportions."""
    config = ClassificationData(
        source="image_folder", path=str(image_tree), image_size=(12, 16), batch_size=10,
        resident=True, resident_size=24, augment_on="device", rand_augment=9.0, max_corrupt=1,
    )  # fmt: skip
    broken = image_tree / "train" / "ant" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    iterator = make_train_iterator(config, seed=seed)
    batches = [next(iterator) for _ in range(3)]
    assert iterator.corrupt == {3}
    assert batches[0]["image"].shape == (10, 24, 24, 3)
    plain = dataclasses.replace(
        config, rand_augment=None, flip=0.0, mean=(0.0,) * 3, std=(1.0,) * 3
    )

    def whole_images(key: jax.Array, sizes: jax.Array, **law: object) -> jax.Array:
        return jnp.concatenate([jnp.zeros_like(sizes), sizes[:, ::-1]], axis=1) * 1.0

    with monkeypatch.context() as patch:
        patch.setattr("fastvim_jax.data.device_transforms.draw_boxes", whole_images)
        out = make_augment(plain, 3)(jax.random.key(seed), batches[0])
    assert set(out) == {"image", "label"} and out["image"].shape == (10, 12, 16, 3)
    whole = np.asarray(out["image"]) * 255
    squares = np.asarray(batches[0]["image"])
    for image, square in zip(whole, squares, strict=True):
        theirs = Image.fromarray(square).resize((16, 12), Image.Resampling.BICUBIC)
        assert (
            np.mean(np.abs(image - np.asarray(theirs)) > 1.01) < 0.2
        )  # noise is clipped between the passes
    with pytest.raises(DecodeError, match="max_corrupt allows 0"):
        next(make_train_iterator(dataclasses.replace(config, max_corrupt=0), seed=seed))


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="divisor of data.batch_size=96"):
        make_train_iterator(dataclasses.replace(DIGITS, resident_shares=5), seed=0)
    with pytest.raises(UserError, match="holds only 1437"):
        make_train_iterator(dataclasses.replace(DIGITS, batch_size=1440), seed=0)
    monkeypatch.setattr("fastvim_jax.data.resident._SHARE_OF_MEMORY", 1e-9)
    with pytest.raises(UserError, match=r"needs .* GiB for 1436 images"):
        make_train_iterator(DIGITS, seed=0)


def test_evaluation_streams(seed: int) -> None:
    plain = dataclasses.replace(DIGITS, resident=False, resident_shares=1)
    for a, b in zip(make_eval_iterator(DIGITS), make_eval_iterator(plain), strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


def test_undecodable_records_are_replaced_within_their_share(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Load shares together, as one device does, and each alone, as one device each: the images are the same."""
    source = open_source("digits", "train")
    shares = np.random.default_rng(seed).permutation(24).reshape(4, 6)
    broken = set(shares[1, :2].tolist()) | set(shares[3, 1:].tolist())

    def decode(source: object, index: int, *rest: object) -> tuple:
        if index in broken:
            raise DecodeError(f"record {index}")
        return decode_record(source, index, *rest)

    monkeypatch.setattr("fastvim_jax.data.resident_shares.decode_record", decode)
    together = resident_shares.load_images(source, DIGITS, shares)
    alone = [resident_shares.load_images(source, DIGITS, shares[i : i + 1]) for i in range(4)]
    for name, array, parts in zip(
        ("images", "labels", "sizes"), together[:3], zip(*alone, strict=True), strict=False
    ):
        np.testing.assert_array_equal(array, np.concatenate(parts), err_msg=name)
    assert set(shares.reshape(-1)[together[3]].tolist()) == broken
    labels = [source[int(i)].target for i in (*shares[1, 2:4], *shares[3, [0] * 6])]
    np.testing.assert_array_equal(together[1][[6, 7, *range(18, 24)]], labels)
    broken.update(shares[3].tolist())
    with pytest.raises(UserError, match="None of the 6 records of a share"):
        resident_shares.load_images(source, DIGITS, shares)


SHARDED = """
import dataclasses, sys
import jax, numpy as np
from fastvim_jax.data import ClassificationData, make_train_iterator
from fastvim_jax.data.device_transforms import make_augment
from fastvim_jax.distributed import MeshConfig, make_mesh, on_mesh, place_batch
config = ClassificationData(
    source="digits", image_size=(6, 7), batch_size=32, resident=True, resident_shares=8,
    resident_size=9,
)
seed = int(sys.argv[1])
found = []
for data, fsdp in ((1, 1), (4, 1), (2, 2)):
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp))
    iterator = make_train_iterator(config, seed=seed, mesh=mesh)
    batch = [next(iterator) for _ in range(3)][-1]
    placed = place_batch(mesh, batch)
    for name, value in placed.items():
        assert value.sharding.num_devices == mesh.size, name
        same = [a.data.unsafe_buffer_pointer() for a in value.addressable_shards]
        assert same == [a.data.unsafe_buffer_pointer() for a in batch[name].addressable_shards]
    step = on_mesh(mesh, jax.jit(make_augment(config, 10)))
    out = step(jax.random.key(seed), placed)
    found.append({name: np.asarray(value) for name, value in {**placed, **out}.items()})
for other in found[1:]:
    for name, value in found[0].items():
        np.testing.assert_allclose(other[name], value, atol=1e-6, err_msg=name)
print("same")
"""


@pytest.mark.drawn("augmentation in parts")
def test_the_devices_do_not_change_the_batches(seed: int) -> None:
    """Compare batches on one, four and two by two devices; what the iterator gathers is not copied again."""
    assert_says_same(SHARDED, seed, devices=4)


def test_dealing_and_shuffling_draw_from_streams_of_their_own(seed: int) -> None:
    """Draw from distinct streams for dealing and shuffling.

    No number is split into two words, so that no two keys are one stream.
    """
    keys = [(seed, resident_shares._DEAL)]
    keys += [
        (seed, resident_shares._SHUFFLE, epoch, share) for epoch in range(3) for share in range(3)
    ]
    drawn = {np.random.default_rng(key).integers(2**62) for key in keys}
    assert len(drawn) == len(keys)

"""RandAugment and jitter inside the step against the host's, operation by operation and as a whole."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import ClassificationData, make_train_iterator, per_device
from fastvim_jax.data import device_randaugment as device
from fastvim_jax.data.device_transforms import make_augment
from fastvim_jax.data.randaugment import FILL, GEOMETRIC, NAMES, NOTHING, OPERATIONS, SIGNED
from tests.support import assert_says_same

SIZE = (20, 26)
LEVELS = (0.0, 2.5, 5.0, 9.0, 10.0)
apply_operation = jax.jit(device.apply_operation)


def smooth_images(rng: np.random.Generator, count: int, channels: int = 3) -> np.ndarray:
    """Draw photograph-like images, each with its own range of values."""
    coarse = rng.integers(0, 256, (count, 5, 6, channels)).astype(np.uint8)
    low, high = rng.integers(0, 60, count), rng.integers(160, 256, count)
    out = np.empty((count, *SIZE, channels), np.uint8)
    for i in range(count):
        for c in range(channels):
            plane = Image.fromarray(coarse[i, ..., c]).resize(SIZE[::-1], Image.Resampling.BICUBIC)
            out[i, ..., c] = low[i] + np.asarray(plane).astype(float) / 255 * (high - low)[i]
    return out


def on_host(name: str, image: np.ndarray, level: float) -> np.ndarray:
    """Apply the host's operation, which `test_randaugment.py` holds to its definition."""
    plain = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return np.asarray(OPERATIONS[name](plain, level)).reshape(image.shape)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_is_the_hosts(rng: np.random.Generator, channels: int) -> None:
    cases = [
        (name, sign * level)
        for name in NAMES
        for level in LEVELS
        for sign in ((1, -1) if name in SIGNED else (1,))
    ]
    images = smooth_images(rng, len(cases), channels)
    numbers = jnp.asarray([NAMES.index(name) for name, _ in cases], jnp.int32)
    levels = jnp.asarray([level for _, level in cases], jnp.float32)
    ours = np.asarray(apply_operation(jnp.asarray(images), numbers, levels)).astype(int)
    assert ours.shape == images.shape
    changed = set()
    for (name, level), image, out in zip(cases, images, ours, strict=True):
        theirs = on_host(name, image, level).astype(int)
        off = np.abs(out - theirs)
        exact = name in device.LOOKED_UP and name != "auto_contrast"
        # A place within rounding of the border is filled by one and not by the other.
        filled = (
            (theirs == (FILL if channels == 3 else 118)).all(-1) if name in GEOMETRIC else False
        )
        allowed = np.where(np.expand_dims(filled, -1) & (off > 1), 255, 0 if exact else 1)
        assert (off <= allowed).all(), (name, level, off.max())
        assert np.mean(off > 1) < 0.01 and np.mean(off) < 0.1, (name, level)
        if not np.array_equal(out, image):
            changed.add(name)
    assert changed >= {n for n in NAMES if n != "colour" or channels == 3}


def test_noise_equalizes_and_flat_images_stay(rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (4, *SIZE, 3), dtype=np.uint8)
    images[1] = 77  # one value
    images[2, ..., 0] = np.where(images[2, ..., 0] > 200, 9, 3)  # two
    images[3, :18] = 255  # most pixels have the highest: there is nothing to spread
    for name in ("equalize", "auto_contrast"):
        number = jnp.full(4, NAMES.index(name), jnp.int32)
        ours = np.asarray(apply_operation(jnp.asarray(images), number, jnp.zeros(4)))
        theirs = np.stack([on_host(name, image, 0.0) for image in images])
        np.testing.assert_allclose(ours.astype(int), theirs, atol=int(name == "auto_contrast"))
    nothing = apply_operation(jnp.asarray(images), jnp.full(4, NOTHING, jnp.int32), jnp.zeros(4))
    np.testing.assert_array_equal(nothing, images)


@pytest.mark.drawn("augmentation in parts")
def test_chunks_change_nothing(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    images = jnp.asarray(smooth_images(rng, 12))
    numbers = jnp.asarray(rng.integers(0, 15, (12, 1)), jnp.int32)
    levels = jnp.asarray(rng.uniform(0, 10, (12, 1)), jnp.float32)
    drawn = {"operation": numbers, "level": levels}
    whole = device.augment_drawn(images, drawn)
    sizes = []

    def counted(images: jax.Array, *drawn: jax.Array) -> jax.Array:
        sizes.append(len(images))
        return original(images, *drawn)

    original = device.rand_augment
    monkeypatch.setattr(device, "rand_augment", counted)
    for most, expected in ((5, 4), (6, 6), (12, 12), (100, 12)):
        monkeypatch.setattr(per_device, "CHUNK", most)
        sizes.clear()
        np.testing.assert_array_equal(device.augment_drawn(images, drawn), whole)
        assert set(sizes) == {expected}
    monkeypatch.setattr(per_device, "CHUNK", 5)
    sizes.clear()
    device.augment_drawn(images[:11], {name: value[:11] for name, value in drawn.items()})
    assert sizes == [11]  # a prime number of images


DIGITS = ClassificationData(
    source="digits", image_size=SIZE, batch_size=64, crop="random_resized", flip=0.5
)


@pytest.mark.drawn("data pipelines", one_in=6)
@pytest.mark.parametrize(
    "options", [{"rand_augment": 9.0}, {"colour_jitter": 0.3}], ids=["rand_augment", "jitter"]
)
def test_either_place_gives_the_same_epoch(seed: int, options: dict) -> None:
    """Compare an epoch augmented on the device with one augmented on the host, under the same draws.

    Nearly all images agree to a level or two; thresholds magnify rounding in the others.
    """
    host = dataclasses.replace(DIGITS, **options)
    near = []
    iterators = [
        make_train_iterator(dataclasses.replace(host, augment_on=place), seed=seed)
        for place in ("host", "device")
    ]
    augment = jax.jit(make_augment(dataclasses.replace(host, mean=(0.0,) * 3, std=(1.0,) * 3), 10))
    for _ in range(2):
        finished, drawn = (next(iterator) for iterator in iterators)
        np.testing.assert_array_equal(finished["label"], drawn["label"])
        out = augment(jax.random.key(0), drawn)
        assert set(out) == {"image", "label"}
        off = np.abs(np.asarray(out["image"]) * 255 - finished["image"])
        near += [np.mean(image > 3) < 0.02 for image in off]
    for iterator in iterators:
        iterator.close()
    assert np.mean(near) > 0.95
    raw = [
        np.abs(a.astype(int) - b).max() > 3
        for a, b in zip(drawn["image"], finished["image"], strict=True)
    ]
    assert np.mean(raw) > 0.5  # without the device's part they are different images


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, sys
from fastvim_jax.data.device_randaugment import augment_drawn
from fastvim_jax.distributed import make_mesh, on_mesh, place_batch
rng = np.random.default_rng(int(sys.argv[1]))
images = rng.integers(0, 256, (16, 12, 12, 3), dtype=np.uint8)
drawn = {
    "flip": rng.random(16) < 0.5,
    "operation": rng.integers(-1, 15, (16, 1)).astype(np.int32),
    "level": rng.uniform(0, 10, (16, 1)).astype(np.float32),
}
alone = jax.jit(augment_drawn)(jnp.asarray(images), drawn)
mesh = make_mesh()
placed = place_batch(mesh, {"image": images, **drawn})
split = jax.jit(augment_drawn)
step = on_mesh(mesh, lambda image, drawn: split(image, drawn))
shared = step(placed.pop("image"), placed)
assert shared.sharding.num_devices == 4
np.testing.assert_array_equal(np.asarray(shared), np.asarray(alone))
with jax.set_mesh(mesh):
    text = split.lower(shared, placed).compile().as_text()
assert not [w for w in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if w in text]
print("same")
"""


@pytest.mark.drawn("processes and devices", one_in=6)
def test_every_device_augments_its_own_images(seed: int) -> None:
    assert_says_same(SHARDED, seed, devices=4)

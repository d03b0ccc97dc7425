"""The step's transforms against their definitions: laws of what is drawn, and NumPy for what is done with it."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fastvim_jax.data import ClassificationData
from fastvim_jax.data import device_transforms as dt
from tests.support import assert_says_same

CONFIG = ClassificationData(source="digits", image_size=(12, 16))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNLIKELY = 1e-5  # a run in a hundred thousand may fail by chance


def _pixels(rng, size=6, height=12, width=16):
    return rng.integers(0, 256, (size, height, width, 3), dtype=np.uint8)


def _normal(rng, size=6, height=12, width=16):
    return jnp.asarray(rng.normal(size=(size, height, width, 3)), jnp.float32)


def _many(draw, key, count):
    return jax.device_get(jax.jit(jax.vmap(draw))(jax.random.split(key, count)))


def _corners(mask):
    """Return top, left, height and width of a box; None where the mask is empty or no box."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    top, left, height, width = rows[0], columns[0], len(rows), len(columns)
    assert mask[top : top + height, left : left + width].all()
    assert mask.sum() == height * width
    return top, left, height, width


def test_preprocess_is_its_formula(rng):
    pixels = _pixels(rng)
    out = dt.make_preprocess(CONFIG)(jnp.asarray(pixels))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, (pixels / 255 - MEAN) / STD, atol=1e-6)
    grey = dataclasses.replace(CONFIG, channels=1, mean=(0.3,), std=(0.4,))
    out = dt.make_preprocess(grey)(jnp.asarray(pixels[..., :1]))
    np.testing.assert_allclose(out, (pixels[..., :1] / 255 - 0.3) / 0.4, atol=1e-6)


def test_pad_and_shift_moves_and_fills_with_zeros(rng, key):
    y, x = np.mgrid[:12, :16]
    image = np.stack([4 * x, 4 * y, np.full_like(x, 255)], -1).astype(np.uint8)
    out = np.asarray(dt.pad_and_shift(key, jnp.asarray(np.stack([image] * 500)), pad=2))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    offsets = []
    for shifted in out:
        row, column = np.argwhere(shifted[..., 2] == 255)[0]
        left, top = shifted[row, column, :2] // 4 - (column, row) + 2
        np.testing.assert_array_equal(shifted, padded[top : top + 12, left : left + 16])
        offsets.append(5 * top + left)
    counts = np.bincount(offsets, minlength=25)
    assert len(counts) == 25 and stats.chisquare(counts).pvalue > UNLIKELY


def test_flip_mirrors_with_its_probability(rng, key):
    images = _pixels(rng, 2000, 2, 3)
    out = np.asarray(dt.horizontal_flip(key, jnp.asarray(images), probability=0.3))
    flipped = (out == images[:, :, ::-1]).all((1, 2, 3))
    assert (flipped | (out == images).all((1, 2, 3))).all()
    assert stats.binomtest(int(flipped.sum()), 2000, 0.3).pvalue > UNLIKELY


def _erased_box(rng, height, width):
    """Compute the definition, one box at a time."""
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    return None


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 44)])
def test_erased_box_follows_its_definition(rng, key, height, width):
    masks = _many(lambda k: dt.erased_box(k, (height, width)), key, 3000)
    ours = np.array([_corners(mask) for mask in masks])
    theirs = np.array([_erased_box(rng, height, width) for _ in range(3000)])
    for statistic in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 2] / box[:, 3],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 2],
    ):
        assert stats.ks_2samp(statistic(ours), statistic(theirs)).pvalue > UNLIKELY
    assert (ours[:, 2] < height).all() and (ours[:, 3] < width).all()


def test_erased_box_has_the_laws_it_states(key):
    masks = _many(lambda k: dt.erased_box(k, (160, 160)), key, 1500)
    boxes = np.array([_corners(mask) for mask in masks], float)
    area, ratio = boxes[:, 2] * boxes[:, 3] / 160**2, boxes[:, 2] / boxes[:, 3]
    assert area.min() > 0.0185 and area.max() < 0.339  # sides are whole pixels
    small = area < 0.25  # of these no aspect is too long for the image
    uniform = stats.uniform(0.02, 0.25 - 0.02)
    assert stats.kstest(area[small], uniform.cdf).pvalue > UNLIKELY
    log_uniform = stats.uniform(math.log(0.3), -2 * math.log(0.3))
    assert stats.kstest(np.log(ratio[small]), log_uniform.cdf).pvalue > UNLIKELY
    free = 160 - boxes[:, 2]
    assert stats.kstest((boxes[:, 0] + 0.5) / (free + 1), stats.uniform.cdf).pvalue > UNLIKELY


def test_no_box_fits_a_line():
    # One row: a box would have to be lower than it.
    masks = _many(lambda k: dt.erased_box(k, (1, 40)), jax.random.key(0), 50)
    assert not masks.any()


@pytest.mark.drawn("data pipelines", one_in=6)
def test_erasing_fills_boxes_with_noise_and_leaves_the_rest(rng, key):
    images = _normal(rng, 800) + 10.0
    out = np.asarray(jax.jit(lambda k, x: dt.random_erasing(k, x, probability=0.25))(key, images))
    changed = (out != np.asarray(images)).all(-1)
    assert ((out == np.asarray(images)).all(-1) | changed).all()
    erased = changed.any((1, 2))
    assert stats.binomtest(int(erased.sum()), 800, 0.25).pvalue > UNLIKELY
    assert all(_corners(mask) for mask in changed[erased])
    noise = out[changed]
    assert len(np.unique(noise)) > 0.99 * noise.size
    assert stats.kstest(noise.ravel(), stats.norm.cdf).pvalue > UNLIKELY
    always = dt.random_erasing(key, images, probability=1.0)
    assert (np.asarray(always) != np.asarray(images)).any((1, 2, 3)).all()


@pytest.mark.drawn("data pipelines", one_in=6)
def test_an_images_fate_depends_on_its_position_alone(rng, key):
    images, pixels = _normal(rng), jnp.asarray(_pixels(rng))
    erase = jax.jit(lambda x: dt.random_erasing(key, x, probability=1.0))
    shift = jax.jit(lambda x: dt.pad_and_shift(key, x, pad=3))
    for transform, whole in ((erase, images), (shift, pixels)):
        np.testing.assert_array_equal(transform(whole)[:4], transform(whole[:4]))
    alike = jnp.concatenate([images[:1]] * 6)
    assert len({np.asarray(image).tobytes() for image in erase(alike)}) == 6


def _cutmix_box(rng, height, width, share):
    """Compute by the definition where the box begins and ends."""
    side = np.sqrt(1 - share)
    cut_h, cut_w = int(height * side), int(width * side)
    cy, cx = rng.integers(height), rng.integers(width)
    rows = np.clip([cy - cut_h // 2, cy + cut_h // 2], 0, height)
    columns = np.clip([cx - cut_w // 2, cx + cut_w // 2], 0, width)
    return (*rows, *columns)


def _weights(key, count=3000, size=(20, 28), **options):
    options = {"mixup": 0.8, "cutmix": 1.0} | options
    return _many(lambda k: dt.mix_weights(k, size, **options), key, count)


def test_mixup_draws_beta(key):
    weight, share = _weights(key, cutmix=0.0)
    assert (weight == share[:, None, None]).all()
    assert stats.kstest(share, stats.beta(0.8, 0.8).cdf).pvalue > UNLIKELY


@pytest.mark.parametrize("alpha", [0.4, 1.0, 6.0])
def test_shares_have_the_law_of_beta(key, alpha):
    draws = _many(lambda k: dt.symmetric_beta(k, jnp.float32(alpha)), key, 20_000)
    # Float32 near 1 is coarse: fold the law's two equal halves at 0.
    folded, law = np.minimum(draws, 1 - draws), stats.beta(alpha, alpha)
    assert stats.kstest(folded, lambda x: 2 * law.cdf(np.minimum(x, 0.5))).pvalue > UNLIKELY
    assert stats.binomtest(int((draws < 0.5).sum()), len(draws)).pvalue > UNLIKELY


def test_cutmix_cuts_a_box_and_counts_its_pixels(rng, key):
    weight, share = _weights(key, mixup=0.0, cutmix=0.7)
    assert np.isin(weight, (0, 1)).all()
    np.testing.assert_allclose(share, weight.mean((1, 2), dtype=np.float64), rtol=2e-7)
    reference = np.array([_cutmix_box(rng, 20, 28, rng.beta(0.7, 0.7)) for _ in range(3000)], float)
    height, width = reference[:, 1] - reference[:, 0], reference[:, 3] - reference[:, 2]
    kept = 1 - height * width / (20 * 28)
    assert stats.ks_2samp(share, kept).pvalue > UNLIKELY
    boxes = [_corners(w == 0) for w in weight]
    ours = np.array([box for box in boxes if box], float)
    there = (height > 0) & (width > 0)
    for column, theirs in enumerate((reference[:, 0], reference[:, 2], height, width)):
        assert stats.ks_2samp(ours[:, column], theirs[there]).pvalue > UNLIKELY


def test_cutmix_box_has_the_sides_of_its_share(key):
    for share in (0.0, 0.3, 0.75, 0.99, 1.0):
        masks = _many(lambda k, s=share: dt.cutmix_box(k, (21, 33), jnp.float32(s)), key, 200)
        half = [int(length * math.sqrt(1 - np.float32(share))) // 2 for length in (21, 33)]
        boxes = [_corners(mask) for mask in masks if mask.any()]
        if not min(half):
            assert not boxes
            continue
        assert max(b[2] for b in boxes) == min(2 * half[0], 21)
        assert max(b[3] for b in boxes) == min(2 * half[1], 33)


def test_switch_and_probability(key):
    weight, share = _weights(key, probability=0.7, switch_probability=0.2)
    whole = (weight == 1).all((1, 2))
    # Cutmix leaves images whole also where its box is too small to hold a pixel (rarely, at this size).
    assert abs(whole.mean() - 0.3) < 0.05
    cut = ((weight == 0) | (weight == 1)).all((1, 2)) & ~whole
    assert stats.binomtest(int(cut.sum()), int((~whole).sum()), 0.2).pvalue > UNLIKELY / 100
    assert (share[whole] == 1).all()


def test_mix_and_targets_are_their_formulas(rng, key):
    images, labels = np.asarray(_normal(rng, 7)), rng.integers(0, 5, 7).astype(np.int32)
    for options in ({"cutmix": 0.0}, {"mixup": 0.0}):
        weight, share = (x[0] for x in _weights(key, 1, size=(12, 16), **options))
        mixed = np.asarray(dt.mix(jnp.asarray(images), jnp.asarray(weight)))
        if options == {"cutmix": 0.0}:
            np.testing.assert_allclose(
                mixed, share * images + (1 - share) * images[::-1], atol=1e-6
            )
        else:
            expected = np.where(weight[..., None] == 0, images[::-1], images)
            np.testing.assert_array_equal(mixed, expected)
        targets = np.asarray(dt.mixed_targets(jnp.asarray(labels), jnp.asarray(share), 5, 0.1))
        on, off = 1 - 0.1 + 0.1 / 5, 0.1 / 5
        one, two = (np.where(np.eye(5)[y], on, off) for y in (labels, labels[::-1]))
        np.testing.assert_allclose(targets, share * one + (1 - share) * two, atol=1e-6)
        np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)


def test_expected_target_is_half_of_each(key):
    config = dataclasses.replace(CONFIG, mixup=0.8)
    batch = {"image": jnp.zeros((2, 12, 16, 3), jnp.uint8), "label": jnp.asarray([1, 3], jnp.int32)}
    augment = dt.make_augment(config, 5, label_smoothing=0.1)
    targets = _many(lambda k: augment(k, batch)["label"], key, 4000)
    expected = np.full((2, 5), 0.02) + 0.45 * (np.eye(5)[1] + np.eye(5)[3])
    np.testing.assert_allclose(targets.mean(0), expected, atol=5 * 0.9 * 0.31 / math.sqrt(4000))
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)


@pytest.mark.drawn("augmentation in parts")
@pytest.mark.parametrize(("count", "group"), [(12, 4), (11, 4), (5, 8), (9, 4)])
def test_groups_are_mixed_each_by_its_own_draw(count, group, rng, key):
    """Mix every image with its mirror image in its group. A group's draw does not depend on the other groups."""
    images = jnp.asarray(rng.standard_normal((count, 6, 6, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 5, count), jnp.int32)
    config = dataclasses.replace(CONFIG, mixup=1.0, mix_group=group)
    mixed, targets = (np.asarray(x) for x in dt.mix_groups(key, images, labels, config, 5, 0.0))
    shares = []
    for start in range(0, count, group):
        part = slice(start, min(start + group, count))
        one, two = images[part], images[part][::-1]
        draw = jax.random.fold_in(key, start // group)
        weight, share = dt.mix_weights(draw, (6, 6), mixup=1.0, cutmix=0.0)
        shares.append(float(share))
        expected = np.asarray(one * weight[..., None] + two * (1 - weight[..., None]))
        np.testing.assert_allclose(mixed[part], expected, atol=1e-6)
        soft = np.eye(5)[labels[part]] * shares[-1] + np.eye(5)[labels[part]][::-1] * (
            1 - shares[-1]
        )
        np.testing.assert_allclose(targets[part], soft, atol=1e-6)
    assert len(set(shares)) == len(shares)
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)


@pytest.mark.drawn("data pipelines", one_in=6)
def test_augment_does_what_the_config_says(rng, key):
    pixels, label = jnp.asarray(_pixels(rng)), jnp.asarray(rng.integers(0, 10, 6), jnp.int32)
    batch = {"image": pixels, "label": label}

    def augmented(**options):
        config = dataclasses.replace(CONFIG, **options)
        return dt.make_augment(config, 10, label_smoothing=0.1)(key, batch)

    plain = augmented()
    np.testing.assert_array_equal(plain["image"], dt.make_preprocess(CONFIG)(pixels))
    np.testing.assert_array_equal(plain["label"], label)
    # The host has cropped and flipped already, unless the images are resident.
    np.testing.assert_array_equal(augmented(crop="pad_shift", flip=1.0)["image"], plain["image"])
    flipped = augmented(crop="resize", flip=1.0, resident=True)["image"]
    np.testing.assert_array_equal(flipped, plain["image"][:, :, ::-1])
    shifted = augmented(crop="pad_shift", flip=0.0, resident=True)["image"]
    assert (np.asarray(shifted) != np.asarray(plain["image"])).any((1, 2, 3)).sum() >= 3
    # Zeros come in before the normalisation.
    zero = dt.make_preprocess(CONFIG)(jnp.zeros((1, 12, 16, 3), jnp.uint8))[0, 0, 0]
    values = {tuple(v) for v in np.asarray(shifted).reshape(-1, 3)}
    inside = {tuple(v) for v in np.asarray(plain["image"]).reshape(-1, 3)}
    assert values - inside == {tuple(np.asarray(zero))}
    erased = augmented(random_erasing=1.0)["image"]
    assert (np.asarray(erased) != np.asarray(plain["image"])).any((1, 2, 3)).all()
    mixed = augmented(cutmix=1.0)
    assert mixed["label"].shape == (6, 10) and mixed["label"].dtype == np.float32
    again = augmented(cutmix=1.0)
    np.testing.assert_array_equal(mixed["image"], again["image"])


SHARDED = """
import dataclasses, re, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from fastvim_jax.data import ClassificationData, make_train_iterator
from fastvim_jax.data.device_transforms import make_augment
from fastvim_jax.distributed import make_mesh, place_batch
assert len(jax.devices()) == 4
config = ClassificationData(
    source="digits", image_size=(8, 12), crop="pad_shift", resident=True, random_erasing=0.5,
)
rng = np.random.default_rng(int(sys.argv[1]))
batch = {
    "image": rng.integers(0, 256, (8, 8, 12, 3), dtype=np.uint8),
    "label": rng.integers(0, 10, 8).astype(np.int32),
}
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
divided = jax.device_put(batch, NamedSharding(mesh, P("data")))
for mixing in ({"mixup": 0.8}, {"cutmix": 1.0}):
    augment = jax.jit(make_augment(dataclasses.replace(config, **mixing), 10, label_smoothing=0.1))
    for seed in range(3):
        key = jax.random.fold_in(jax.random.key(int(sys.argv[1])), seed)
        alone, shared = augment(key, batch), augment(key, divided)
        assert shared["image"].sharding.num_devices == 4
        for name in alone:
            np.testing.assert_allclose(np.asarray(shared[name]), np.asarray(alone[name]), atol=1e-6)
# Groups that lie on one device are mixed without sending images between devices.
config = dataclasses.replace(config, resident=False, mixup=0.8, cutmix=1.0)
for group, sends in ((2, False), (8, True)):
    augment = jax.jit(make_augment(dataclasses.replace(config, mix_group=group), 10))
    alone, shared = augment(key, batch), augment(key, divided)
    for name in alone:
        np.testing.assert_allclose(np.asarray(shared[name]), np.asarray(alone[name]), atol=1e-6)
    text = augment.lower(key, divided).compile().as_text()
    found = re.findall(r"(?:all-to-all|collective-permute|all-gather|all-reduce)(?:-start)?\\(", text)
    assert bool(found) == sends, group
config = dataclasses.replace(config, resident=True, mixup=0.0, cutmix=0.0)
# Resident images come from one device, and are spread like any others.
iterator = make_train_iterator(dataclasses.replace(config, batch_size=16), seed=int(sys.argv[1]))
batch = next(iterator)
spread = place_batch(make_mesh(), batch)
assert {d.id for d in spread["image"].devices()} == {0, 1, 2, 3}
np.testing.assert_array_equal(np.asarray(spread["image"]), np.asarray(batch["image"]))
print("same")
"""


@pytest.mark.drawn("augmentation in parts")
def test_sharding_the_batch_changes_nothing(seed):
    """Compare four devices, which hold a quarter each of a batch, with one device that holds it whole."""
    assert_says_same(SHARDED, seed, devices=4)

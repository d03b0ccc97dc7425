"""The compiled steps: order of the updates, drop-path masks, donated buffers, exact counts."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fastvim_jax import UserError
from fastvim_jax.layers.drop_path import draw_keep
from fastvim_jax.models import build_model
from fastvim_jax.training import steps
from fastvim_jax.training.classification.evaluation import (
    evaluate,
    evaluate_weights,
    make_eval_step,
)
from fastvim_jax.training.classification.losses import (
    classification_loss,
    label_smoothing_cross_entropy,
    smooth_labels,
)
from fastvim_jax.training.label_rank import label_rank
from fastvim_jax.training.steps import (
    draw_key,
    init_state,
    make_train_step,
)
from tests.training.tiny import tiny_batch, tiny_model


class Linear(nnx.Module):
    """A linear classifier that notes nothing and drops nothing: fast to compile."""

    def __init__(self, classes: int = 10):
        self.kernel = nnx.Param(jnp.linspace(-0.3, 0.3, 64 * classes).reshape(64, classes))

    def __call__(self, images, *, key=None):
        return images.reshape(len(images), -1) @ self.kernel[...]


class Keyed(Linear):
    """Adds to the logits a number drawn from the step's key."""

    def __call__(self, images, *, key=None):
        noise = 0.0 if key is None else jax.random.normal(key, (10,))
        return super().__call__(images) + noise


def split(module):
    return nnx.split(module)


def draw(params, key, batch):
    """Return a key for every image."""
    return jax.random.split(key, len(batch["label"]))


def loss_with(graphdef, smoothing=0.0):
    """Return the classifier's loss, of a model that takes one key."""

    def loss_of(params, batch, drawn):
        key = None if drawn is None else drawn[0]
        logits = nnx.merge(graphdef, params)(batch["image"], key=key)
        return classification_loss(logits, batch["label"], label_smoothing=smoothing)

    return loss_of


def kernel_of(params):
    return np.asarray(jax.tree.leaves(params)[0])


def test_one_step_of_plain_descent(rng):
    batch = tiny_batch(rng)
    graphdef, params = split(Linear())
    start = kernel_of(params)

    def loss(kernel):
        logits = jnp.asarray(batch["image"]).reshape(6, -1) @ kernel
        return label_smoothing_cross_entropy(logits, jnp.asarray(batch["label"]), 0.1)

    value, grad = jax.value_and_grad(loss)(jnp.asarray(start))
    optimizer = optax.sgd(0.5)
    step = make_train_step(loss_with(graphdef, 0.1), optimizer, ema_decay=0.9)
    first = jax.tree.map(jnp.copy, init_state(params, optimizer))
    state, metrics = step(init_state(params, optimizer), batch)
    np.testing.assert_allclose(kernel_of(state.params), start - 0.5 * grad, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(grad), rtol=1e-5)
    np.testing.assert_allclose(metrics["update_norm"], 0.5 * np.linalg.norm(grad), rtol=1e-5)
    assert bool(metrics["finite_input"]) and int(state.step) == 1
    alike, fewer = step(first, batch, norms=False)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), alike, state)
    assert metrics.keys() - fewer.keys() == {"param_norm", "update_norm", "norms"}
    np.testing.assert_allclose(fewer["grad_norm"], metrics["grad_norm"], rtol=1e-6)


def test_the_average_takes_in_the_weights_before_the_update(rng):
    graphdef, params = split(Linear())
    optimizer = optax.sgd(0.5)
    step = make_train_step(loss_with(graphdef), optimizer, ema_decay=0.8)
    state = init_state(params, optimizer)
    average = kernel_of(state.ema)
    for _ in range(3):
        before = kernel_of(state.params)
        state, _ = step(state, tiny_batch(rng))
        average = 0.8 * average + 0.2 * before
        np.testing.assert_allclose(kernel_of(state.ema), average, rtol=1e-5, atol=1e-7)
    assert np.abs(kernel_of(state.params) - before).max() > 1e-3


def test_runs_that_differ_in_the_seed_share_a_program_and_not_their_draws(rng, seed):
    batch = tiny_batch(rng)
    graphdef, params = split(Keyed())
    optimizer = optax.sgd(0.1)
    steps = [
        make_train_step(loss_with(graphdef), optimizer, draw=draw, seed=s) for s in (seed, seed + 1)
    ]
    state = init_state(params, optimizer, ema=False)
    texts = [s.func.lower(state, batch, **s.keywords).as_text() for s in steps]
    assert texts[0] == texts[1]
    losses = [float(s(jax.tree.map(jnp.copy, state), batch)[1]["loss"]) for s in steps]
    assert losses[0] != losses[1]


def test_only_the_first_step_copies_the_seed_to_the_device(rng):
    graphdef, params = split(Keyed())
    optimizer = optax.sgd(0.1)
    step = make_train_step(loss_with(graphdef), optimizer, draw=draw)
    batch = jax.device_put(tiny_batch(rng))
    state, _ = step(init_state(params, optimizer, ema=False), batch)
    with jax.transfer_guard_host_to_device("disallow"):
        step(state, batch)


def test_soft_targets_step_like_the_labels_they_come_from(rng):
    batch = tiny_batch(rng)
    graphdef, params = split(Linear())
    optimizer = optax.sgd(0.1)
    soft = {**batch, "label": smooth_labels(jnp.asarray(batch["label"]), 10, 0.1)}
    step = make_train_step(loss_with(graphdef, 0.1), optimizer)
    ends = [
        step(init_state(jax.tree.map(jnp.copy, params), optimizer, ema=False), b)[0]
        for b in (batch, soft)
    ]
    assert ends[0].ema is None
    np.testing.assert_allclose(*(kernel_of(e.params) for e in ends), rtol=1e-5, atol=1e-7)


def test_the_given_state_is_used_up(rng):
    graphdef, params = split(Linear())
    optimizer = optax.adam(0.1)
    state = init_state(params, optimizer)
    make_train_step(loss_with(graphdef), optimizer, ema_decay=0.9)(state, tiny_batch(rng))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_keys_differ_by_seed_and_step_and_not_by_history(rng, seed):
    keys = {
        jax.random.key_data(draw_key(s, jnp.asarray(step))).tobytes()
        for s in (seed, seed + 1)
        for step in range(5)
    }
    assert len(keys) == 10
    # The model is given the key of the state's step, whatever came before.
    graphdef, params = split(Keyed())
    optimizer = optax.sgd(0.0)
    step = make_train_step(loss_with(graphdef), optimizer, draw=draw, seed=seed)
    batch = tiny_batch(rng)
    state, losses = init_state(params, optimizer, ema=False), []
    for _ in range(3):
        saved = jax.tree.map(jnp.copy, state)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    assert float(step(saved, batch)[1]["loss"]) == losses[-1]


@pytest.mark.drawn("more of the models", one_in=6)
def test_drop_path_masks_differ_by_step_block_and_sample(rng, seed):
    depth, size = 3, 64
    model = build_model(tiny_model(depth=depth, drop_path=0.9), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    images = jnp.asarray(tiny_batch(rng, size)["image"])
    keys = [draw_key(seed, jnp.asarray(step)) for step in range(3)]
    rates = np.array([0.0, 0.45, 0.9])
    masks = [np.asarray(draw_keep(key, rates, (size,))) for key in keys]

    # The model draws exactly these masks from the step's key ...
    @jax.jit
    def logits(params, images, key, keep):
        return nnx.merge(graphdef, params)(images, key=key, drop_path_keep=keep)

    for key, mask in zip(keys, masks, strict=True):
        drawn = logits(params, images, key, None)
        np.testing.assert_array_equal(drawn, logits(params, images, None, jnp.asarray(mask)))
    # ... and of their blocks (the first, at rate 0, apart), steps and samples no two are alike.
    rows = [tuple(mask[block]) for mask in masks for block in (1, 2)]
    assert len(set(rows)) == 6
    assert all(mask[0].all() for mask in masks)
    assert all(0 < sum(row) < size for row in rows)
    assert len({tuple(mask[:, i]) for mask in masks for i in range(size)}) == 4


def test_rank_counts_the_classes_before_the_label():
    logits = jnp.asarray([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, jnp.nan, 9.0]])
    np.testing.assert_array_equal(label_rank(logits, jnp.asarray([2, 0, 2, 2])), [1, 0, 2, 3])


@pytest.mark.parametrize("batch_size", [1, 7, 32, 100])
def test_padding_is_never_counted(rng, batch_size):
    images = rng.normal(size=(45, 8, 8, 1)).astype(np.float32)
    labels = rng.integers(0, 10, 45).astype(np.int32)
    model = Linear()
    logits = images.reshape(45, -1) @ np.asarray(model.kernel[...])
    order = np.argsort(-logits, axis=-1)
    hits = order == labels[:, None]

    def batches():
        for start in range(0, 45, batch_size):
            part = slice(start, start + batch_size)
            fill = batch_size - len(labels[part])
            yield {
                "image": np.pad(images[part], ((0, fill), (0, 0), (0, 0), (0, 0))),
                "label": np.pad(labels[part], (0, fill)),
                "valid": np.arange(batch_size) < len(labels[part]),
            }

    scores = evaluate(model, batches())
    assert scores["count"] == 45
    assert scores["top1"] == hits[:, :1].sum() / 45
    assert scores["top5"] == hits[:, :5].sum() / 45
    likelihood = jax.nn.log_softmax(jnp.asarray(logits))[np.arange(45), labels]
    assert scores["loss"] == pytest.approx(-float(likelihood.mean()), rel=1e-5)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_of_no_class_is_never_scored(rng, label):
    batch = {**tiny_batch(rng), "valid": np.ones(6, bool)}
    batch["label"] = batch["label"].copy()
    batch["label"][2] = label
    with pytest.raises(UserError, match="1 of 6 images has a label that is none of the model's"):
        evaluate(Linear(), [batch])
    batch["valid"][2] = False
    assert evaluate(Linear(), [batch])["count"] == 5
    with pytest.raises(UserError, match="`valid` must be bool and .* got int32"):
        evaluate(Linear(), [{**batch, "valid": 5 * batch["valid"].astype(np.int32)}])


def test_counts_by_class_are_those_of_a_loop(rng):
    size, classes = 53, 7
    logits = np.round(rng.normal(size=(size, classes)), 1).astype(np.float32)  # some are equal
    logits[5, 3] = np.nan
    labels = rng.integers(0, classes - 1, size).astype(np.int32)  # the last class has no image
    valid = rng.random(size) < 0.8
    valid[5] = True

    class Table(nnx.Module):
        def __call__(self, images, *, key=None):
            return images

    confusion, count = np.zeros((classes, classes), int), np.zeros(classes, int)
    for row, label, counts in zip(logits, labels, valid, strict=True):
        count[label] += counts
        if counts and not np.isnan(row).any():
            confusion[label, np.flatnonzero(row == row.max())[0]] += 1

    batches = [
        {"image": logits[part], "label": labels[part], "valid": valid[part]}
        for part in (slice(0, 20), slice(20, size))
    ]
    scores = evaluate(Table(), batches, per_class=True)
    np.testing.assert_array_equal(scores["confusion"], confusion)
    np.testing.assert_array_equal(scores["class_count"], count)
    assert scores["count"] == count.sum() and count[-1] == 0
    assert scores["top1"] == confusion.trace() / scores["count"]
    assert "confusion" not in evaluate(Table(), batches)


def test_several_weights_in_one_pass(rng):
    graphdef, params = split(Linear())
    zero = jax.tree.map(jnp.zeros_like, params)
    batch = {**tiny_batch(rng), "valid": np.ones(6, bool)}
    scores = evaluate_weights(make_eval_step(graphdef), {"raw": params, "ema": zero}, iter([batch]))
    assert scores["ema"]["loss"] == pytest.approx(np.log(10), rel=1e-6)
    assert scores["ema"]["top1"] == (batch["label"] == 0).mean()
    assert scores["raw"]["loss"] != scores["ema"]["loss"]
    with pytest.raises(ValueError, match="no valid image to evaluate"):
        evaluate(Linear(), iter([{**batch, "valid": np.zeros(6, bool)}]))


@pytest.mark.parametrize(
    ("platform", "size", "left_out"), [("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)]
)
def test_only_a_step_on_several_gpus_leaves_gradients_where_they_lie(platform, size, left_out):
    devices = np.array([SimpleNamespace(platform=platform)] * size)
    place = SimpleNamespace(mesh=SimpleNamespace(size=size, devices=devices))
    options = steps._compiler_options(steps.TrainState(place, place, None, None))
    assert options == ({"xla_disable_hlo_passes": "all-reduce-contiguous"} if left_out else None)
    # The compiler knows the option: it raises for one that it does not know.
    jax.jit(lambda x: x + 1, compiler_options=options)(1.0)


def test_only_large_parameters_wait_for_what_reads_them():
    """Leave small parameters free, so that XLA can read and write many by one kernel."""
    tree = {"large": jnp.ones(steps._LARGE), "small": jnp.ones(3), "absent": None}
    run = lambda read, tree: steps._after((read, None), tree)  # noqa: E731
    (barrier,) = jax.make_jaxpr(run)(jnp.float32(0), tree).eqns
    assert barrier.primitive.name == "optimization_barrier"
    assert [v.aval.shape for v in barrier.invars] == [(steps._LARGE,), ()]
    got = run(jnp.float32(0), tree)
    assert got["absent"] is None
    assert all(np.array_equal(got[name], tree[name]) for name in ("large", "small"))

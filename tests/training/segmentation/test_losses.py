"""The cross entropy of pixels against its definition in float64, with gradients, and what is not written to memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.special import logsumexp

from fastvim_jax.data.segmentation import IGNORED
from fastvim_jax.layers.resize import linear_matrix, resize_bilinear, resized_argmax
from fastvim_jax.training.segmentation.losses import pixel_accuracy, pixel_loss
from tests.support import x64

SIZES = [((3, 4), (9, 17)), ((5, 8), (3, 5)), ((4, 6), (4, 6)), ((1, 1), (4, 7)), ((6, 5), (13, 5))]


def drawn(source, target, *, scale=3.0, classes=7):
    rng = np.random.default_rng([*source, *target])
    label = rng.integers(0, classes, (2, *target))
    label[rng.random(label.shape) < 0.2] = IGNORED
    return scale * rng.normal(size=(2, *source, classes)), label


def defined(logits, label, divisor):
    """Return the loss and its gradient, from numpy's own sums."""
    rows, columns = (
        linear_matrix(*pair) for pair in zip(logits.shape[1:3], label.shape[1:], strict=True)
    )
    large = np.einsum("mh,nw,bhwc->bmnc", rows, columns, logits)
    logs = large - logsumexp(large, axis=-1, keepdims=True)
    hot = (np.arange(logits.shape[-1]) == label[..., None]).astype(float)
    valid = (label != IGNORED).astype(float)
    count = max(valid.sum(), 1) if divisor == "valid" else label.size
    slope = (np.exp(logs) - hot) * valid[..., None] / count
    return -(logs * hot).sum() / count, np.einsum("mh,nw,bmnc->bhwc", rows, columns, slope)


@pytest.mark.parametrize("divisor", ["valid", "all"])
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_loss_and_gradient(source, target, divisor):
    logits, label = drawn(source, target)
    with x64():
        found = jax.value_and_grad(pixel_loss)(
            jnp.asarray(logits), jnp.asarray(label), divisor=divisor
        )
    for value, wanted in zip(found, defined(logits, label, divisor), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("classes", [1, 16, 17, 33])
def test_loops_over_any_number_of_classes(classes):
    """Fold one part, one and a smaller one, and several: at most 16 classes are folded together."""
    logits, label = drawn((2, 3), (3, 31), classes=classes)
    with x64():
        found = jax.value_and_grad(pixel_loss)(jnp.asarray(logits), jnp.asarray(label))
        largest = resized_argmax(jnp.asarray(logits), (3, 31))
    for value, wanted in zip(found, defined(logits, label, "valid"), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-12, atol=1e-14)
    rows, columns = linear_matrix(2, 3), linear_matrix(3, 31)
    large = np.einsum("mh,nw,bhwc->bmnc", rows, columns, logits)
    np.testing.assert_array_equal(largest, large.argmax(-1))


def test_logits_that_differ_by_thousands():
    logits, label = drawn((3, 4), (9, 17), scale=1e4)
    found = jax.value_and_grad(pixel_loss)(jnp.float32(logits), jnp.asarray(label))
    for value, wanted in zip(found, defined(logits, label, "valid"), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)


def test_all_ignored_is_zero():
    logits, label = drawn((3, 4), (6, 8))
    found = jax.value_and_grad(pixel_loss)(jnp.float32(logits), jnp.full_like(label, IGNORED))
    assert found[0] == 0
    assert (found[1] == 0).all()


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_largest_class_and_accuracy(source, target):
    logits, label = (jnp.asarray(x) for x in drawn(source, target))
    logits = logits.astype(jnp.float32).at[..., 5].set(logits[..., 2])  # the lower of two equals
    wanted = jnp.argmax(resize_bilinear(logits, target), axis=-1)
    assert (resized_argmax(logits, target) == wanted).all()
    assert not (wanted == 5).any()
    valid = label != IGNORED
    share = ((wanted == label) & valid).sum() / valid.sum()
    np.testing.assert_allclose(pixel_accuracy(logits, label), share, rtol=1e-6)


def test_resized_logits_and_their_gradients_are_never_written():
    """Count the temporaries of programs for this CPU; written once, the resized logits are 33 MB."""
    logits = jax.ShapeDtypeStruct((2, 8, 8, 256), jnp.float32)
    label = jax.ShapeDtypeStruct((2, 128, 128), jnp.int32)
    written = 2 * 128 * 128 * 256 * 4

    def temporaries(function, *given):
        compiled = jax.jit(function).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes / written

    assert temporaries(lambda x: resized_argmax(x, (128, 128)), logits) < 1 / 4
    assert temporaries(jax.value_and_grad(pixel_loss), logits, label) < 1 / 2


def test_numbers_of_classes_do_not_wrap_around():
    """Compare classes as int32: in the labels' int8 class 256 would be class 0, and class 0 would get its logit."""
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(1, 2, 3, 257)), rng.integers(0, 3, (1, 3, 5))
    found = pixel_loss(jnp.float32(logits), jnp.asarray(label, "int8"))
    np.testing.assert_allclose(found, defined(logits, label, "valid")[0], rtol=1e-5)


@pytest.mark.parametrize("types", [AxisType.Explicit, AxisType.Manual])
def test_loops_keep_the_types_of_a_mesh(types):
    """Start loops with arrays of the logits' sharding, or that vary over the axes of a shard_map."""
    logits, label = (jnp.asarray(x) for x in drawn((3, 4), (9, 17)))
    logits = logits.astype(jnp.float32)

    def scores(logits, label):
        return pixel_loss(logits, label) + pixel_accuracy(logits, label)

    wanted = jax.value_and_grad(scores)(logits, label)
    explicit = types == AxisType.Explicit
    mesh = jax.make_mesh((1,), ("b",), axis_types=(types if explicit else AxisType.Auto,))
    with jax.set_mesh(mesh):
        if explicit:
            given = jax.device_put((logits, label), NamedSharding(mesh, P("b")))
            found = jax.value_and_grad(scores)(*given)
        else:
            mean = lambda *given: jax.lax.pmean(scores(*given), "b")  # noqa: E731
            mapped = jax.shard_map(mean, in_specs=P("b"), out_specs=P())
            found = jax.value_and_grad(mapped)(logits, label)
    for value, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-7)

"""A batch in parts: the same mean, each image in its part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.models import build_model
from fastvim_jax.training.accumulation import (
    batch_first,
    batch_last,
    in_parts,
    mean_value_and_grad,
)
from tests.training.tiny import tiny_model


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_the_mean_over_parts_is_that_of_the_batch(rng, parts):
    params = {"kernel": jnp.asarray(rng.normal(size=(5, 3))), "bias": jnp.asarray(rng.normal())}
    x, y = rng.normal(size=(6, 5)), rng.normal(size=(6, 3))

    def loss_of(params, part):
        return jnp.mean((part["x"] @ params["kernel"] + params["bias"] - part["y"]) ** 2)

    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}

    def part_loss(params, carry, part):
        return loss_of(params, part), ({"images": jnp.float32(len(part["y"]))}, carry + 1)

    found, gradients = mean_value_and_grad(part_loss, params, 0, in_parts(batch, parts))
    loss, report, carry = found
    assert (report["images"], carry) == (6 / parts, parts)
    whole_loss, whole = jax.value_and_grad(loss_of)(params, batch)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-5)
    for name in params:
        np.testing.assert_allclose(gradients[name], whole[name], rtol=1e-4, atol=1e-6)


def test_part_i_holds_every_parts_th_image():
    images = jnp.arange(12).reshape(6, 2)
    np.testing.assert_array_equal(in_parts(images, 3)[1], images[1::3])
    masks = jnp.arange(4 * 2 * 6).reshape(4, 2, 6)
    part = in_parts(batch_first(masks), 3)[2]
    np.testing.assert_array_equal(batch_last(part), masks[..., 2::3])
    assert in_parts(None, 3) is None


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_masks_drawn_beforehand_are_those_of_the_model(rng, key, rate):
    """Compare what a step in parts hands to the model with what the model draws for a whole batch."""
    model = build_model(tiny_model(drop_path=rate), rngs=nnx.Rngs(0))
    images = jnp.asarray(rng.normal(size=(6, 8, 8, 1)), jnp.float32)
    masks = model.draw_drop_path(key, 6)
    assert (masks is None) == (rate == 0)
    given = model(images, drop_path_keep=masks)
    np.testing.assert_array_equal(given, model(images, key=key))

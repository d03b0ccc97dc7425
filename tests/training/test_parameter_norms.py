"""Norms are of the unstacked parameters, under their names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fastvim_jax.models import build_model
from fastvim_jax.models.parameters import named_parameters
from fastvim_jax.training.parameter_norms import parameter_names, parameter_norms, whole_norm
from tests.training.tiny import tiny_model


def test_every_unstacked_parameter_has_its_norm(rng):
    shapes = nnx.eval_shape(lambda: build_model(tiny_model(depth=3), rngs=nnx.Rngs(0)))
    params = nnx.split(shapes)[1]
    drawn = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    norms = jax.jit(parameter_norms)(drawn)
    expected = {
        name: np.linalg.norm(np.asarray(value, np.float64))
        for name, value in named_parameters(drawn).items()
    }
    names = parameter_names(drawn)
    assert len(names) == len(set(names)) and set(names) == set(expected)
    assert {"blocks.2.mixer.in_proj.kernel", "head.bias"} <= set(names)
    found = dict(zip(names, norms.tolist(), strict=True))
    for name, norm in expected.items():
        np.testing.assert_allclose(found[name], norm, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(whole_norm(norms), optax.tree.norm(drawn), rtol=1e-5)


def test_half_precision_is_summed_in_float32():
    norms = parameter_norms({"head": {"kernel": jnp.full((400, 400), 300.0, jnp.bfloat16)}})
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, [300 * 400], rtol=1e-2)

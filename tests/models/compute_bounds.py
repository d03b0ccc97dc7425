"""Models as the golden ones, of widths that the fused kernels take: errors of activations="compute" against float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.models.config import VisionMambaConfig
from fastvim_jax.models.parameters import named_parameters, parameter_infos, replace_parameters
from fastvim_jax.models.registry import build_model
from tests.models.test_against_oracle import random_parameters
from tests.oracle.vision_mamba import vision_mamba
from tests.parity.compare import BOUNDS
from tests.support import assert_close, relative_error, x64

KINDS: dict[str, dict[str, Any]] = {
    "fastvim": {"pooling": "mean", "class_token": "none"},
    "vim": {"pooling": "none", "class_token": "middle"},
    "fastvim_max": {"pooling": "max", "class_token": "none"},
}
Run = Callable[..., Any]


def hold_to_bounds(
    kind: str,
    rng: np.random.Generator,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **fields: Any,
) -> None:
    """Hold outputs and gradients of one drawn model to the stated bounds.

    Outputs are compared with the oracle, and gradients with those of the model in float64, which the oracle's
    difference quotients hold.

    Args:
        kind: one of `KINDS`.
        rng: draws weights, images and cotangents.
        within: opens the context in which the model in bfloat16 is compiled and run.
        fields: of the config; 64 channels, so 128 inner ones, unless given.
    """
    grid = fields.pop("grid", (3, 4))
    fields = {
        "embed_dim": 64, "depth": 4, "num_classes": 3, "channels": 3, "patch_size": 2,
        "image_size": (2 * grid[0], 2 * grid[1]), "blocks": "unroll", **KINDS[kind], **fields,
    }  # fmt: skip
    plain = {"dtype": "float64", "param_dtype": "float64", "scan_implementation": "auto"}
    exact = VisionMambaConfig(**fields | plain)
    narrow = VisionMambaConfig(**fields, dtype="bfloat16", activations="compute")
    images = rng.standard_normal((2, *exact.image_size, 3))
    with jax.default_device(jax.devices("cpu")[0]), x64():
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: build_model(exact, rngs=nnx.Rngs(0))))
        infos = parameter_infos(abstract)
        shapes = {name: info.shape for info in infos for name in info.unstacked_names()}
        flat = random_parameters(shapes, rng)
        cotangent = rng.standard_normal((2, 3))
        run = _value_and_gradients(graphdef)
        wanted = run(replace_parameters(abstract, flat), jnp.asarray(images), cotangent)
        wanted = jax.device_get((wanted[0], named_parameters(wanted[2])))
        assert_close(wanted[0], vision_mamba(flat, exact, images), 1e-9)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: build_model(narrow, rngs=nnx.Rngs(0))))
    params = replace_parameters(abstract, {k: v.astype(np.float32) for k, v in flat.items()})
    arguments = (params, jnp.asarray(images, jnp.float32), jnp.asarray(cotangent, jnp.float32))
    with within():
        run = _value_and_gradients(graphdef).trace(*arguments).lower().compile()
        *found, gradients = jax.device_get(run(*arguments))
    bounds = BOUNDS["bfloat16 compute, max" if kind == "fastvim_max" else "bfloat16 compute"]
    outputs = dict(zip(("output", "output without gradients"), found, strict=True))
    errors = {k: relative_error(out, wanted[0]) / bounds[0] for k, out in outputs.items()}
    for name, gradient in named_parameters(gradients).items():
        errors[name] = relative_error(gradient, wanted[1][name], name) / bounds[1]
    worst = sorted(errors.items(), key=lambda pair: -pair[1])[:5]
    assert worst[0][1] <= 1, f"shares of the bounds: {worst}"


def _value_and_gradients(graphdef: nnx.GraphDef) -> Run:
    def run(params: Any, images: jax.Array, cotangent: jax.Array) -> Any:
        forward = lambda params: nnx.merge(graphdef, params)(images)  # noqa: E731
        out, pull = jax.vjp(forward, params)
        # Without a gradient, kernels and results that are at hand may take the place of other parts.
        return out, forward(params), pull(cotangent.astype(out.dtype))[0]

    return jax.jit(run)

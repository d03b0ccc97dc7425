"""Forward passes of every family are timed, on weights and images that take turns."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.bench import model as bench
from fastvim_jax.models import MaskedAutoencoderConfig, build_model, list_models, model_config
from pallas_kernels import timing


class Taken(Exception):
    """The arguments are known; nothing needs to be compiled."""


def test_weights_take_turns_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that weights take turns with the images.

    Otherwise a small model's weights stay in the cache from call to call, and batch 1 seems too fast.
    """
    made: list[Any] = []

    def measured(function: Any, arguments: Any, **options: Any) -> None:
        made.extend(arguments(seed) for seed in range(3))
        raise Taken

    monkeypatch.setattr(timing, "Measured", measured)
    options = {"depth": 1, "embed_dim": 8, "patch_size": 8}
    ((_, case),) = bench.cases([("fastvim_tiny_patch16_224", 16, 1, "bf16")], **options)
    with pytest.raises(Taken):
        next(case)
    leaves = [jax.tree.leaves(arguments) for arguments in made]
    assert len({leaf.unsafe_buffer_pointer() for each in leaves for leaf in each}) == 3 * len(
        leaves[0]
    )
    for weights, images in made[1:]:
        jax.tree.map(np.testing.assert_array_equal, weights, made[0][0])
        assert (np.asarray(images) != np.asarray(made[0][1])).any()


FAMILIES = sorted({name.split("_patch")[0] for name in list_models("*_tiny_*")})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_forward_pass(family: str) -> None:
    config = model_config(f"{family}_patch16_224", image_size=32, depth=1)
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    images = jax.ShapeDtypeStruct((3, 32, 32, config.channels), jnp.bfloat16)
    result = jax.eval_shape(bench.forward_of(config, graphdef), params, images)
    masked = isinstance(config, MaskedAutoencoderConfig)  # pixels of 2 x 2 patches
    assert result.shape == ((3, 4, 16 * 16 * 3) if masked else (3, config.num_classes))


@pytest.mark.drawn("benchmarks")
def test_a_masked_autoencoder_is_measured_as_others_are() -> None:
    setting = ("mae_vit_tiny_patch16_224", 32, 2, "f32")
    ((row, case),) = bench.cases([setting], blocks="scan", depth=1)
    (measured,) = timing.run([(row, case)])
    assert measured["correct"] and measured["images_per_s"] > 0, measured

"""The authors' names: every parameter of every kind of model goes there and back, and misfits are all listed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax import UserError, from_torch_state_dict, to_torch_state_dict
from fastvim_jax.models import VisionMambaConfig, ViTConfig, build_model

SIZES = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 3, "num_classes": 2}
CONFIGS = [
    VisionMambaConfig(**SIZES),
    VisionMambaConfig(**SIZES, pooling="none", class_token="middle", norm="layer", layer_scale=0.1),
    VisionMambaConfig(**SIZES, pooling="attention", proj_bias=True, post_norm="none"),
    VisionMambaConfig(**SIZES, out_indices=(0, 2)),
    ViTConfig(**SIZES, num_heads=2, conv_width=4),
    ViTConfig(**SIZES, num_heads=2, head_pool="mean"),
]


@pytest.mark.drawn("weights in and out")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_weights_go_out_and_come_back(config, key):
    model = build_model(config, rngs=nnx.Rngs(key))
    weights = to_torch_state_dict(model)
    assert all(isinstance(w, np.ndarray) for w in weights.values())
    other = build_model(config, rngs=nnx.Rngs(jax.random.fold_in(key, 1)))
    from_torch_state_dict(other, weights)
    for a, b in zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(other)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    images = jax.random.normal(key, (2, 8, 8, 3))
    for a, b in zip(jax.tree.leaves(model(images)), jax.tree.leaves(other(images)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layouts_are_pytorch_s(key):
    weights = to_torch_state_dict(build_model(CONFIGS[0], rngs=nnx.Rngs(key)))
    assert weights["patch_embed.proj.weight"].shape == (8, 3, 4, 4)
    assert weights["layers.1.mixer.conv1d_b.weight"].shape == (16, 1, 4)
    assert weights["layers.2.mixer.in_proj.weight"].shape == (32, 8)
    assert weights["layers.0.mixer.x_proj.weight"].shape == (33, 16)


def test_misfits_are_listed_together_and_nothing_is_loaded(key):
    model = build_model(CONFIGS[0], rngs=nnx.Rngs(key))
    before = to_torch_state_dict(model)
    weights = {name: w + 1 for name, w in before.items()}
    del weights["norm_f.weight"]
    weights["layers.7.mixer.D"] = np.zeros(16)
    weights["head.weight"] = np.zeros((5, 8))
    with pytest.raises(UserError) as caught:
        from_torch_state_dict(model, weights)
    for part in (
        "missing: norm_f.weight (8,)",
        "unexpected: layers.7.mixer.D (16,)",
        "shape of head.weight: expected (2, 8), given (5, 8)",
    ):
        assert part in str(caught.value)
    for name, w in to_torch_state_dict(model).items():
        np.testing.assert_array_equal(w, before[name])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.full(16, 1j), "is complex"),
        (np.full(16, None), "holds no numbers"),
        (np.full(16, "1"), "holds no numbers"),
        (np.full(16, np.nan), "holds NaN or infinite numbers"),
        (np.full(16, 1e300), "holds NaN or infinite numbers"),
    ],
    ids=("complex", "None", "text", "NaN", "beyond float32"),
)
def test_numbers_that_no_training_gives_are_refused(key, value, said):
    model = build_model(CONFIGS[0], rngs=nnx.Rngs(key))
    before = to_torch_state_dict(model)
    name = next(name for name, w in before.items() if w.shape == value.shape)
    with pytest.raises(UserError, match=f"{name} {said}"):
        from_torch_state_dict(model, before | {name: value})
    np.testing.assert_array_equal(to_torch_state_dict(model)[name], before[name])


def test_other_modules_are_refused():
    with pytest.raises(UserError, match="no name table for Linear"):
        from_torch_state_dict(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {"weight": jnp.zeros((2, 2))})


def test_a_prefix_of_all_names_is_named_and_the_list_is_short():
    """Name a prefix of all names, as `torch.nn.parallel.DistributedDataParallel` saves weights."""
    model = build_model(CONFIGS[0], rngs=nnx.Rngs(0))
    given = {f"module.{name}": array for name, array in to_torch_state_dict(model).items()}
    with pytest.raises(UserError, match=r"All given names begin with 'module\.'") as caught:
        from_torch_state_dict(model, given)
    lines = str(caught.value).splitlines()
    assert len(lines) == 23 and f"... and {2 * len(given) - 20} more ..." in lines[11]
    from_torch_state_dict(model, {name.removeprefix("module."): a for name, a in given.items()})

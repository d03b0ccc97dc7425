"""Files under the authors' names, of every family: recognised, read, and written back with every bit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax import from_torch_state_dict, to_torch_state_dict
from fastvim_jax.interop import recognise
from fastvim_jax.interop.torch_names import resolve_aliases
from fastvim_jax.models import MaskedAutoencoderConfig, build_model, list_models, model_config
from tests.parity.arguments import masked_fields, model_fields
from tests.parity.golden import fixture_paths, kind_of, read

KINDS = {
    *("FastVim", "Vim", "ViT", "FastMaskVimMAE", "VimMAE", "ViTMAE"),
    *("FastChannelVim", "FastChannelVim2DCompress", "ChannelVim", "ChannelViT", "HCSChannelViT"),
}


def tiny(name):
    """Return the preset `name` at a size that takes no time: three blocks on a grid of two by two."""
    config = model_config(name)
    inner = getattr(config, "encoder", config)
    small = {"image_size": 8, "patch_size": 4, "depth": 3, "embed_dim": 64}
    if hasattr(inner, "num_heads"):
        small["num_heads"] = 1
    if isinstance(config, MaskedAutoencoderConfig):
        return model_config(name, **small, decoder_dim=32, decoder_depth=2, decoder_heads=1)
    return model_config(name, **small, num_classes=5)


def drawn(config, rng):
    """Return a model whose parameters are drawn by NumPy, so that nothing is compiled."""
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model


def same_weights(a, b):
    for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


FAMILIES = sorted({tuple(name.split("_")[:2]) for name in list_models("mae_*")})
FAMILIES = ["_".join(f) for f in FAMILIES] + sorted(
    {n.split("_")[0] for n in list_models()} - {"mae"}
)


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_preset_goes_to_the_authors_names_and_back(family, rng):
    """Export and import one model of each family in tiny form, because a family's presets differ in sizes alone."""
    configs = {tiny(name) for name in list_models() if name.startswith(f"{family}_")}
    for config in configs:
        model = drawn(config, rng)
        there = to_torch_state_dict(model)
        found = recognise(there)
        assert found == dataclasses.replace(config, **same_unseen(config, found))
        back = nnx.eval_shape(lambda config=found: build_model(config, rngs=nnx.Rngs(0)))
        from_torch_state_dict(back, there)
        same_weights(model, back)
        again = to_torch_state_dict(back)
        assert again.keys() == there.keys()
        assert all(np.array_equal(again[key], there[key]) for key in there)


def same_unseen(config, found):
    """Return what no weight depends on, as the recognised config has it."""
    if isinstance(config, MaskedAutoencoderConfig):
        encoder = dataclasses.replace(config.encoder, **same_unseen(config.encoder, found.encoder))
        return {"encoder": encoder, "decoder_heads": found.decoder_heads}
    return {"drop_path": found.drop_path, "norm_eps": found.norm_eps, "head_pool": found.head_pool}


def hints(kind, kwargs):
    """Return what a user has to say beside a golden file, where it is not what `recognise` assumes."""
    named = {"image_size", "num_heads", "decoder_heads", "stride"}
    if kind.endswith("MAE"):
        encoder, own = masked_fields(kind, kwargs)
        heads = named if "num_heads" in encoder else named - {"decoder_heads"}
        return {key: value for key, value in (encoder | own).items() if key in heads}
    fields = model_fields(kind, kwargs)
    return {key: value for key, value in fields.items() if key in named}


def golden_of_each_kind():
    found = {}
    for path in fixture_paths():
        found.setdefault(kind_of(path), path)
    return {kind: path for kind, path in found.items() if kind in KINDS}


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.skipif(not fixture_paths(), reason="no golden files: set FASTVIM_PARITY_DIR")
def test_the_authors_state_dicts_come_back_with_every_bit():
    """Write all names of a golden state dict of each class again, with the numbers it has."""
    paths = golden_of_each_kind()
    assert paths.keys() == KINDS
    for kind, path in paths.items():
        golden = read(path)
        config = recognise(golden.state, **hints(kind, golden.kwargs))
        model = nnx.eval_shape(lambda config=config: build_model(config, rngs=nnx.Rngs(0)))
        from_torch_state_dict(model, golden.state)
        written, state = to_torch_state_dict(model), resolve_aliases(golden.state)
        assert written.keys() == state.keys(), path.name
        for name, array in state.items():
            bound = 2e-7 if kind.endswith("MAE") and name.endswith("pos_embed") else 0.0
            np.testing.assert_allclose(written[name], array, rtol=0, atol=bound, err_msg=name)

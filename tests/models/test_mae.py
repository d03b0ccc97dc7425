"""Masked autoencoders: against the NumPy oracle under random and given masks, with gradients, modes and bad input."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax import UserError, create_model
from fastvim_jax.layers.masking import masking_of, random_masking
from fastvim_jax.models import MaskedAutoencoder, MaskedAutoencoderConfig, VisionMambaConfig
from fastvim_jax.models.mae import _check_mask, backbone_parameters
from fastvim_jax.models.parameters import named_parameters
from fastvim_jax.training.masked.loss import pixel_loss
from pallas_kernels import gpu
from pallas_kernels.mixer_core import add_norm
from tests.oracle.masked import masked_autoencoder
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)
from tests.support import assert_close, checked, x64

# A grid of 3 x 5 patches of 2 x 3 pixels and two channels.
SMALL: dict[str, Any] = {
    "image_size": (6, 15),
    "patch_size": (2, 3),
    "channels": 2,
    "embed_dim": 8,
    "depth": 2,
    "decoder_dim": 12,
    "decoder_depth": 1,
}
GRID = (3, 5)


def tiny(family: str, **options: Any) -> MaskedAutoencoder:
    """Return a small model of a family, with random values where fresh ones are all equal."""
    heads = {"num_heads": 2, "decoder_heads": 3} if family == "vit" else {"state_size": 4}
    name = f"mae_{family}_tiny_patch16_224"
    return create_model(name, rngs=nnx.Rngs(0), **{**SMALL, **heads, **options})


def draw_masks(rng: np.random.Generator, batch: int) -> np.ndarray:
    """Draw masks with unequal counts, one with an empty row."""
    removed = rng.random((batch, *GRID)) < 0.5
    removed[:, 1, 2] = False
    removed[0] = True
    removed[0, 0, [1, 4]] = removed[0, 2, 0] = False
    return removed


CASES = [
    ("fastvim", {}, False),
    ("fastvim", {"divisor": "count", "reversal": "consistent", "pool_scale": 0.5}, True),
    ("fastvim", {"pooling": "max", "pool_axes": "rows"}, True),
    ("vim", {}, True),
]


@pytest.mark.drawn("options of models")
@pytest.mark.parametrize(("family", "options", "padded"), CASES, ids=str)
def test_equals_the_oracle_under_given_masks(family, options, padded, rng):
    """Compare with the oracle under a mask for every image; with padding, images keep different numbers of patches."""
    removed = draw_masks(rng, 3)
    if not padded:  # as many everywhere
        removed = np.stack([rng.permuted(removed[0].ravel()).reshape(GRID) for _ in range(3)])
    with x64():
        model = tiny(family, dtype="float64", param_dtype="float64", **options)
        masking = masking_of(jnp.asarray(removed), places=GRID[0] * GRID[1] if padded else None)
        assert (masking.counts is not None) == padded
        graphdef, params = nnx.split(model)
        params = jax.tree.map(lambda p: p + 0.2 * rng.standard_normal(p.shape), params)
        images = jnp.asarray(rng.standard_normal((3, 6, 15, 2)))
        run = jax.jit(lambda p, x, m: nnx.merge(graphdef, p)(x, masking=m))
        got = run(params, images, masking)
        flat = {k: np.asarray(v) for k, v in named_parameters(params).items()}
    encoder, config = model.config.encoder, model.config
    fields = {f: getattr(encoder, f) for f in encoder.__dataclass_fields__}
    own = {f: getattr(config, f) for f in config.__dataclass_fields__ if f != "encoder"}
    keep = [[int(i) for i in np.flatnonzero(~mask)] for mask in removed.reshape(3, -1)]
    oracle = SimpleNamespace(**fields | own | {"vit": False})
    predicted, latents = masked_autoencoder(flat, oracle, np.asarray(images), keep)
    assert_close(got.predicted, predicted, 1e-6, "predicted")  # the table is float32
    for b, latent in enumerate(latents):
        assert_close(got.latent[b, : len(latent)], latent, 1e-6, f"latent {b}")
        np.testing.assert_array_equal(got.latent[b, len(latent) :], 0)


@pytest.mark.drawn("more of the models", one_in=6)
def test_every_parameter_gets_a_gradient_in_both_modes(key):
    depth = {"depth": 4}  # two periods, so that the stack is scanned
    images = jax.random.normal(key, (2, 6, 15, 2))
    noise = jax.random.uniform(key, (2, 15))
    results = []
    for mode in ({"blocks": "scan"}, {"blocks": "unroll", "remat": "block"}):
        model = tiny("fastvim", **depth, **mode)
        graphdef, params = nnx.split(model)

        def loss(params, graphdef=graphdef):
            out = nnx.merge(graphdef, params)(images, noise=noise)
            return pixel_loss(images, out.predicted, out.masking.removed, (2, 3))

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    flat = jax.tree_util.tree_leaves_with_path
    assert 0 < results[0][0] < 10
    for (path, scanned), (_, unrolled) in zip(*map(flat, results), strict=True):
        assert np.any(scanned != 0), f"{jax.tree_util.keystr(path)} gets no gradient"
        assert_close(scanned, unrolled, 1e-4, jax.tree_util.keystr(path))


@pytest.mark.drawn("more of the models", one_in=6)
def test_another_size_and_ratio_at_call_time(key):
    model = tiny("fastvim", mask_ratio=0.5, blocks="unroll")
    images = jax.random.normal(key, (2, 4, 9, 2))
    graphdef, params = nnx.split(model)
    run = jax.jit(lambda p, x, n: nnx.merge(graphdef, p)(x, noise=n))
    out = run(params, images, jax.random.uniform(key, (2, 6)))
    assert out.predicted.shape == (2, 6, 12) and out.latent.shape == (2, 3, 8)


@pytest.mark.drawn("more of the models", one_in=6)
def test_what_the_backbone_of_a_classifier_gets(key):
    """Take the encoder's parameters by the classifier's names, and the fixed table with a row for the class token."""
    for family, token in (("fastvim", {}), ("vim", {"class_token": "middle"}), ("vit", {})):
        named = backbone_parameters(tiny(family))
        options = {k: v for k, v in SMALL.items() if not k.startswith("decoder")}
        heads = {"num_heads": 2} if family == "vit" else {"state_size": 4, **token}
        classifier = create_model(
            f"{family}_tiny_patch16_224", num_classes=3, rngs=nnx.Rngs(0), **options, **heads
        )
        wanted = named_parameters(nnx.state(classifier))
        shapes = {k: v.shape for k, v in wanted.items() if not k.startswith("head.")}
        assert {k: v.shape for k, v in named.items()} == shapes
        if family != "fastvim":
            index = 7 if family == "vim" else 0
            assert not np.any(named["pos_embed"][0, index]) and np.any(named["pos_embed"][0, 1])


@pytest.mark.drawn("models on kernels", one_in=20)
@needs_mosaic
def test_kernels_that_a_block_launches_on_hopper():
    """Count one ragged front, scan and back a block, transposed blocks included.

    The decoder's are the unpooled ones.
    """
    options = {"depth": 2, "blocks": "unroll", "dtype": "bfloat16", "activations": "compute"}
    model = create_model("mae_fastvim_tiny_patch16_224", rngs=nnx.Rngs(0), **options)
    graphdef, params = nnx.split(model)
    run = lambda p, x, n: nnx.merge(graphdef, p)(x, noise=n).predicted  # noqa: E731
    images = jax.ShapeDtypeStruct((4, 224, 224, 3), jnp.float32)
    text = lower_for_h100(run, params, images, jax.ShapeDtypeStruct((4, 196), jnp.float32))
    assert launches(text, "mixer_ragged_front") == launches(text, "mixer_back") == 2


@pytest.mark.drawn("models on kernels", one_in=20)
@needs_mosaic
def test_what_a_block_of_the_encoder_launches_on_hopper():
    """Count, besides the mixer's kernels, one for residual sum and norm. No tokens are moved within a block."""

    def program(depth):
        options = {"depth": depth, "dtype": "bfloat16", "activations": "compute"}
        model = create_model(
            "mae_fastvim_small_patch16_224", rngs=nnx.Rngs(0), blocks="unroll", **options
        )
        graphdef, params = nnx.split(model)
        run = lambda p, x, n: nnx.merge(graphdef, p)(x, noise=n).latent  # noqa: E731
        images = jax.ShapeDtypeStruct((4, 224, 224, 3), jnp.float32)
        return lower_for_h100(run, params, images, jax.ShapeDtypeStruct((4, 196), jnp.float32))

    two, four = program(2), program(4)
    for kernel in ("ragged_front", "back", "sum_norm"):
        assert launches(four, f"mixer_{kernel}") == 4
    moved = lambda text: len(re.findall(r"stablehlo.gather.*-> tensor<4x49x\d+x", text))  # noqa: E731
    assert moved(two) == moved(four)


@pytest.mark.drawn("models on kernels", one_in=20)
def test_the_fused_core_is_the_same_function(key, monkeypatch):
    """Compare the fused core, whose stages are XLA's on this CPU, with the plain one, gradients included."""
    noise, images = jax.random.uniform(key, (2, 16)), jax.random.normal(key, (2, 8, 8, 3))
    model = tiny("fastvim", image_size=8, patch_size=2, channels=3, mask_ratio=0.5, embed_dim=64)
    graphdef, params = nnx.split(model)

    def loss(params):
        out = nnx.merge(graphdef, params)(images, noise=noise)
        return jnp.sum(jnp.square(out.predicted))

    wanted = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    got = jax.jit(jax.value_and_grad(lambda p: loss(p)))(params)
    for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        assert_close(a, b, 2e-5)


@pytest.mark.drawn("models on kernels", one_in=20)
@needs_mosaic
@pytest.mark.parametrize("family", ["fastvim", "vim"])
def test_joined_blocks_are_the_same_function(key, monkeypatch, family):
    """Compare blocks that end with the next block's norm with plain ones, gradients included.

    The program is traced for an H100 and run on this CPU, where XLA takes the kernels' place. Without a gradient, the
    tokens of a transposed block are visited where they lie; for a gradient they are moved.
    """
    options = {"image_size": 8, "patch_size": 2, "channels": 3, "mask_ratio": 0.5, "embed_dim": 128}
    options |= {"dtype": "bfloat16", "activations": "compute", "blocks": "unroll"}
    graphdef, params = nnx.split(tiny(family, **options))
    noise, images = jax.random.uniform(key, (4, 16)), jax.random.normal(key, (4, 8, 8, 3))

    def run(params):
        encode = lambda p: nnx.merge(graphdef, p)(images, noise=noise).latent  # noqa: E731
        latent, pull = jax.vjp(encode, params)
        return encode(params), latent, pull(jnp.cos(latent))[0]

    ends = []
    watched = lambda *args, **options: ends.append(args) or add_norm(*args, **options)  # noqa: E731
    monkeypatch.setattr("fastvim_jax.layers.fused_core.add_norm", watched)
    with abstract_h100():
        traced = jax.jit(run).trace(params)
    assert len(ends) == 2 * 2  # blocks, with and without a gradient
    got = traced.lower().compile()(params)
    wanted = jax.jit(lambda p: run(p))(params)
    assert max(relative_errors(got, wanted)) < 3e-2


@pytest.mark.drawn("fused masked models")
@needs_mosaic
def test_what_the_encoder_rounds_where_nothing_is_differentiated(key):
    """Hold an encoder in half precision, whose scans' step sizes and outputs are rounded, to 2e-2 of float32.

    They are not rounded for a gradient. The program is traced for an H100 and run on this CPU by XLA.
    """
    options = {"image_size": 8, "patch_size": 2, "channels": 3, "mask_ratio": 0.5, "embed_dim": 128}
    half = {"dtype": "bfloat16", "activations": "compute", "blocks": "unroll"}
    exact, params = nnx.split(tiny("fastvim", **options, blocks="unroll"))
    graphdef, _ = nnx.split(tiny("fastvim", **options, **half))
    noise, images = jax.random.uniform(key, (4, 16)), jax.random.normal(key, (4, 8, 8, 3))

    def encode(params, graphdef=graphdef):
        return nnx.merge(graphdef, params)(images, noise=noise).latent

    def scans(function):
        """Return operands and results of the scans' kernels."""
        lines = lower_for_h100(function, params).splitlines()
        return [line.split(" : (")[-1] for line in lines if "selective_scan_mosaic" in line]

    assert scans(encode)
    for scan in scans(encode):
        operands, results = scan.split("->")
        assert operands.count("bf16") == 1 and results.count("bf16") == 2
    differentiated = scans(lambda params: jax.vjp(encode, params)[0])
    assert differentiated and not any("bf16" in scan for scan in differentiated)
    with abstract_h100():
        got = jax.jit(encode).trace(params).lower().compile()(params)
    assert max(relative_errors(got, encode(params, exact))) < 2e-2


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, 0.999])
def test_ratios_that_keep_or_remove_nothing(ratio):
    with pytest.raises(UserError, match="mask_ratio"):
        tiny("fastvim", mask_ratio=ratio)


def test_bad_masks_are_refused(key):
    model = tiny("fastvim", blocks="unroll")
    images = jnp.zeros((2, 6, 15, 2))
    with pytest.raises(UserError, match=r"2 images of 16 patches, but .* 3 x 5 = 15"):
        model(images, noise=jnp.zeros((2, 16)))
    with pytest.raises(UserError, match=r"noise has shape \(15,\): give one number per patch"):
        _check_mask((15,), 2, GRID)
    removed = np.zeros((2, *GRID), bool)
    removed[:, 0] = True
    with pytest.raises(UserError, match="not both"):
        model(images, noise=jnp.zeros((2, 15)), masking=masking_of(jnp.asarray(removed)))
    removed = np.zeros((2, *GRID), bool)
    removed[0, 0] = removed[1, :, 0] = True
    with pytest.raises(UserError, match="between 10 and 12 patches: give places=12"):
        masking_of(jnp.asarray(removed))
    with pytest.raises(UserError, match="places=11, but image 1"):
        masking_of(jnp.asarray(removed), places=11)
    with pytest.raises(UserError, match="inside jax.jit"):
        jax.jit(masking_of)(jnp.asarray(removed))
    for wrong in (removed[0], removed.astype(int), removed.astype(np.float32)):
        with pytest.raises(UserError, match=rf"booleans .* got {wrong.dtype} of shape"):
            masking_of(wrong)
    with pytest.raises(UserError, match="the batch is empty"):
        masking_of(removed[:0])
    with pytest.raises(UserError, match="image 1 of the batch removes all"):
        masking_of(jnp.asarray(np.stack([removed[0], np.ones(GRID, bool)])))
    with pytest.raises(UserError, match="a ViT attends to padding"):
        tiny("vit")(images, masking=masking_of(jnp.asarray(removed), places=12))
    turned = masking_of(jnp.asarray(removed.swapaxes(1, 2)), places=12)  # as many patches
    with pytest.raises(UserError, match="for 5 x 3 patches, but the images have 3 x 5"):
        model(images, masking=turned)
    with pytest.raises(UserError, match="noise= or masking="):
        model(images)
    with pytest.raises(UserError, match=r"7x15 pixels are not a whole number of 2x3 patches"):
        model(jnp.zeros((2, 7, 15, 2)), noise=jnp.zeros((2, 15)))
    with pytest.raises(UserError, match="3 channels .* built for 2"):
        model(jnp.zeros((2, 6, 15, 3)), noise=jnp.zeros((2, 15)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divisor": "rows"}, "divisor='rows'"),
        ({"decoder_dim": 0}, "decoder_dim=0 must be at least 1"),
        ({"decoder_dim": 10}, "decoder_dim=10 must be a multiple of 4"),
        ({"encoder": None, "embed_dim": 8}, "encoder=None must be a VisionMambaConfig"),
        ({"encoder": VisionMambaConfig()}, "encoder.num_classes=1000"),
        ({"encoder": VisionMambaConfig(num_classes=0, drop_path=0.1)}, "encoder.drop_path=0.1"),
        ({"encoder": VisionMambaConfig(num_classes=0, pooling="attention")}, "no masked form"),
        ({"encoder": VisionMambaConfig(num_classes=0, image_size=225)}, "whole number of patches"),
    ],
)
def test_bad_configs_are_refused_by_name(options, message):
    config = MaskedAutoencoderConfig(encoder=VisionMambaConfig(num_classes=0))
    with pytest.raises(UserError, match=message):
        checked(config, **options)


def test_options_reach_the_encoder_or_are_suggested():
    model = tiny("fastvim", reversal="consistent")
    assert model.config.reversal == "consistent" and model.config.encoder.embed_dim == 8
    with pytest.raises(UserError, match="Did you mean 'mask_ratio'"):
        tiny("fastvim", mask_ration=0.5)
    with pytest.raises(UserError, match="no option 'num_classes'"):
        create_model("mae_fastvim_tiny_patch16_224", num_classes=10, rngs=nnx.Rngs(0))


def test_a_traced_mask_that_keeps_too_many_removes_the_others():
    """A place of the grid that the encoder does not see must be predicted, not copied from another one."""
    removed = np.zeros((2, *GRID), bool)
    removed[0, 0] = removed[1, 1:] = True  # keep 10 and 5
    masking = jax.jit(lambda mask: masking_of(mask, places=7))(removed)
    np.testing.assert_array_equal(masking.counts, [7, 5])
    np.testing.assert_array_equal(masking.removed.sum(axis=1), [8, 10])
    np.testing.assert_array_equal(masking.ids_keep[0], np.arange(5, 12))
    assert not masking.removed[0, 5:12].any()


def test_masks_of_a_batch_are_the_noise_of_each_image(rng):
    """Compare each image's mask with its noise: kept count, sorted positions, and a permutation back."""
    noise = rng.random((4, 15)).astype(np.float32)
    masking = random_masking(jnp.asarray(noise), 4)
    for b in range(4):
        wanted = np.sort(np.argsort(noise[b])[:4])
        np.testing.assert_array_equal(masking.ids_keep[b], wanted)
        np.testing.assert_array_equal(masking.ids_restore[b, wanted], np.arange(4))
        assert masking.removed[b].sum() == 11 and not masking.removed[b, wanted].any()


def test_an_empty_batch_has_an_empty_reconstruction():
    out = tiny("fastvim")(jnp.zeros((0, 6, 15, 2)), noise=jnp.zeros((0, 15)))
    assert out.predicted.shape == (0, 15, 12) and out.latent.shape[0] == 0

"""Costs against the paper, the authors' parameter counts, and products counted by the compiler."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fastvim_jax.analysis import (
    activations,
    count_parameters,
    gmacs,
    model_cost,
    parallel_steps,
    scan_steps,
)
from fastvim_jax.errors import UserError
from fastvim_jax.layers import conv as conv_module
from fastvim_jax.layers import direction as direction_module
from fastvim_jax.models import VisionMambaConfig, ViTConfig, build_model, model_config

PAPER = {
    "fastvim_tiny_patch16_224": 1.17,
    "fastvim_small_patch16_224": 4.43,
    "fastvim_base_patch16_224": 17.23,
    "vim_tiny_patch16_224": 1.8,
    "vim_small_patch16_224": 5.9,
    "vim_base_patch16_224": 20.9,
    # Not in the paper: the numbers generally given for DeiT.
    "vit_tiny_patch16_224": 1.26,
    "vit_small_patch16_224": 4.6,
    "vit_base_patch16_224": 17.6,
}


@pytest.mark.parametrize(("name", "expected"), PAPER.items())
def test_gmacs_are_the_papers(name: str, expected: float) -> None:
    assert gmacs(model_config(name)) == pytest.approx(expected, rel=0.05)


PARAMETERS = {
    "fastvim_tiny_patch16_224": 7_166_056,
    "fastvim_huge_patch14_224": 702_370_280,
    "vim_tiny_patch16_224": 7_166_440,
    "vit_tiny_patch16_224": 5_717_416,
}


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_parameters_are_counted_without_allocating(name: str, expected: int) -> None:
    assert count_parameters(model_config(name)) == expected


def _contractions(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Count the multiply-adds of all matrix products in a program, loops unrolled by their length."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0]
            left, right = (v.aval.shape for v in eqn.invars)
            size = 1
            for extent in left:
                size *= extent
            used = set(contracted[1]) | set(eqn.params["dimension_numbers"][1][1])
            for axis, extent in enumerate(right):
                size *= 1 if axis in used else extent
            total += size
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "jaxpr"):
                    inner = inner.jaxpr
                if hasattr(inner, "eqns"):
                    total += _contractions(inner) * eqn.params.get("length", 1)
    return total


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "mean"},
        {"pooling": "none", "class_token": "middle"},
        {"pooling": "max", "pool_axes": "rows", "class_token": "head"},
        {"pooling": "attention", "pool_axes": "columns", "token_order": "column"},
        {"head_pool": "all", "expand": 3, "dt_rank": 5, "state_size": 4},
    ],
    ids=str,
)
def test_products_of_a_mamba_are_those_of_its_program(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether a scan or convolution backend uses matrix products inside is its own affair.
    monkeypatch.setattr(direction_module, "selective_scan", lambda u, *args, **options: u)
    monkeypatch.setattr(conv_module, "causal_conv1d", lambda x, *args, **options: x)
    config = VisionMambaConfig(
        image_size=(24, 40), patch_size=8, num_classes=7, embed_dim=16, depth=3, blocks="unroll",
        **options,
    )  # fmt: skip
    # What the formula counts beside matrix products, taken away again.
    mixer, steps = config.mixer, scan_steps(config)
    tokens = 15 + (config.class_token != "none")
    beside = 0
    for block in range(config.depth):
        s = steps[block % len(steps)]
        scan = 9 * s * mixer.inner * mixer.state_size
        beside += 2 * (scan + tokens * mixer.inner * (config.conv_width + 1))
    assert _program_macs(config) == round(gmacs(config) * 1e9) - beside


@pytest.mark.parametrize("options", [{}, {"pooling": "mean"}], ids=str)
def test_products_of_a_vit_are_those_of_its_program(options: dict) -> None:
    config = ViTConfig(
        image_size=(24, 40), patch_size=8, num_classes=7, embed_dim=16, depth=3, blocks="unroll",
        num_heads=2, **options,
    )  # fmt: skip
    assert _program_macs(config) == round(gmacs(config) * 1e9)


def _program_macs(config: VisionMambaConfig | ViTConfig) -> int:
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0))))
    images = jnp.zeros((1, *config.image_size, config.channels))
    jaxpr = jax.make_jaxpr(lambda p, x: nnx.merge(graphdef, p)(x))(params, images)
    return _contractions(jaxpr.jaxpr)


@pytest.mark.parametrize(
    ("size", "millions"), {"tiny": 5.97, "small": 11.95, "base": 23.90}.items()
)
def test_activations_of_a_vit_are_those_that_timm_lists(size: str, millions: float) -> None:
    assert activations(model_config(f"vit_{size}_patch16_224")) == pytest.approx(millions, abs=5e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "mean"},
        {"pooling": "none", "class_token": "middle"},
        {"pooling": "attention", "pool_axes": "columns", "head_pool": "all"},
    ],
    ids=str,
)
def test_activations_of_a_mamba_are_the_results_of_its_program(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(x, *args, **kwargs):
        sizes.append(x.size)
        return x

    monkeypatch.setattr(direction_module, "selective_scan", counted)
    monkeypatch.setattr(conv_module, "causal_conv1d", counted)
    config = VisionMambaConfig(
        image_size=(24, 40), patch_size=8, num_classes=7, embed_dim=16, depth=3, blocks="unroll",
        **options,
    )  # fmt: skip
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0))))
    images = jnp.zeros((1, *config.image_size, config.channels))
    jaxpr = jax.make_jaxpr(lambda p, x: nnx.merge(graphdef, p)(x))(params, images)
    products = _results(jaxpr.jaxpr)
    assert round(activations(config) * 1e6) == products + sum(sizes)


@pytest.mark.parametrize(
    "encoder", ["vim", "vit"]
)  # FastMaskVim pools by products, which are not counted.
def test_activations_of_a_masked_autoencoder_are_the_results_of_its_program(
    encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(x, *args, **kwargs):
        sizes.append(x.size)
        return x

    monkeypatch.setattr(direction_module, "selective_scan", counted)
    monkeypatch.setattr(conv_module, "causal_conv1d", counted)
    options: dict = {"image_size": (24, 40), "patch_size": 8, "embed_dim": 16, "depth": 2}
    if encoder == "vit":
        options |= {"num_heads": 2, "decoder_heads": 2}
    config = model_config(
        f"mae_{encoder}_base_patch16_224", **options, blocks="unroll", decoder_dim=8
    )
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0))))
    images, noise = jnp.zeros((1, 24, 40, 3)), jnp.linspace(0, 1, 15)[None]
    program = jax.make_jaxpr(lambda p, x, n: nnx.merge(graphdef, p)(x, noise=n))
    products = _results(program(params, images, noise).jaxpr)
    assert round(activations(config) * 1e6) == products + sum(sizes)


def _results(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Count the entries of the results of all matrix products in a program without loops."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total += eqn.outvars[0].aval.size
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += _results(inner)
    return total


def test_scan_steps_follow_the_grid() -> None:
    def config(**options: object) -> VisionMambaConfig:
        return VisionMambaConfig(image_size=(32, 64), patch_size=8, **options)  # a 4 x 8 grid

    assert scan_steps(config()) == (4, 8) and parallel_steps(config()) == (2, 3)
    assert scan_steps(config(pool_axes="columns")) == (4,)
    assert scan_steps(config(pool_axes="rows")) == (8,)
    assert scan_steps(config(token_order="column")) == (8, 4)
    assert scan_steps(config(pooling="none")) == (32,)
    assert scan_steps(config(pooling="none", class_token="middle")) == (33,)
    assert scan_steps(config(class_token="head")) == (5, 9)
    assert scan_steps(config(), image_size=(8, 33)) == (1, 5)
    assert parallel_steps(config(), image_size=(8, 33)) == (0, 3)
    assert scan_steps(ViTConfig()) == ()
    for size in (7, 0):
        with pytest.raises(UserError, match=f"{size}x{size} pixels is smaller than a patch"):
            gmacs(config(), image_size=size)


def test_the_papers_scan_lengths() -> None:
    fastvim = model_cost(model_config("fastvim_tiny_patch16_224"))
    vim = model_cost(model_config("vim_tiny_patch16_224"))
    assert (fastvim.scan_steps, fastvim.parallel_steps) == ((14, 14), (4, 4))
    assert (vim.scan_steps, vim.parallel_steps) == ((197,), (8,))


def test_cost_grows_with_the_image() -> None:
    config = model_config("fastvim_tiny_patch16_224")
    # Four times the tokens: four times the cost of all but the head and the pooled part, which doubles.
    small, large = gmacs(config), gmacs(config, image_size=448)
    assert 3.8 * small < large < 4 * small

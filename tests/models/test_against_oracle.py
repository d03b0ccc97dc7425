"""Random models, options, shapes and weights, compared with the NumPy oracle in float64: outputs and gradients.

The gradients of the package are held against central differences of the *oracle*, one random direction through every
parameter and through the images, so that neither side's derivative rules are trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st

from fastvim_jax.models.config import VisionMambaConfig, ViTConfig
from fastvim_jax.models.parameters import (
    named_parameters,
    parameter_infos,
    replace_parameters,
)
from fastvim_jax.models.registry import build_model
from tests.oracle.vision_mamba import position_table, vision_mamba
from tests.oracle.vit import vit
from tests.support import DRAWS, assert_close, x64

OUTPUTS = 1e-9
GRADIENTS = 1e-5
EXTENDED = np.finfo(np.longdouble).eps < 1e-18  # 64 bits of significand, not 53
# Shrinking would compile hundreds of models; the failing example is printed with its seed instead.
EXAMPLES = {"phases": (Phase.explicit, Phase.generate), "deadline": None}


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Return fields that both kinds of model share: image, patches, widths and how blocks are run."""
    patch = draw(st.sampled_from([1, 2, (2, 3), (3, 1)]))
    height, width = (patch, patch) if isinstance(patch, int) else patch
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    short = draw(st.tuples(st.integers(0, height - 1), st.integers(0, width - 1)))
    depth = draw(st.integers(1, 4))
    return {
        "image_size": (grid[0] * height - short[0], grid[1] * width - short[1])
        if min(grid[0] * height - short[0] - height, grid[1] * width - short[1] - width) >= 0
        else (grid[0] * height, grid[1] * width),
        "patch_size": patch,
        "channels": draw(st.integers(1, 4)),
        "num_classes": draw(st.sampled_from([0, 1, 3])),
        "depth": depth,
        "drop_path": draw(st.sampled_from([0.0, 0.4])),
        "blocks": draw(st.sampled_from(["scan", "unroll"])),
        "remat": draw(st.sampled_from(["none", "block", "dots"])),
        "pool_axes": draw(st.sampled_from(["alternate", "columns", "rows"])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6, 1e-2])),
        "dtype": "float64",
        "param_dtype": "float64",
    }


@st.composite
def mamba_configs(draw: st.DrawFn, **fixed: Any) -> VisionMambaConfig:
    """Return a FastVim or Vim with any of the options."""
    fields = draw(sizes())
    fields |= {
        "embed_dim": draw(st.integers(2, 7)),
        "pooling": draw(st.sampled_from(["mean", "max", "attention", "none"])),
        "token_order": draw(st.sampled_from(["row", "column"])),
        "norm": draw(st.sampled_from(["rms", "layer"])),
        "post_norm": draw(st.sampled_from(["layer", "rms", "none"])),
        "class_token": draw(st.sampled_from(["none", "middle", "head"])),
        "conv_width": draw(st.integers(0, 4)),
        "unpool": draw(st.sampled_from(["before_skip", "after_skip"])),
        "layer_scale": draw(st.sampled_from([None, 0.1])),
        "state_size": draw(st.integers(1, 5)),
        "expand": draw(st.integers(1, 2)),
        "dt_rank": draw(st.sampled_from([None, 1, 3])),
        "proj_bias": draw(st.booleans()),
        "conv_bias": draw(st.booleans()),
        "pos_embed": draw(st.booleans()),
        "head_pool": draw(st.sampled_from(["mean", "last", "max", "all"])),
        "scan_implementation": draw(
            st.sampled_from(["auto", "xla_sequential", "xla_associative", "reference"])
        ),
    }
    if draw(st.integers(0, 3)) == 0:
        blocks = st.integers(0, fields["depth"] - 1)
        fields["out_indices"] = tuple(draw(st.lists(blocks, min_size=1, unique=True)))
    fields |= fixed
    if fields["pooling"] == "mean":
        fields["pool_scale"] = draw(st.sampled_from([1.0, 0.25]))
    return VisionMambaConfig(**fields)


@st.composite
def vit_configs(draw: st.DrawFn) -> ViTConfig:
    """Return a ViT, plain or with pooled attention, with and without the convolution before it."""
    heads = draw(st.integers(1, 3))
    fields = draw(sizes()) | {
        "num_heads": heads,
        "embed_dim": heads * draw(st.integers(1, 3)),
        "mlp_ratio": draw(st.sampled_from([1.0, 2.0])),
        "qkv_bias": draw(st.booleans()),
        "head_pool": draw(st.sampled_from(["token", "mean"])),
        "pooling": draw(st.sampled_from(["none", "mean"])),
        "conv_width": draw(st.sampled_from([0, 4])),
    }
    return ViTConfig(**fields)


def random_parameters(
    shapes: dict[str, tuple[int, ...]], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw weights of ordinary size under every name; nothing is zero or one, so that nothing is left untested."""
    params = {}
    for name, shape in shapes.items():
        draw = rng.standard_normal(shape)
        if name.endswith(".scale"):
            draw = 1.0 + 0.3 * draw
        elif name.endswith(".kernel"):
            draw = draw / np.sqrt(max(np.prod(shape[:-1]), 1))
        elif name.endswith("A_log"):
            draw = 0.5 * draw
        params[name] = draw
    return params


def other_size(config: Any, rng: np.random.Generator) -> tuple[int, int]:
    """Return the size the model was built for, or another one that needs its positions resampled."""
    if rng.integers(2):
        return config.image_size
    return tuple(int(rng.integers(p, 4 * p + 1)) for p in config.patch_size)


def compare(
    config: Any, oracle: Callable[..., Any], keep_shape: tuple[int, ...], seed: int
) -> None:
    """Draw weights, images and masks, and hold the package's outputs and gradients to the oracle."""
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 3))
    with x64():
        graphdef, abstract = nnx.split(
            nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
        )
        infos = parameter_infos(abstract)
        shapes = {name: info.shape for info in infos for name in info.unstacked_names()}
        flat = random_parameters(shapes, rng)
        images = rng.standard_normal((batch, *other_size(config, rng), config.channels))
        keep = None
        if config.drop_path and rng.integers(2):
            keep = rng.integers(0, 2, (*keep_shape, batch)).astype(np.float64)
        params = replace_parameters(abstract, flat)

        @jax.jit
        def run(params: Any, images: jax.Array, cotangents: list[jax.Array]) -> Any:
            def forward(params: Any, images: jax.Array) -> list[jax.Array]:
                kept = None if keep is None else jnp.asarray(keep)
                return jax.tree.leaves(nnx.merge(graphdef, params)(images, drop_path_keep=kept))

            outputs, pullback = jax.vjp(forward, params, images)
            return outputs, pullback(cotangents)

        def reference(flat: dict[str, np.ndarray], images: np.ndarray) -> list[np.ndarray]:
            outputs = oracle(flat, config, images, drop_path_keep=keep)
            return list(outputs) if isinstance(outputs, tuple) else [outputs]

        expected = reference(flat, images)
        cotangents = [rng.standard_normal(y.shape) for y in expected]
        outputs, (param_grads, image_grad) = run(
            params, jnp.asarray(images), [jnp.asarray(c) for c in cotangents]
        )
        assert len(outputs) == len(expected)
        for i, (y, y_oracle) in enumerate(zip(outputs, expected, strict=True)):
            assert y.dtype == jnp.float64
            assert_close(y, y_oracle, OUTPUTS, f"output {i}")
        grads = {k: np.asarray(v) for k, v in named_parameters(jax.device_get(param_grads)).items()}
        grads["images"] = np.asarray(image_grad)

    def objective(values: dict[str, np.ndarray]) -> float:
        flat = {k: v for k, v in values.items() if k != "images"}
        return sum(
            (y * c).sum()
            for y, c in zip(reference(flat, values["images"]), cotangents, strict=True)
        )

    wide = np.longdouble if EXTENDED else np.float64
    values = {k: v.astype(wide) for k, v in (flat | {"images": images}).items()}
    size = sum(np.abs(y * c).sum() for y, c in zip(expected, cotangents, strict=True))
    # The quotient's error has two parts: the step's own, which a norm of few channels magnifies and a kink of a maximum
    # adds to, so a short step is good; and rounding, divided by the step. Extended precision has room for a short step.
    # GELU's error function has none, nor have some machines: there the gradient may agree with either of two steps.
    if EXTENDED and not isinstance(config, ViTConfig):
        steps, rounding = (1e-8,), 1e-17
    else:
        maximum = "max" in (config.pooling, config.head_pool)
        steps, rounding = ((1e-7, 1e-6) if maximum else (1e-6, 1e-5)), 1e-14
    assert grads.keys() == values.keys()
    for name, value in values.items():
        direction = rng.standard_normal(value.shape)
        analytic = (grads[name] * direction).sum()
        scale = np.linalg.norm(grads[name]) * np.linalg.norm(direction)
        tried = []
        for step in steps:
            ahead, behind = (
                objective(values | {name: value + sign * step * direction}) for sign in (1, -1)
            )
            difference = (ahead - behind) / (2 * step)
            allowed = GRADIENTS * scale + rounding * size / step
            if abs(analytic - difference) <= allowed:
                break
            tried.append(f"{difference:.9e} by a step of {step:.0e} (allowed {allowed:.1e})")
        assert len(tried) < len(steps), (
            f"gradient of {name}: {analytic:.9e} along a random direction, the oracle says {', '.join(tried)}"
        )


SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.drawn("more of the models", one_in=6)
@settings(max_examples=3 * DRAWS, **EXAMPLES)
@given(config=mamba_configs(), seed=SEEDS)
def test_any_vision_mamba_equals_the_oracle(config: VisionMambaConfig, seed: int) -> None:
    note(f"{config}")
    compare(config, vision_mamba, (config.depth,), seed)


@pytest.mark.drawn("options of models")
@pytest.mark.parametrize("pooling", ["mean", "max", "attention", "none"])
@settings(max_examples=DRAWS, **EXAMPLES)
@given(data=st.data(), seed=SEEDS)
def test_every_pooling_with_a_class_token_equals_the_oracle(
    pooling: str, data: st.DataObject, seed: int
) -> None:
    where = data.draw(st.sampled_from(["middle", "head"]))
    config = data.draw(mamba_configs(pooling=pooling, class_token=where))
    compare(config, vision_mamba, (config.depth,), seed)


@pytest.mark.drawn("more of the models", one_in=6)
@settings(max_examples=2 * DRAWS, **EXAMPLES)
@given(config=vit_configs(), seed=SEEDS)
def test_any_vit_equals_the_oracle(config: ViTConfig, seed: int) -> None:
    compare(config, vit, (config.depth, 2), seed)


@pytest.mark.parametrize("class_token", ["middle", "head"])
def test_one_patch_takes_the_class_tokens_own_position(class_token: str) -> None:
    """With one patch, the middle of the sequence is its head. The token's row in the table stays where it was built."""
    config = VisionMambaConfig(
        image_size=(2, 1), patch_size=1, channels=1, num_classes=1, embed_dim=2, depth=1,
        class_token=class_token, dtype="float64", param_dtype="float64",
    )  # fmt: skip
    table = np.array([[[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]])
    token, patches = (1, (0, 2)) if class_token == "middle" else (0, (1, 2))
    with x64():
        model = build_model(config, rngs=nnx.Rngs(0))
        model.pos_embed[...] = jnp.asarray(table)
        found = np.asarray(model._position_table((1, 1)))
    expected = np.stack([table[0, token], table[0, patches].mean(0)])[None]
    assert_close(found, expected, 1e-12)
    assert_close(position_table(table, (2, 1), (1, 1), class_token), expected, 1e-12)

"""Whole models and single mixers against their fixtures: outputs and gradients, in every dtype."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.interop import from_torch_state_dict, to_torch_names
from fastvim_jax.interop.torch_names import resolve_aliases
from fastvim_jax.layers.direction import MixerConfig
from fastvim_jax.layers.linear import linear
from fastvim_jax.layers.mixer import Mixer
from fastvim_jax.layers.pooling import GridPooling
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.models.config import VisionMambaConfig, ViTConfig
from fastvim_jax.models.registry import build_model
from fastvim_jax.precision import Precision
from tests.parity.arguments import mixer_fields, model_fields
from tests.parity.channels import channels_of
from tests.parity.compare import Comparison
from tests.parity.golden import Golden, expected_grads
from tests.support import x64

INPUTS = {"x", "drop_path_keep", "channels", "input_channel_order"}
CONFIGS = {
    "ViT": ViTConfig,
    **dict.fromkeys(("ChannelViT", "HCSChannelViT"), ChannelViTConfig),
    **dict.fromkeys(
        ("ChannelVim", "FastChannelVim", "FastChannelVim2DCompress"), ChannelMambaConfig
    ),
}


def precision_fields(dtype: str) -> dict[str, str]:
    """Return the dtype policy of one run: float64 throughout, or float32 parameters under the compute dtype."""
    params = "float64" if dtype == "float64" else "float32"
    policy = {"dtype": dtype, "param_dtype": params, "matmul_precision": "highest"}
    if dtype.startswith("bfloat16 compute"):
        policy |= {"dtype": "bfloat16", "activations": "compute"}
    return policy


def load_model(golden: Golden, dtype: str, blocks: str, **options: Any) -> nnx.Module:
    """Return the model that a fixture describes, with its weights."""
    fields = model_fields(golden.kind, golden.kwargs)
    config = CONFIGS.get(golden.kind, VisionMambaConfig)(
        **fields, **precision_fields(dtype), blocks=blocks, **options
    )
    # Only shapes are made: every value comes from the fixture, or loading fails.
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    from_torch_state_dict(model, golden.state)
    return model


def compare_model(
    golden: Golden, dtype: str, blocks: str = "scan", *, gradients: bool = True, **options: Any
) -> Comparison:
    """Compare one model in one dtype and mode of execution; `options` are further fields of its config."""
    state, grads = resolve_aliases(golden.state), resolve_aliases(golden.grads)
    golden = dataclasses.replace(golden, state=state, grads=grads)
    comparison = Comparison(golden.name, golden.kind, dtype, blocks)
    if unknown := set(golden.inputs) - INPUTS:
        comparison.missing(f"a use for the inputs {sorted(unknown)}")
        return comparison
    drawn = "drop_path_keep" in golden.inputs or "hcs_channels" in golden.meta
    if not golden.meta.get("eval_mode", True) and not drawn:
        comparison.missing("the drop-path masks or channels of a training-mode fixture")
        return comparison
    if dtype == "float64":
        with x64():
            evaluate_model(comparison, golden, dtype, blocks, gradients, **options)
    else:
        evaluate_model(comparison, golden, dtype, blocks, gradients, **options)
    return comparison


def evaluate_model(
    comparison: Comparison, golden: Golden, dtype: str, blocks: str, gradients: bool, **options: Any
) -> None:
    """Run the model once and compare every output, and with `gradients` every gradient, that is stored."""
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    model = load_model(golden, dtype, blocks, **options)
    graphdef, params = nnx.split(model)
    images = jnp.asarray(golden.inputs["x"].transpose(0, 2, 3, 1), wide)
    keep = golden.inputs.get("drop_path_keep")
    keep = None if keep is None else jnp.asarray(keep, wide)
    traced = any(name.startswith("block") for name in golden.outputs)

    @jax.jit
    def run(params: Any, images: jax.Array) -> Any:
        def forward(params: Any, images: jax.Array) -> dict[str, jax.Array]:
            return model_outputs(nnx.merge(graphdef, params), images, keep, golden)

        blocks = block_outputs(nnx.merge(graphdef, params), images) if traced else {}
        if not gradients:
            return forward(params, images) | blocks, None
        outputs, pullback = jax.vjp(forward, params, images)
        weights = {
            name: jnp.asarray(golden.cotangents[name], y.dtype)
            if name in golden.cotangents
            else jnp.zeros_like(y)
            for name, y in outputs.items()
        }
        return outputs | blocks, pullback(weights)

    outputs, grads = run(params, images)
    for name, expected in golden.outputs.items():
        if name in outputs:
            comparison.output(name, outputs[name], expected)
        else:
            comparison.missing(f"output {name}")
    if stray := set(golden.cotangents) - set(outputs):
        comparison.missing(f"the outputs of cotangents {sorted(stray)}")
    if not gradients:
        return
    param_grads, image_grad = grads
    compare_parameter_grads(comparison, golden, to_torch_names(model, jax.device_get(param_grads)))
    for name, expected in golden.input_grads().items():
        if name == "x":
            comparison.grad("input/x", np.asarray(image_grad).transpose(0, 3, 1, 2), expected)
        else:
            comparison.missing(f"gradient of input {name}")


def model_outputs(
    model: nnx.Module, images: jax.Array, keep: jax.Array | None, golden: Golden
) -> dict[str, jax.Array]:
    """Return the model's results under the names of the fixture."""
    images, ids = channels_of(golden, images)
    named = {} if ids is None else {"channel_ids": ids}
    if model.config.out_indices:
        features = model(images, drop_path_keep=keep)
        return {f"feature{j}": f.transpose(0, 3, 1, 2) for j, f in enumerate(features)}
    outputs = {}
    if "logits" in golden.outputs:
        outputs["logits"] = model(images, drop_path_keep=keep, **named)
    if "features" in golden.outputs and keep is None:
        outputs["features"] = model.features(images, **named)
    return outputs


def block_outputs(model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
    """Return the residual stream that each block works on, and its mixer's output."""
    outputs = {}
    for i, (residual, hidden) in enumerate(model.intermediates(images)):
        outputs |= {f"block{i}_residual": residual, f"block{i}_hidden": hidden}
    return outputs


def compare_parameter_grads(
    comparison: Comparison,
    golden: Golden,
    grads: dict[str, jax.Array],
    fixed: frozenset[str] = frozenset(),
) -> None:
    """Compare every gradient stored, every gradient the fixture says it stores, and zeros where it says zero.

    `fixed` names entries of the state that are no parameters.
    """
    if absent := expected_grads(golden) - set(golden.grads) - fixed:
        comparison.missing(f"stored gradients of {sorted(absent)}")
    for name, expected in golden.parameter_grads().items():
        if name in grads:
            comparison.grad(name, grads[name], expected)
        else:
            comparison.missing(f"gradient of {name}")
    for name in golden.unused():
        if name in grads:
            comparison.zero_grad(name, grads[name])
        else:
            comparison.missing(f"gradient of {name}, which is said to be zero")


def compare_mixer(golden: Golden, dtype: str) -> Comparison:
    """Compare one FastVim mixer: its output, its gradients and the values inside both branches."""
    comparison = Comparison(golden.name, golden.kind, dtype)
    if dtype == "float64":
        with x64():
            evaluate_mixer(comparison, golden, dtype)
    else:
        evaluate_mixer(comparison, golden, dtype)
    return comparison


def evaluate_mixer(comparison: Comparison, golden: Golden, dtype: str) -> None:
    """Run the mixer forwards and backwards once and compare everything stored."""
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    config, pooling = mixer_of(golden, dtype)
    mixer = Mixer(config, rngs=nnx.Rngs(0))
    from_torch_state_dict(mixer, golden.state)
    graphdef, params = nnx.split(mixer)
    hidden = jnp.asarray(golden.inputs["hidden"], wide)
    weights = golden.cotangents["out"]

    @jax.jit
    def run(params: Any, hidden: jax.Array) -> Any:
        def forward(params: Any, hidden: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, params)(hidden, pooling)

        out, pullback = jax.vjp(forward, params, hidden)
        inner = inner_values(nnx.merge(graphdef, params), hidden, pooling)
        return {"out": out} | inner, pullback(jnp.asarray(weights, out.dtype))

    outputs, (param_grads, hidden_grad) = run(params, hidden)
    for name, expected in golden.outputs.items():
        if name in outputs:
            comparison.output(name, outputs[name], expected)
        else:
            comparison.missing(f"output {name}")
    compare_parameter_grads(comparison, golden, to_torch_names(mixer, jax.device_get(param_grads)))
    for name, expected in golden.input_grads().items():
        if name == "hidden":
            comparison.grad("input/hidden", hidden_grad, expected)
        else:
            comparison.missing(f"gradient of input {name}")


def mixer_of(golden: Golden, dtype: str) -> tuple[MixerConfig, GridPooling]:
    """Return the mixer's config and pooling from the authors' arguments."""
    fields = mixer_fields(golden.kwargs)
    pooling = GridPooling(
        *fields.pop("grid"), method=fields.pop("pooling"), scale=fields.pop("pool_scale", 1.0)
    )
    policy = precision_fields(dtype)
    precision = Precision(policy["dtype"], policy["param_dtype"], policy["matmul_precision"])
    return MixerConfig(width=fields.pop("embed_dim"), precision=precision, **fields), pooling


def inner_values(mixer: Mixer, hidden: jax.Array, pooling: GridPooling) -> dict[str, jax.Array]:
    """Return the values inside both branches, channels first and the backward ones last token first, as stored."""
    x, _ = jnp.split(linear(mixer.in_proj, hidden, mixer.config.precision), 2, axis=-1)
    x = pooling.to_scan_order(x)
    values = {}
    for prefix, branch in (("fwd", mixer.forward), ("bwd", mixer.backward)):
        tokens = branch.convolve(x)
        u = pooling.pool(tokens, reverse=branch.reverse)
        delta, B, C = branch.select(u)
        inner = {"conv_silu": tokens, "scan_u": u, "scan_delta": delta, "scan_B": B, "scan_C": C}
        inner["scan_y"] = branch.scan(u)
        for name, value in inner.items():
            stored = value[:, ::-1] if prefix == "bwd" else value
            values[f"{prefix}_{name}"] = stored.swapaxes(1, 2)
        values[f"{prefix}_scan_A"] = -jnp.exp(branch.A_log[...])
    return values

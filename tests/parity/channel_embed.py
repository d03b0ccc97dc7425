"""The patch embedding of the channel models by itself, with the channel ids of each sample."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastvim_jax.interop.torch_names import CHANNEL_EMBEDDING, VISION_MAMBA, NameTable
from fastvim_jax.layers.channel_embed import ChannelPatchEmbed
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.parameters import named_parameters, replace_parameters
from tests.parity.arguments import model_fields
from tests.parity.channels import channels_of
from tests.parity.compare import Comparison
from tests.parity.golden import Golden
from tests.parity.models import compare_parameter_grads, precision_fields
from tests.support import x64

TABLE = NameTable((*CHANNEL_EMBEDDING, *VISION_MAMBA))
PREFIX = "patch_embed."


def compare_channel_embed(golden: Golden, dtype: str) -> Comparison:
    """Compare tokens, gradients of the parameters and of the images."""
    comparison = Comparison(golden.name, golden.kind, dtype)
    with x64() if dtype == "float64" else contextlib.nullcontext():
        evaluate(comparison, golden, dtype)
    return comparison


def evaluate(comparison: Comparison, golden: Golden, dtype: str) -> None:
    """Run the embedding forwards and backwards once and compare everything stored."""
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    config = ChannelMambaConfig(
        **model_fields(golden.kind, golden.kwargs), **precision_fields(dtype)
    )
    embed = ChannelPatchEmbed(
        config.patch, config.step, config.channels, config.embed_dim,
        precision=config.precision, rngs=nnx.Rngs(0),
    )  # fmt: skip
    graphdef, params = nnx.split(embed)
    flat = {}
    for name, value in golden.state.items():
        ours, convert = TABLE.to_ours(PREFIX + name)
        flat[ours.removeprefix(PREFIX)] = convert(value)
    params = replace_parameters(params, flat)

    @jax.jit
    def run(params: Any, images: jax.Array) -> Any:
        def forward(params: Any, images: jax.Array) -> jax.Array:
            kept, ids = channels_of(golden, images.transpose(0, 2, 3, 1))
            tokens = nnx.merge(graphdef, params)(kept, ids)
            if config.token_order == "column":
                tokens = tokens.swapaxes(1, 2)
            if config.scan_order == "spatial":
                tokens = tokens.transpose(0, 3, 1, 2, 4)
            return tokens.reshape(len(tokens), -1, tokens.shape[-1])

        tokens, pullback = jax.vjp(forward, params, images)
        return tokens, pullback(jnp.asarray(golden.cotangents["tokens"], tokens.dtype))

    tokens, (param_grads, image_grad) = run(params, jnp.asarray(golden.inputs["x"], wide))
    comparison.output("tokens", tokens, golden.outputs["tokens"])
    named = {}
    for name, value in named_parameters(param_grads).items():
        theirs, convert = TABLE.to_torch(PREFIX + name)
        named[theirs.removeprefix(PREFIX)] = convert(value)
    compare_parameter_grads(comparison, golden, named)
    for name, expected in golden.input_grads().items():
        if name == "x":
            comparison.grad("input/x", image_grad, expected)
        else:
            comparison.missing(f"gradient of input {name}")

"""Masked autoencoders and the functions around them against their fixtures."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.interop import from_torch_state_dict, to_torch_names
from fastvim_jax.layers.masking import kept_count, random_masking, transpose_ids
from fastvim_jax.layers.ragged_pooling import RaggedPooling
from fastvim_jax.models import mae
from fastvim_jax.models.config import VisionMambaConfig, ViTConfig
from fastvim_jax.models.mae import MaskedAutoencoder
from fastvim_jax.models.mae_config import MaskedAutoencoderConfig
from fastvim_jax.precision import Precision
from fastvim_jax.training.masked.loss import patchify, pixel_loss, unpatchify
from fastvim_jax.training.masked.probe_head import ProbeHead
from tests.parity.arguments import masked_fields
from tests.parity.compare import Comparison, table_bound
from tests.parity.golden import Golden
from tests.parity.models import compare_parameter_grads, precision_fields
from tests.support import x64

INDICES = ("mask", "ids_restore", "ids_keep")
FIXED = ("pos_embed", "decoder_pos_embed")
"""Entries of a state dict that are no parameters."""


def load_masked(golden: Golden, dtype: str) -> tuple[MaskedAutoencoder, bool]:
    """Return the model that a fixture describes, with its weights, and whether its loss normalises patches."""
    encoder, own = masked_fields(golden.kind, golden.kwargs)
    normalise = own.pop("norm_pix_loss")
    config_class = ViTConfig if golden.kind == "ViTMAE" else VisionMambaConfig
    config = MaskedAutoencoderConfig(
        encoder=config_class(**encoder, **precision_fields(dtype)),
        mask_ratio=golden.meta["mask_ratio"],
        **own,
    )
    model = nnx.eval_shape(lambda: MaskedAutoencoder(config, rngs=nnx.Rngs(0)))
    from_torch_state_dict(model, golden.state)
    return model, normalise


def stored_tables(golden: Golden) -> tuple[np.ndarray, np.ndarray]:
    """Return the position tables `l d` of encoder and decoder that a fixture's numbers were computed with.

    Ours may differ from them by `table_bound`, which is more than outputs may differ.
    """
    with_token = golden.kind != "FastMaskVimMAE"  # Its row is the first, and zero.
    encoder, decoder = (golden.state[name][0, int(with_token) :] for name in FIXED)
    return encoder, decoder


def compare_masked(golden: Golden, dtype: str) -> Comparison:
    """Compare one masked autoencoder in one dtype."""
    comparison = Comparison(golden.name, golden.kind, dtype)
    if unknown := set(golden.inputs) - {"x", "noise"}:
        comparison.missing(f"a use for the inputs {sorted(unknown)}")
        return comparison
    if golden.kwargs.get("drop_path_rate") and not golden.meta.get("eval_mode", True):
        comparison.missing("the drop-path masks of a training-mode fixture")
        return comparison
    if dtype == "float64":
        with x64():
            evaluate_masked(comparison, golden, dtype)
    else:
        evaluate_masked(comparison, golden, dtype)
    return comparison


def evaluate_masked(comparison: Comparison, golden: Golden, dtype: str) -> None:
    """Run the model forwards and backwards once and compare everything stored."""
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    model, normalise = load_masked(golden, dtype)
    graphdef, params = nnx.split(model)
    images = jnp.asarray(golden.inputs["x"].transpose(0, 2, 3, 1), wide)
    noise = jnp.asarray(golden.inputs["noise"], jnp.float32)
    weights = {name: jnp.asarray(value, wide) for name, value in golden.cotangents.items()}

    def forward(params: Any, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        out = nnx.merge(graphdef, params)(images, noise=noise)
        masking = out.masking
        loss = pixel_loss(
            images, out.predicted, masking.removed, model.config.patch, normalise=normalise
        )
        outputs = {
            "loss": loss,
            "pred": out.predicted,
            "latent": out.latent,
            "mask": masking.removed,
            "ids_restore": masking.ids_restore,
            "ids_keep": masking.ids_keep,
        }
        objective = sum(jnp.sum(outputs[name] * weight) for name, weight in weights.items())
        return objective, outputs

    config = model.config
    widths = {"pos_embed": config.encoder.embed_dim, "decoder_pos_embed": config.decoder_dim}
    tables = dict(zip(widths.values(), stored_tables(golden), strict=True))  # by width
    for name, width in widths.items():
        ours = mae.fixed_table(config.encoder, width, config.grid)
        comparison.output(name, ours, tables[width], table_bound(max(config.grid)))
    run = jax.jit(jax.grad(forward, argnums=(0, 1), has_aux=True))
    with patch.object(mae, "fixed_table", lambda encoder, width, grid: tables[width]):
        (param_grads, image_grad), outputs = run(params, images)
    for name, expected in golden.outputs.items():
        if name in outputs:
            bound = 0.0 if name in INDICES else None
            comparison.output(name, outputs[name], expected, bound)
        else:
            comparison.missing(f"output {name}")
    compare_parameter_grads(
        comparison, golden, to_torch_names(model, jax.device_get(param_grads)), frozenset(FIXED)
    )
    for name, expected in golden.input_grads().items():
        if name == "x":
            comparison.grad("input/x", np.asarray(image_grad).transpose(0, 3, 1, 2), expected)
        else:
            comparison.missing(f"gradient of input {name}")


def row_means_outputs(divisor: str) -> Any:
    """Return the pooled rows of a sequence, and of a reversed one under the same rows (the backward direction)."""

    def outputs(inputs: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        rows = kwargs["rows"]
        ids = jnp.asarray(inputs["row_ids"])
        pooling = RaggedPooling(rows, kwargs["cols"], ids, rows - 1 - ids[:, ::-1], divisor=divisor)
        last = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731  # fixtures keep tokens last
        flipped = pooling.pool(last(inputs["x_flip"])[:, ::-1], reverse=True)[:, ::-1]
        return {"pooled": last(pooling.pool(last(inputs["x"]))), "pooled_flip": last(flipped)}

    return outputs


def compare_masking(golden: Golden) -> Comparison:
    """Compare random masks under given noise, and the ids of a transposed grid; all exact."""
    comparison = Comparison(golden.name, golden.kind, "float64")
    with x64():
        noise, x = jnp.asarray(golden.inputs["noise"]), jnp.asarray(golden.inputs["x"])
        rows, columns = golden.kwargs["grid"]
        outputs = {"transpose_ids": transpose_ids(jnp.arange(rows * columns), rows, columns)}
        for ratio in golden.kwargs["mask_ratios"]:
            masking = random_masking(noise, kept_count(noise.shape[1], ratio))
            found = {
                "x_masked": jnp.take_along_axis(x, masking.ids_keep[:, :, None], axis=1),
                "mask": masking.removed,
                "ids_restore": masking.ids_restore,
                "ids_keep": masking.ids_keep,
            }
            outputs |= {f"r{ratio}/{name}": value for name, value in found.items()}
        for name, expected in golden.outputs.items():
            if name in outputs:
                comparison.output(name, outputs[name], expected, bound=0.0)
            else:
                comparison.missing(f"output {name}")
    return comparison


def compare_pixel_loss(golden: Golden, dtype: str) -> Comparison:
    """Compare patch vectors, and both losses with their gradients."""
    comparison = Comparison(golden.name, golden.kind, dtype)
    if dtype == "float64":
        with x64():
            evaluate_pixel_loss(comparison, golden, jnp.float64)
    else:
        evaluate_pixel_loss(comparison, golden, jnp.float32)
    return comparison


def evaluate_pixel_loss(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    """Compare everything stored."""
    side = golden.kwargs["patch_size"]
    images = jnp.asarray(golden.inputs["x"].transpose(0, 2, 3, 1), dtype)
    predicted, mask = (jnp.asarray(golden.inputs[name], dtype) for name in ("pred", "mask"))
    grid = tuple(golden.kwargs["grid"])
    outputs = {
        "patches": patchify(images, (side, side)),
        "unpatchified_pred": unpatchify(predicted, grid, (side, side)).transpose(0, 3, 1, 2),
    }
    grads = {}
    for name in ("norm_pix", "raw"):
        loss = lambda x, p, n=name: pixel_loss(  # noqa: E731
            x, p, mask, (side, side), normalise=n == "norm_pix"
        )
        value, (to_x, to_pred) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
            images, predicted
        )
        outputs[f"loss_{name}"] = value
        grads[f"{name}/input/x"] = to_x.transpose(0, 3, 1, 2)
        grads[f"{name}/input/pred"] = to_pred
    for name, expected in golden.outputs.items():
        if name in outputs:
            comparison.output(name, outputs[name], expected)
        else:
            comparison.missing(f"output {name}")
    for name, expected in golden.grads.items():
        if name in grads:
            comparison.grad(name, grads[name], expected)
        else:
            comparison.missing(f"gradient {name}")


def compare_probe_head(golden: Golden, dtype: str) -> Comparison:
    """Compare the probe's head over training batches, then on the first in evaluation, and its running statistics."""
    comparison = Comparison(golden.name, golden.kind, dtype)
    if dtype == "float64":
        with x64():
            evaluate_probe_head(comparison, golden, dtype)
    else:
        evaluate_probe_head(comparison, golden, dtype)
    return comparison


def evaluate_probe_head(comparison: Comparison, golden: Golden, dtype: str) -> None:
    """Compare everything stored."""
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    batches = jnp.asarray(golden.inputs["x"], wide)
    weight = golden.state["1.weight"]
    precision = Precision(dtype, dtype)
    head = ProbeHead(weight.shape[1], weight.shape[0], precision=precision, rngs=nnx.Rngs(0))
    head.head.kernel[...] = jnp.asarray(weight.T, wide)
    head.head.bias[...] = jnp.asarray(golden.state["1.bias"], wide)
    outputs = {f"train{i}": head(batch, train=True) for i, batch in enumerate(batches)}
    outputs |= {
        "eval": head(batches[0]),
        "running_mean": head.mean[...],
        "running_var": head.variance[...],
    }
    for name, expected in golden.outputs.items():
        if name in outputs:
            comparison.output(name, outputs[name], expected)
        else:
            comparison.missing(f"output {name}")

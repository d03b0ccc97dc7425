"""The functions around the models against their fixtures: scan, convolution, norms, tables, schedules, losses, EMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.layers.norms import make_norm
from fastvim_jax.layers.pos_embed import resize_pos_embed, sincos_pos_embed
from fastvim_jax.precision import Precision
from fastvim_jax.training.classification.losses import (
    cross_entropy,
    label_smoothing_cross_entropy,
    soft_target_cross_entropy,
)
from fastvim_jax.training.ema import init_ema, update_ema
from pallas_kernels import causal_conv1d, selective_scan
from tests.parity.compare import Comparison, table_bound
from tests.parity.golden import Golden
from tests.parity.masked import row_means_outputs
from tests.support import x64

Arrays = dict[str, Any]


def selective_scan_outputs(inputs: Arrays, kwargs: Arrays) -> Arrays:
    """Return the scan; fixtures keep time last, and groups before states."""
    x = {k: jnp.moveaxis(v, -1, 1) if v.ndim >= 3 else v for k, v in inputs.items()}
    y, state = selective_scan(**x, **kwargs, return_last_state=True)
    return {"y": jnp.swapaxes(y, 1, 2), "last_state": state}


def causal_conv_outputs(inputs: Arrays, kwargs: Arrays) -> Arrays:
    """Compute convolution, bias and SiLU; fixtures keep time last."""
    x, kernel = jnp.swapaxes(inputs["x"], 1, 2), inputs["weight"].T
    y = causal_conv1d(x, kernel, inputs.get("bias"), activation="silu", **kwargs)
    return {"y": jnp.swapaxes(y, 1, 2)}


def add_norm_outputs(kind: str) -> Callable[[Arrays, Arrays], Arrays]:
    """Return the sum with the residual, and the model's norm of it."""

    def outputs(inputs: Arrays, kwargs: Arrays) -> Arrays:
        total = inputs["x"] + inputs["residual"]
        dtype = str(total.dtype)
        precision = Precision(dtype, dtype)
        norm = make_norm(kind, total.shape[-1], precision=precision, rngs=nnx.Rngs(0), **kwargs)
        graphdef, params = nnx.split(norm)
        values = {"scale": inputs["weight"], "bias": inputs.get("bias")}
        nnx.replace_by_pure_dict(params, {k: v for k, v in values.items() if v is not None})
        return {"normed": nnx.merge(graphdef, params)(total), "residual_out": total}

    return outputs


def loss_outputs(inputs: Arrays, kwargs: Arrays) -> Arrays:
    """Return the three classification losses."""
    logits, labels = inputs["logits"], inputs["labels"]
    return {
        "soft_target_ce": soft_target_cross_entropy(logits, inputs["soft_targets"]),
        "label_smoothing_ce": label_smoothing_cross_entropy(logits, labels, kwargs["smoothing"]),
        "ce": cross_entropy(logits, labels),
    }


def pos_embed_outputs(inputs: Arrays, kwargs: Arrays) -> Arrays:
    """Resize tables. A column-major table is resized along its own axes, so the target's sides are swapped."""
    outputs = {}
    for name, table in inputs.items():
        if not name.endswith("_spec"):
            rows, columns, new_rows, new_columns, column_major = inputs[f"{name}_spec"]
            target = (new_columns, new_rows) if column_major else (new_rows, new_columns)
            outputs[name] = resize_pos_embed(table, (rows, columns), target)
    return outputs


def ema_outputs(inputs: Arrays, kwargs: Arrays) -> Arrays:
    """Return the average after each of the given weights, the first of which it starts from."""
    average = init_ema(inputs["weights"][0])
    averages = [average]
    for weights in inputs["weights"][1:]:
        average = update_ema(average, weights, kwargs["decay"])
        averages.append(average)
    return {"ema": jnp.stack(averages)}


FUNCTIONS: dict[str, Callable[[Arrays, Arrays], Arrays]] = {
    "selective_scan": selective_scan_outputs,
    "causal_conv1d_silu": causal_conv_outputs,
    "add_rms_norm": add_norm_outputs("rms"),
    "add_layer_norm": add_norm_outputs("layer"),
    "classification_losses": loss_outputs,
    "pos_embed_resize": pos_embed_outputs,
    "ema": ema_outputs,
    "masked_row_means_constant": row_means_outputs("row_length"),
    "masked_row_means_true": row_means_outputs("count"),
}


def compare_function(golden: Golden, dtype: str) -> Comparison:
    """Compare one function in one dtype, with the gradients of all its float inputs."""
    comparison = Comparison(golden.name, golden.kind, dtype)
    if dtype == "float64":
        with x64():
            evaluate_function(comparison, golden, jnp.float64)
    else:
        evaluate_function(comparison, golden, jnp.float32)
    return comparison


def evaluate_function(comparison: Comparison, golden: Golden, dtype: Any) -> None:
    """Run the function forwards and backwards once and compare everything stored."""
    function = FUNCTIONS[golden.kind]
    floats = {k: jnp.asarray(v, dtype) for k, v in golden.inputs.items() if v.dtype.kind == "f"}
    # Shapes of grids stay numbers; labels become arrays.
    others = {
        k: tuple(int(n) for n in v) if k.endswith("_spec") else jnp.asarray(v)
        for k, v in golden.inputs.items()
        if v.dtype.kind != "f"
    }

    @jax.jit
    def run(floats: Arrays) -> Any:
        outputs, pullback = jax.vjp(lambda x: function({**others, **x}, golden.kwargs), floats)
        weights = {
            name: jnp.asarray(golden.cotangents.get(name, np.zeros(y.shape)), y.dtype)
            for name, y in outputs.items()
        }
        return outputs, pullback(weights)[0]

    outputs, grads = run(floats)
    for name, expected in golden.outputs.items():
        if name in outputs:
            comparison.output(name, outputs[name], expected)
        else:
            comparison.missing(f"output {name}")
    for name, expected in golden.grads.items():
        name = name.removeprefix("input/")
        if name in grads:
            comparison.grad(f"input/{name}", grads[name], expected)
        else:
            comparison.missing(f"gradient of {name}")


def compare_sincos(golden: Golden) -> Comparison:
    """Compare the fixed tables, float32 by definition; a width of zero rows first makes room for a class token."""
    comparison = Comparison(golden.name, golden.kind, "float32")
    for name, expected in golden.outputs.items():
        width, grid, *class_row = name.split("_")
        table = sincos_pos_embed(int(width[1:]), (int(grid[1:]), int(grid[1:])))
        if class_row == ["cls"]:
            table = np.concatenate([np.zeros((1, table.shape[1])), table])
        elif class_row:
            comparison.missing(f"the meaning of table {name}")
            continue
        comparison.output(name, table, expected, table_bound(int(grid[1:])))
    return comparison

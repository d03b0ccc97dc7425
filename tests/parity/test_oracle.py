"""The oracle itself, held to the golden numbers, so that what it says of random models can be believed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.oracle.channels import channel_mamba, channel_vit, embed_channels
from tests.oracle.masked import (
    masked_autoencoder,
    patchify,
    pixel_loss,
    random_masking,
    row_sums,
)
from tests.oracle.mixer import mixer
from tests.oracle.ops import (
    causal_conv1d,
    layer_norm,
    resize_bicubic,
    rms_norm,
    selective_scan,
    silu,
    sincos_table,
)
from tests.oracle.pooling import rows_of
from tests.oracle.vision_mamba import embed, run_blocks, vision_mamba
from tests.oracle.vit import vit
from tests.parity.arguments import masked_fields, mixer_fields, model_fields
from tests.parity.channels import CHANNEL_KINDS, channels_of
from tests.parity.golden import Golden, fixture_paths, kind_of, read
from tests.parity.masked import stored_tables
from tests.parity.oracle_names import convert_mixer, masked_parameters, oracle_parameters
from tests.support import assert_close

# Blocks are stored in float32, whose rounding alone is up to 2^-24 of the largest entry.
BLOCKS = 6e-8
MAMBA_DEFAULTS = {
    "post_norm": "layer",
    "class_token": "none",
    "unpool": "before_skip",
    "pool_scale": 1.0,
    "pos_embed": True,
    "drop_path": 0.0,
    "head_pool": "mean",
    "out_indices": (),
    "norm_eps": 1e-5,
    "token_order": "row",
    "pool_axes": "alternate",
}
VIT_DEFAULTS = {"drop_path": 0.0, "norm_eps": 1e-6, "pooling": "none", "conv_width": 0}


def double(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: np.asarray(v, np.float64) if v.dtype.kind == "f" else v for k, v in arrays.items()}


def model_outputs(golden: Golden) -> dict[str, np.ndarray]:
    """Return what the oracle says of a whole model."""
    fields = model_fields(golden.kind, golden.kwargs)
    params, inputs = oracle_parameters(golden.state), double(golden.inputs)
    images, keep = inputs["x"].transpose(0, 2, 3, 1), inputs.get("drop_path_keep")
    if golden.kind == "ViT":
        out = vit(params, SimpleNamespace(**VIT_DEFAULTS | fields), images, drop_path_keep=keep)
        return {"logits" if fields["num_classes"] else "features": out}
    config = SimpleNamespace(**MAMBA_DEFAULTS | fields)
    if config.out_indices:
        features = vision_mamba(params, config, images, drop_path_keep=keep)
        return {f"feature{j}": f.transpose(0, 3, 1, 2) for j, f in enumerate(features)}
    outputs = {
        "logits": vision_mamba(params, config, images, drop_path_keep=keep),
        "features": vision_mamba(params, config, images, drop_path_keep=keep, features_only=True),
    }
    _, trace = run_blocks(params, config, *embed(params, config, images), keep)
    for i, (residual, hidden) in enumerate(trace):
        outputs |= {f"block{i}_residual": residual, f"block{i}_hidden": hidden}
    return outputs


def channel_outputs(golden: Golden) -> dict[str, np.ndarray]:
    """Return what the oracle says of a channel model, with the channels that the fixture keeps and names."""
    fields = model_fields(golden.kind, golden.kwargs)
    params, inputs = oracle_parameters(golden.state), double(golden.inputs)
    images, ids = channels_of(golden, inputs["x"].transpose(0, 2, 3, 1))
    keep = inputs.get("drop_path_keep")
    if golden.kind in ("ChannelViT", "HCSChannelViT"):
        config = SimpleNamespace(**VIT_DEFAULTS | fields)
        out = channel_vit(params, config, images, channel_ids=ids, drop_path_keep=keep)
        return {"logits" if fields["num_classes"] else "features": out}
    config = SimpleNamespace(**MAMBA_DEFAULTS | {"stride": None} | fields)
    options = {"channel_ids": ids, "drop_path_keep": keep}
    outputs = {"logits": channel_mamba(params, config, images, **options)[0]}
    config.num_classes = 0
    outputs["features"], trace = channel_mamba(params, config, images, **options)
    for i, (residual, hidden) in enumerate(trace):
        outputs |= {f"block{i}_residual": residual, f"block{i}_hidden": hidden}
    return outputs


def channel_embed_outputs(golden: Golden) -> dict[str, np.ndarray]:
    """Return the patch embedding alone, with the channels that each sample names."""
    fields = model_fields(golden.kind, golden.kwargs)
    params = oracle_parameters({f"patch_embed.{k}": v for k, v in golden.state.items()})
    images, ids = channels_of(golden, double(golden.inputs)["x"].transpose(0, 2, 3, 1))
    patch, stride = (fields["patch_size"],) * 2, (fields.get("stride") or fields["patch_size"],) * 2
    tokens = embed_channels(params, images, ids, patch, stride)
    if fields.get("token_order", "row") == "column":
        tokens = tokens.swapaxes(1, 2)
    if fields.get("scan_order", "channel") == "spatial":
        tokens = tokens.transpose(0, 3, 1, 2, 4)
    return {"tokens": tokens.reshape(len(tokens), -1, tokens.shape[-1])}


def mixer_outputs(golden: Golden) -> dict[str, np.ndarray]:
    """Return one mixer with the inner values of both branches, laid out as in the fixture."""
    fields = mixer_fields(golden.kwargs)
    params = dict(convert_mixer(k, np.asarray(v, np.float64)) for k, v in golden.state.items())
    config = SimpleNamespace(**{**MAMBA_DEFAULTS, **fields})
    out, branches = mixer(
        params, config, golden.inputs["hidden"].astype(np.float64), rows_of(fields["grid"])
    )
    outputs = {"out": out}
    names = {
        "conv": "conv_silu",
        "u": "scan_u",
        "delta": "scan_delta",
        "B": "scan_B",
        "C": "scan_C",
        "y_scan": "scan_y",
    }
    for prefix, inner in zip(("fwd", "bwd"), branches.values(), strict=True):
        outputs |= {f"{prefix}_{name}": inner[ours].swapaxes(1, 2) for ours, name in names.items()}
        outputs[f"{prefix}_scan_A"] = inner["A"]
    return outputs


def function_outputs(golden: Golden) -> dict[str, np.ndarray]:
    """Return the functions that the oracle has."""
    x = double(golden.inputs)
    if golden.kind == "selective_scan":
        last_axis = lambda a: np.moveaxis(a, -1, 1)  # noqa: E731
        sequences = {k: last_axis(x[k]) for k in ("u", "delta", "B", "C", "z") if k in x}
        rest = {k: x[k] for k in ("A", "D", "delta_bias") if k in x}
        y, state = selective_scan(**sequences, **rest, **golden.kwargs)
        return {"y": y.swapaxes(1, 2), "last_state": state}
    if golden.kind == "causal_conv1d_silu":
        y = silu(causal_conv1d(x["x"].swapaxes(1, 2), x["weight"].T, x.get("bias")))
        return {"y": y.swapaxes(1, 2)}
    if golden.kind in ("add_rms_norm", "add_layer_norm"):
        total, eps = x["x"] + x["residual"], golden.kwargs["eps"]
        if golden.kind == "add_rms_norm":
            return {"normed": rms_norm(total, x["weight"], eps), "residual_out": total}
        return {"normed": layer_norm(total, x["weight"], x["bias"], eps), "residual_out": total}
    if golden.kind == "sincos_pos_embed":
        return {name: sincos_table(**spec) for name, spec in sincos_specs(golden).items()}
    return {name: resized(x[name][0], x[f"{name}_spec"]) for name in golden.outputs}


def resized(table: np.ndarray, spec: np.ndarray) -> np.ndarray:
    """Return one case of the resizing fixture: a column-major table is resized transposed, as its notes say."""
    source, target, column_major = tuple(spec[:2]), tuple(spec[2:4]), bool(spec[4])
    grid = table.reshape(*source, -1)
    if column_major:
        return (
            resize_bicubic(grid.transpose(1, 0, 2), target)
            .transpose(1, 0, 2)
            .reshape(1, -1, table.shape[-1])
        )
    return resize_bicubic(grid, target).reshape(1, -1, table.shape[-1])


def sincos_specs(golden: Golden) -> dict[str, dict]:
    """Read width, grid and class row of each table out of its name."""
    specs = {}
    for name in golden.outputs:
        width, grid, *class_row = name.split("_")
        side = int(grid[1:])
        specs[name] = {
            "grid": (side, side),
            "width": int(width[1:]),
            "class_token": class_row == ["cls"],
        }
    return specs


def masked_outputs(golden: Golden) -> dict[str, np.ndarray]:
    """Return what the oracle says of a masked autoencoder."""
    encoder, own = masked_fields(golden.kind, golden.kwargs)
    normalise, is_vit = own.pop("norm_pix_loss"), golden.kind == "ViTMAE"
    defaults = VIT_DEFAULTS if is_vit else MAMBA_DEFAULTS
    extra = {"divisor": "row_length", "reversal": "released", "vit": is_vit, "decoder_heads": 16}
    config = SimpleNamespace(**defaults | extra | encoder | own)
    inputs = double(golden.inputs)
    images, noise = inputs["x"].transpose(0, 2, 3, 1), inputs["noise"]
    kept = int(noise.shape[1] * (1 - golden.meta["mask_ratio"]))
    keep, restore, mask = random_masking(noise, kept, by_position=not is_vit)
    predicted, latents = masked_autoencoder(
        masked_parameters(golden.state), config, images, keep, stored_tables(golden)
    )
    patch = (config.patch_size,) * 2
    return {
        "pred": predicted,
        "latent": np.stack(latents),
        "loss": np.asarray(pixel_loss(images, predicted, mask, patch, normalise)),
        "mask": mask,
        "ids_restore": restore,
        "ids_keep": np.asarray(keep),
    }


def probe_head_outputs(golden: Golden) -> dict[str, np.ndarray]:
    """Compute batch norm without parameters, by the batch and by its running statistics, and a linear layer."""
    weight, bias = (np.asarray(golden.state[k], np.float64) for k in ("1.weight", "1.bias"))
    batches = golden.inputs["x"].astype(np.float64)
    mean, variance, outputs = np.zeros(weight.shape[1]), np.ones(weight.shape[1]), {}
    for i, x in enumerate(batches):
        outputs[f"train{i}"] = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6) @ weight.T + bias
        mean = 0.9 * mean + 0.1 * x.mean(0)
        variance = 0.9 * variance + 0.1 * x.var(0, ddof=1)
    outputs["eval"] = (batches[0] - mean) / np.sqrt(variance + 1e-6) @ weight.T + bias
    return outputs | {"running_mean": mean, "running_var": variance}


def masked_function_outputs(golden: Golden) -> dict[str, np.ndarray]:
    """Return the functions around masked autoencoders."""
    x = double(golden.inputs)
    if golden.kind == "mae_pixel_loss":
        images, side = x["x"].transpose(0, 2, 3, 1), golden.kwargs["patch_size"]
        rows, columns = golden.kwargs["grid"]
        pixels = x["pred"].reshape(-1, rows, columns, side, side, 3).transpose(0, 1, 3, 2, 4, 5)
        losses = {
            f"loss_{name}": np.asarray(
                pixel_loss(images, x["pred"], x["mask"], (side, side), name == "norm_pix")
            )
            for name in ("norm_pix", "raw")
        }
        unpatchified = pixels.reshape(len(images), rows * side, columns * side, 3)
        return {
            "patches": patchify(images, (side, side)),
            "unpatchified_pred": unpatchified.transpose(0, 3, 1, 2),
            **losses,
        }
    if golden.kind == "linear_probe_head":
        return probe_head_outputs(golden)
    if golden.kind == "random_masking":
        rows, columns = golden.kwargs["grid"]
        ids = np.arange(rows * columns)
        outputs = {"transpose_ids": (ids % columns) * rows + ids // columns}
        for ratio in golden.kwargs["mask_ratios"]:
            kept = int(x["noise"].shape[1] * (1 - ratio))
            keep, restore, mask = random_masking(x["noise"], kept)
            masked = np.stack([tokens[ids] for tokens, ids in zip(x["x"], keep, strict=True)])
            found = {
                "x_masked": masked,
                "mask": mask,
                "ids_restore": restore,
                "ids_keep": np.asarray(keep),
            }
            outputs |= {f"r{ratio}/{name}": value for name, value in found.items()}
        return outputs
    divisor = {"constant": "row_length", "true": "count"}[golden.kind.rpartition("_")[2]]
    sizes = golden.kwargs["rows"], golden.kwargs["cols"]
    pooled = {
        name: np.stack([
            row_sums(tokens.T, list(ids), *sizes, "mean", divisor).T
            for tokens, ids in zip(x[key], golden.inputs["row_ids"], strict=True)
        ])
        for name, key in (("pooled", "x"), ("pooled_flip", "x_flip"))
    }  # fmt: skip
    return pooled


ORACLE = {
    **dict.fromkeys(("FastMaskVimMAE", "VimMAE", "ViTMAE"), masked_outputs),
    **dict.fromkeys(
        (
            "mae_pixel_loss",
            "random_masking",
            "masked_row_means_constant",
            "masked_row_means_true",
            "linear_probe_head",
        ),
        masked_function_outputs,
    ),
    **dict.fromkeys(("FastVim", "FastVimBackbone", "Vim", "VimBackbone", "ViT"), model_outputs),
    **dict.fromkeys(CHANNEL_KINDS, channel_outputs),
    "ChannelPatchEmbed": channel_embed_outputs,
    "FastVimMixer": mixer_outputs,
    **dict.fromkeys(
        (
            "selective_scan",
            "causal_conv1d_silu",
            "add_rms_norm",
            "add_layer_norm",
            "pos_embed_resize",
        ),
        function_outputs,
    ),
    "sincos_pos_embed": function_outputs,
}
PATHS = [path for path in fixture_paths() if kind_of(path) in ORACLE]


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.skipif(not PATHS, reason="no golden numbers: set FASTVIM_PARITY_DIR")
@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_oracle_agrees_with_the_golden_outputs(path):
    golden = read(path)
    if golden.quirk:
        pytest.skip("a path of the reference that no released recipe uses")
    outputs = ORACLE[golden.kind](golden)
    for name, expected in golden.outputs.items():
        bound = {"block": BLOCKS}.get(name[:5], 1e-9)
        if golden.kind == "sincos_pos_embed":
            bound = 1e-5  # computed in float32, where another order of products moves the argument of the sine
        assert_close(outputs[name], expected, bound, f"{golden.name} {name}")

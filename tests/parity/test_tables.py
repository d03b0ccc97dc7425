"""The JSON tables: optimizer groups, names and shapes of the full-size models, moments of fresh parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.interop import to_torch_names
from fastvim_jax.layers.drop_path import drop_path_rates
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.config import VisionMambaConfig
from fastvim_jax.models.mae_config import MaskedAutoencoderConfig
from fastvim_jax.models.parameters import count_parameters, map_parameters
from fastvim_jax.models.presets import PRESETS
from fastvim_jax.models.registry import build_model
from fastvim_jax.training.optimizer import learning_rate_scales, weight_decay_mask
from tests.parity.arguments import fastvim_fields, masked_fields, model_fields, vim_fields
from tests.parity.compare import Comparison, close
from tests.parity.golden import TABLES, table_paths
from tests.support import x64

PRESET_NAMES = {
    "T": "tiny_patch16_224",
    "S": "small_patch16_224",
    "B": "base_patch16_224",
    "L": "large_patch16_224",
    "H": "huge_patch14_224",
    "S/16": "small_patch16_224",
    "S/8": "small_patch8_224",
}
CHANNELS = "models.channel_wise_tokenization.models_channel_mamba"
FAMILIES = {
    "models.fastvim.VisionMamba": "FastVim",
    "models.vim.VisionMamba": "Vim",
    "models.mae.models_mamba_faster_mae_vimdecoder.MaskedAutoencoderViM": "FastMaskVimMAE",
    "models.mae.fastvim_mae.MaskedAutoencoderViM": "VimMAE",
    f"{CHANNELS}.VisionMamba": "ChannelVim",
    f"{CHANNELS}_faster.VisionMamba": "FastChannelVim",
    f"{CHANNELS}_faster_2dcompress.VisionMamba": "FastChannelVim2DCompress",
}
MASKED_PRESETS = {"FastMaskVimMAE": "mae_fastvim", "VimMAE": "mae_vim"}


def config_of(family: str, kwargs: dict[str, Any]) -> VisionMambaConfig | MaskedAutoencoderConfig:
    """Return the config of a model from the authors' arguments."""
    if family in MASKED_PRESETS:
        encoder, own = masked_fields(family, kwargs)
        del own["norm_pix_loss"]
        return MaskedAutoencoderConfig(encoder=VisionMambaConfig(**encoder), **own)
    if "Channel" in family:
        return ChannelMambaConfig(**model_fields(family, kwargs))
    if family == "FastVim":
        return VisionMambaConfig(**fastvim_fields(kwargs))
    return VisionMambaConfig(**vim_fields(kwargs, class_token=True))


def abstract(config: VisionMambaConfig | MaskedAutoencoderConfig) -> nnx.Module:
    """Return the model's names and shapes without its values."""
    return nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))


def torch_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Return the authors' names and shapes of a model's parameters."""
    named = jax.eval_shape(lambda params: to_torch_names(model, params), nnx.state(model))
    return {name: tuple(value.shape) for name, value in named.items()}


def compare_architectures(table: dict[str, Any]) -> tuple[list[Comparison], list[str]]:
    """Compare names, shapes and counts of every FastVim and Vim; these are the registry's models."""
    comparisons, left_out = [], []
    for name, entry in table.items():
        if name == "_notes":
            continue
        family = FAMILIES.get(entry["authors_module"])
        if family is None:
            left_out.append(name)
            continue
        comparison = Comparison(f"architectures.json {name}", "architectures.json", "float32")
        config = config_of(family, entry["kwargs"])
        model = abstract(config)
        expected = {k: tuple(v) for k, v in entry["top_level"].items()}
        for key, shape in entry["per_layer"].items():
            decoder = key.startswith("decoder_blocks.")
            count = entry["decoder_blocks_count" if decoder else "layers_count"]
            expected |= {key.replace("{i}", str(i)): tuple(shape) for i in range(count)}
        tables = (
            {k for k in expected if k.endswith("pos_embed")}
            if entry["decoder_blocks_count"]
            else set()
        )
        for name_of_table in tables:  # fixed, and no parameters here
            del expected[name_of_table]
        shapes = torch_shapes(model)
        if shapes != expected:
            wrong = sorted(k for k in shapes.keys() | expected if shapes.get(k) != expected.get(k))
            comparison.problems.append(f"names or shapes differ: {wrong[:10]}")
        if len(shapes) + len(tables) != entry["state_dict_entries"]:
            comparison.problems.append(f"{len(shapes)} entries, not {entry['state_dict_entries']}")
        count = count_parameters(nnx.state(model))
        comparison.output("parameters", count, entry["parameters_trainable"], bound=0.0)
        size = name.partition("-")[2] if "Channel" in family else name.rpartition("-")[2]
        prefix = MASKED_PRESETS.get(family, family.lower())
        if size in PRESET_NAMES and PRESETS[f"{prefix}_{PRESET_NAMES[size]}"] != config:
            comparison.problems.append("the registered model has another config")
        comparisons.append(comparison)
    return comparisons, left_out


def optimizer_groups(
    config: VisionMambaConfig | MaskedAutoencoderConfig, groups: str, decay: float = 1.0
) -> dict[str, tuple[float, bool]]:
    """Return (learning-rate scale, decayed) of every parameter by the authors' name, from the training code's trees."""
    model = abstract(config)
    with x64():
        ones = map_parameters(lambda _, leaf: jnp.ones(leaf.shape, jnp.float64), nnx.state(model))
        scales = learning_rate_scales(ones, decay)
        mask = weight_decay_mask(ones, groups)
        scaled = to_torch_names(model, jax.tree.map(lambda one, s: one * s, ones, scales))
        decayed = to_torch_names(model, jax.tree.map(lambda one, m: one * m, ones, mask))
    first = {k: (np.asarray(v).flat[0], np.asarray(decayed[k]).flat[0]) for k, v in scaled.items()}
    return {k: (float(scale), bool(decays)) for k, (scale, decays) in first.items()}


def small(family: str, depth: int) -> VisionMambaConfig | MaskedAutoencoderConfig:
    """Return a model with every name of its family; widths do not matter here."""
    if "channel" in family:
        token = {"pooling": "none", "class_token": "middle"} if family == "channelvim" else {}
        return ChannelMambaConfig(image_size=32, embed_dim=8, depth=depth, num_classes=3, **token)
    token = {"pooling": "none", "class_token": "middle"} if family == "vim" else {}
    if family == "fastmaskvim":
        encoder = VisionMambaConfig(image_size=32, embed_dim=8, depth=depth, num_classes=0)
        return MaskedAutoencoderConfig(encoder=encoder, decoder_dim=8, decoder_depth=1)
    return VisionMambaConfig(image_size=32, embed_dim=8, depth=depth, num_classes=3, **token)


def compare_param_groups(table: dict[str, Any]) -> tuple[list[Comparison], list[str]]:
    """Compare layer-wise rates, decay groups and stochastic-depth rates."""
    comparison = Comparison("param_groups.json", "param_groups.json", "float64")
    left_out = []
    for name, rates in table["drop_path"].items():
        rate, depth = re.fullmatch(r"rate([\d.]+)_depth(\d+)", name).groups()
        ours = drop_path_rates(float(rate), int(depth))
        comparison.output(f"drop_path {name}", ours, rates["by_producing_block"])
        comparison.output(f"drop_path {name} last", ours[-1], rates["final"])
    for name, expected in table["layer_decay"].items():
        match = re.fullmatch(
            r"(fastvim|vim)(?:_clstoken)?_depth(\d+)_decay([\d.]+)(_scales)?", name
        )
        family, depth, decay, summary = match.groups()
        ours = optimizer_groups(small(family, int(depth)), "finetune", float(decay))
        if summary:
            compare_layer_summary(comparison, name, ours, expected)
            continue
        if ours.keys() != expected.keys():
            comparison.problems.append(f"{name}: other names {sorted(ours.keys() ^ expected)[:6]}")
            continue
        scales = [[ours[k][0], 0.05 * ours[k][1]] for k in expected]
        comparison.output(f"layer_decay {name}", scales, list(expected.values()))
    for name, expected in table["weight_decay"].items():
        match = re.fullmatch(r"(supervised|pretrain|cell)_(\w*vim)_depth(\d+)", name)
        if not match:
            left_out.append(f"weight_decay {name}")
            continue
        groups, family, depth = match.groups()
        ours = optimizer_groups(small(family, int(depth)), groups)
        for part, wanted in (("decayed", True), ("not_decayed", False)):
            names = sorted(k for k, (_, decayed) in ours.items() if decayed is wanted)
            if names != sorted(expected[part]):
                wrong = sorted(set(names) ^ set(expected[part]))
                comparison.problems.append(f"{name}: {part} differs in {wrong[:6]}")
    return [comparison], left_out


def compare_layer_summary(
    comparison: Comparison, name: str, ours: dict[str, tuple[float, bool]], expected: dict[str, Any]
) -> None:
    """Compare the short form: one factor per layer, and (factor, decay) or a factor for all outside the layers."""
    names = {"embed": "pos_embed", "head": "head.weight"}
    for key, value in expected.items():
        if key == "layers":
            factors = [ours[f"layers.{i}.mixer.in_proj.weight"][0] for i in range(len(value))]
            comparison.output(f"layer_decay {name} layers", factors, value)
            continue
        scale, decayed = ours[names.get(key, key)]
        actual = [scale, 0.05 * decayed] if isinstance(value, list) else scale
        comparison.output(f"layer_decay {name} {key}", actual, value)


def compare_init_stats(table: dict[str, Any]) -> tuple[list[Comparison], list[str]]:
    """Compare moments of fresh parameters, within six standard errors of the two samples."""
    comparisons, left_out = [], []
    for family, entry in table.items():
        if family == "_notes":
            continue
        if family not in FAMILIES.values():
            left_out.append(family)
            continue
        comparison = Comparison(f"init_stats.json {family}", "init_stats.json", "float32")
        model = build_model(config_of(family, entry["kwargs"]), rngs=nnx.Rngs(0))
        state = {k: np.asarray(v) for k, v in to_torch_names(model, nnx.state(model)).items()}
        entry["parameters"] = {
            k: v for k, v in entry["parameters"].items()
            if family not in MASKED_PRESETS or not k.endswith("pos_embed")
        }  # fmt: skip
        pooled: dict[str, list[np.ndarray]] = {}
        for name, value in state.items():
            pooled.setdefault(re.sub(r"\.\d+\.", ".{i}.", name), []).append(value)
        if pooled.keys() != entry["parameters"].keys():
            wrong = sorted(pooled.keys() ^ entry["parameters"].keys())
            comparison.problems.append(f"other names: {wrong}")
        for name in pooled.keys() & entry["parameters"].keys():
            compare_moments(comparison, name, np.stack(pooled[name]), entry["parameters"][name])
        comparisons.append(comparison)
    return comparisons, left_out


def compare_moments(
    comparison: Comparison, name: str, ours: np.ndarray, stats: dict[str, Any]
) -> None:
    """Compare mean, standard deviation and range of one parameter; the table is rounded to six digits."""
    count, std = stats["samples"], stats["std"]
    low, high = stats["min"], stats["max"]
    if abs(min(low, high, key=lambda v: -abs(v))) > 10 * std > 0:
        # One draw in a few million lies at the far truncation point of the reference; take it out of its moments.
        outlier = low if abs(low) > abs(high) else high
        std = np.sqrt(max(std**2 - outlier**2 / count, 0.0))
        low, high = (-abs(high), high) if outlier == low else (low, abs(low))
    error = 6 * np.sqrt(1 / count + 1 / ours.size)
    tests = {
        "mean": (ours.mean() - stats["mean"], error * std + 2e-6),
        "std": (ours.std() - std, error * std + 2e-6),
    }
    if std == 0.0 or abs(high - low) < 5.0 * std:  # bounded distributions fill the same interval
        spread = high - low
        slack = spread * (20 / min(count, ours.size)) + 2e-6
        if ours.size > 100 or std == 0.0:
            tests |= {"min": (ours.min() - low, slack), "max": (ours.max() - high, slack)}
    for moment, (difference, allowed) in tests.items():
        if abs(difference) > allowed:
            comparison.problems.append(
                f"{name}: {moment} off by {difference:.1e}, allowed {allowed:.1e}"
            )
    comparison.errors["output"][name] = 0.0


COMPARE: dict[str, Callable[[dict[str, Any]], tuple[list[Comparison], list[str]]]] = {
    "architectures": compare_architectures,
    "param_groups": compare_param_groups,
    "init_stats": compare_init_stats,
}
PATHS = [path for path in table_paths() if path.stem in TABLES]


@pytest.mark.drawn
@pytest.mark.skipif(not PATHS, reason="no golden numbers here: set FASTVIM_PARITY_DIR")
@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_table(path: Path, record_property: Any) -> None:
    comparisons, left_out = COMPARE[path.stem](json.loads(path.read_text()))
    if left_out:
        line = f"  not yet covered in {path.name}: {', '.join(left_out)}"
        record_property("parity", {"lines": [line]})
    close(comparisons, record_property)

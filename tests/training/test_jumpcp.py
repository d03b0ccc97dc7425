"""The experiments on cells: each follows the recipe, and differs from its base in what its row of the table names."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from fastvim_jax.training import experiment_docs, list_experiments, load_experiment

NAMES = [name for name in list_experiments() if name.startswith("jumpcp/")]
PAPER = {  # Tables 3 and 19 to 21, top-1 %
    "vit_small_16": 58.9, "vim_small_16": 61.0, "channelvit_small_16": 68.6, "channelvim_small_16": 73.5,
    "fastchannelvim_small_16": 73.6, "vit_small_8": 67.6, "vim_small_8": 66.4, "channelvit_small_8": 74.8,
    "channelvim_small_8": 83.0, "fastchannelvim_small_8": 83.1, "channelvim_small_16_unsorted": 69.4,
    "channelvim_small_16_spatial": 65.9, "channelvim_small_16_spatial_unsorted": 67.9,
    "fastchannelvim_small_16_max": 72.9, "fastchannelvim_small_16_attention": 73.1,
    "fastchannelvim_small_8_max": 85.0, "fastchannelvim_small_8_attention": 85.8,
    "fastchannelvim_small_16_two_axes": 74.3, "fastchannelvim_small_16_two_axes_max": 73.5,
    "fastchannelvim_small_8_two_axes": 78.4, "fastchannelvim_small_8_two_axes_max": 84.0,
}  # fmt: skip


def test_every_row_of_the_tables_has_its_experiment() -> None:
    assert {name.partition("/")[2] for name in NAMES} == PAPER.keys()


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_follows_the_recipe_and_its_row(name: str) -> None:
    row = name.partition("/")[2]
    config, model = load_experiment(name), load_experiment(name).model
    assert f"{PAPER[row]} % top-1 on JUMP-CP" in experiment_docs(name)
    family, size = row.split("_")[0], row.split("_")[2]
    assert model.patch_size == (int(size), int(size)) and model.embed_dim == 384
    assert (model.channels, model.num_classes, model.drop_path) == (8, 161, 0.05)
    assert model.depth == (12 if "vit" in family else 24)
    pooling = "max" if "max" in row else "attention" if "attention" in row else "mean"
    if family == "fastchannelvim":
        assert model.pooling == pooling
        assert model.pool_axes == ("two_axes" if "two_axes" in row else "alternate")
    if "vim" in family and "channel" in family:
        assert model.scan_order == ("spatial" if "spatial" in row else "channel")
    sampling = "none" if family in ("vim", "vit") else "unsorted" if "unsorted" in row else "sorted"
    assert config.data.channel_sampling == sampling
    assert (config.data.batch_size, config.epochs, config.label_smoothing) == (256, 100, 0.0)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.learning_rate_scaling) == (1e-3, "linear")
    assert (optimizer.weight_decay, optimizer.weight_decay_end) == (0.04, 0.4)
    assert (optimizer.warmup_epochs, optimizer.warmup_start) == (10, 0.0)
    assert (optimizer.final_learning_rate, optimizer.decay_groups) == (1e-6, "cell")
    base = re.sub(r"^\w+?_small_(\d+).*", r"jumpcp/fastchannelvim_small_\1", row)
    other = load_experiment(base)
    same = {f.name for f in fields(config)} - {"model", "data"}
    assert all(getattr(config, field) == getattr(other, field) for field in same)

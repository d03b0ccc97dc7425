"""The bench of prediction keeps its rates and says which part limits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from flax import nnx

from fastvim_jax.bench.predict import limit
from fastvim_jax.cli.main import main
from fastvim_jax.models import VisionMambaConfig, build_model
from fastvim_jax.models.saving import save_pretrained


@pytest.mark.parametrize(
    ("decoding", "model", "whole", "expected"),
    [
        (100.0, 900.0, 95.0, "decoding"),
        (900.0, 100.0, 91.0, "model"),
        (900.0, 100.0, 89.0, "sharing"),
    ],
)
def test_the_slower_part_limits_unless_the_whole_is_slower_still(decoding, model, whole, expected):
    assert limit(decoding, model, whole) == expected


@pytest.mark.drawn("more of the models", one_in=6)
def test_rates_from_files_and_from_memory_are_kept(tmp_path: Path, rng, capsys) -> None:
    config = VisionMambaConfig(image_size=16, patch_size=8, embed_dim=8, depth=1, num_classes=3)
    save_pretrained(build_model(config, rngs=nnx.Rngs(0)), tmp_path / "model")
    for i in range(3):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    command = ["bench", "predict", str(tmp_path / "model"), *map(str, tmp_path.glob("*.png"))]
    options = ["--batch-size", "2", "--images", "7", "--repeats", "1"]
    assert main([*command, *options, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["images_from"] for row in rows] == ["memory", "files"]
    for row in rows:
        assert row["images"] == 8  # whole batches
        assert row["of_model"] == pytest.approx(row["whole_per_s"] / row["model_per_s"])
        rates = (row["decoding_per_s"], row["model_per_s"], row["whole_per_s"])
        assert row["limit"] == limit(*rates)

    assert main([*command, *options, "--workers", "0"]) == 0
    assert main([*command, *options, "--workers", "-1"]) != 0
    assert "--workers must not be negative" in capsys.readouterr().err

    (tmp_path / "0.png").write_bytes(b"no image")
    assert main([*command, *options]) != 0
    assert "0.png" in capsys.readouterr().err

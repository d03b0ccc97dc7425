"""The data benchmark measures what it says, on any source; and says why where it cannot."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.bench.data import measure
from fastvim_jax.cli.bench.data import data
from fastvim_jax.data import ClassificationData


@pytest.fixture
def photos(tmp_path: Path, rng: np.random.Generator) -> Path:
    folder = tmp_path / "photos" / "train" / "a"
    folder.mkdir(parents=True)
    for i in range(16):
        pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 50)).save(folder / f"{i}.jpg")
    return tmp_path / "photos"


def test_rows_are_complete(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else found(name)
    )
    config = ClassificationData(
        source="image_folder", path=str(photos), image_size=16, batch_size=8
    )
    rows = list(measure(config, seconds=0.05))
    for decoder in ("turbo", "pillow") if found("cykooz_resizer") else ("pillow",):
        ours = {row["what"]: row for row in rows if row["with"] == decoder}
        assert {"read", "decode", "decode, crop and resize", "whole"} <= set(ours)
        for row in ours.values():
            if "milliseconds" in row:
                assert row["per_core"] == pytest.approx(1e3 / row["milliseconds"])
                assert 0 < row["milliseconds"] < 1e3
        # A stage is a part of the whole.
        assert ours["whole"]["milliseconds"] > ours["read"]["milliseconds"]
    assert "torch" in rows[-1]["skipped"] and rows[-1]["skipped"].endswith("not installed")


def test_the_command(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else found(name)
    )
    kept = tmp_path / "rows.json"
    status = data([str(photos), "--image-size", "16", "--batch-size", "8", "--seconds", "0.02",
                   "--json", str(kept)])  # fmt: skip
    out = capsys.readouterr().out
    assert (
        status == 0
        and "decode, crop and resize" in out
        and "skipped: PyTorch DataLoader, pillow: torch" in out
    )
    record = json.loads(kept.read_text())
    assert record["bench"] == "data" and "bench data" in record["circumstances"]["command"]
    assert len(record["rows"]) > 8

"""The Python code of docs/cells.md and docs/dense.md: what their readers copy works with the code as it is."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.data.sources.channel_files import split_pattern
from fastvim_jax.models import build_model
from fastvim_jax.models.detection import DetectorConfig
from tests.support import ROOT, data_dir


def code_of(page: str) -> list[str]:
    """Return the Python code of a page, block by block."""
    text = (ROOT / "docs" / page).read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_code_on_cells_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a model with channel ids; cut the real fields into crops; build the run that is trained on them."""
    model, crops, run = code_of("cells.md")
    names: dict = {}
    exec(compile(model, "docs/cells.md", "exec"), names)
    assert names["features"].shape == (2, 192) and np.isfinite(names["features"]).all()
    exec(compile(run, "docs/cells.md", "exec"), names)
    config = names["config"]
    assert config.data.names == ("DAPI", "GFP", "RFP") and config.model.channels == 3
    if data_dir() is None:
        pytest.skip("no cell fields here: set FASTVIM_DATA_DIR")
    monkeypatch.setenv("FASTVIM_DATA_DIR", str(data_dir()))
    monkeypatch.chdir(tmp_path)
    exec(compile(crops, "docs/cells.md", "exec"), names)
    counts = [len(list((tmp_path / "crops" / s).glob("*/*.npy"))) for s in ("train", "val")]
    assert counts == [840, 224]


def test_the_code_on_dense_tasks_builds_its_models() -> None:
    segmentation, _, detection = code_of("dense.md")
    names: dict = {}
    exec(compile(segmentation, "docs/dense.md", "exec"), names)
    assert names["config"].model.num_classes == 12
    build = "model = build_model("
    assert detection.count(build) == 1
    names["shapes_of"] = shapes_of
    shapes_only = detection.replace(build, "shapes = shapes_of(")
    exec(compile(shapes_only, "docs/dense.md", "exec"), names)
    assert len(names["mask_rcnn"].stages) == 1 and not names["faster_rcnn"].masks


def shapes_of(config: DetectorConfig, *, rngs: nnx.Rngs) -> nnx.State:
    """Return the shapes of a model's parameters, instead of drawing 66 million numbers."""
    shapes = nnx.state(nnx.eval_shape(lambda rngs: build_model(config, rngs=rngs), rngs))
    assert len(jax.tree.leaves(shapes)) > 100
    return shapes


def test_a_pattern_on_the_page_is_one() -> None:
    text = (ROOT / "docs" / "cells.md").read_text()
    patterns = set(re.findall(r"'(fields/[^']*)'", text))
    assert {split_pattern(pattern)[0] for pattern in patterns} == {"fields"}

"""Where the fused GPU kernels run: the presets' fallbacks, as docs/gpus.md lists them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from fastvim_jax.analysis import coverage
from fastvim_jax.errors import UserError
from fastvim_jax.models import create_model, model_config
from tests.pallas_kernels.mosaic_support import abstract_h100, needs_mosaic

PAGE = Path(__file__).parents[2] / "docs/gpus.md"
RECORDS = Path(__file__).parents[2] / "benchmarks/results/h200"


TABLE = """
from fastvim_jax.analysis import coverage
from fastvim_jax.models import list_models
print(coverage.fallback_table(coverage.preset_coverage(list_models())))
"""


@pytest.mark.drawn("whole models lowered")
@needs_mosaic
def test_the_page_lists_the_fallbacks_of_all_presets():
    """Compare the page with the table, which a process of its own computes.

    There no annotation is checked, which takes a third of the time.
    """
    run = subprocess.run([sys.executable, "-c", TABLE], capture_output=True, text=True, check=True)
    assert run.stdout.count("fastvim_base_patch16_224") == 2
    assert run.stdout in PAGE.read_text(), f"docs/gpus.md should hold:\n{run.stdout}"


def test_the_page_has_the_recorded_costs():
    costs: dict[str, list[float]] = {}
    for record in sorted(RECORDS.glob("fallbacks_*.json")):
        for row in json.loads(record.read_text())["rows"]:
            title = row["title"] + (", masked" if row["model"].startswith("mae_") else "")
            costs.setdefault(title, []).append(row["cost"])
    assert len(costs) == 6
    for title, found in costs.items():
        bounds = sorted({f"{min(found):.1f}", f"{max(found):.1f}"})
        assert f"| {title} | {' to '.join(bounds)} × |" in PAGE.read_text()


@needs_mosaic
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"class_token": "middle"}, "a class token"),
        ({"pooling": "attention"}, "pooling by attention"),
        ({"conv_width": 0}, "conv_width=0"),
        ({"embed_dim": 24}, "48 channels are not made of whole blocks of 128"),
    ],
)
def test_options_that_fall_back(options, reason):
    config = model_config("fastvim_tiny_patch16_224", **options)
    assert coverage.coverage(config, [224]).fallbacks == {reason: (224,)}


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
@pytest.mark.parametrize(("size", "fused"), [(64, True), (592, True), (32, False)])
def test_it_is_what_a_model_does(size, fused):
    """Find the fused kernels in a model lowered for an H100 exactly where the table says so."""
    name, options = "fastvim_tiny_patch16_224", {"depth": 2, "embed_dim": 64}
    config = model_config(name, **options)
    assert (coverage.coverage(config, [size]).fused == (size,)) == fused
    model = nnx.eval_shape(lambda: create_model(name, **options, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
    run = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))
    with abstract_h100():
        text = run.trace(params, images).lower(lowering_platforms=("cuda",)).as_text()
    assert ("mixer_front" in text or "front_mosaic" in text) == fused


def test_a_vit_has_no_mixers():
    with pytest.raises(UserError, match="a ViT has no mixers"):
        coverage.coverage(model_config("vit_tiny_patch16_224"), [224])

"""The numbers behind the documentation's figures, against something independent; and every figure becomes a PNG."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fastvim_jax.analysis.figures import FIGURES, Inputs, draw_figure, receptive_field, selection
from fastvim_jax.analysis.figures.costs import gmacs_lines, steps_lines
from fastvim_jax.analysis.figures.receptive_field import KINDS, receptive_fields
from fastvim_jax.analysis.figures.selection import selection_of
from fastvim_jax.analysis.figures.speed import read_rows, stage_times, throughput_lines
from fastvim_jax.cli.main import main
from fastvim_jax.errors import UserError
from fastvim_jax.layers import direction as direction_module
from fastvim_jax.models import VisionMambaConfig, build_model
from tests.support import assert_close, x64


def test_lines_of_the_costs_at_known_points() -> None:
    lines = gmacs_lines("tiny", (224, 2048))
    assert lines["fastvim_tiny_patch16_224"][0] == pytest.approx(1.17, rel=0.05)  # the paper's
    assert lines["vim_tiny_patch16_224"][0] == pytest.approx(1.8, rel=0.05)
    growth = {name: line[1] / line[0] for name, line in lines.items()}
    more_patches = (128 / 14) ** 2
    assert growth["fastvim_tiny_patch16_224"] < more_patches < growth["vit_tiny_patch16_224"] / 5
    steps = steps_lines((224, 512, 2048))
    assert steps["fastvim_tiny_patch16_224", "sequential"] == [14, 32, 128]
    assert steps["vim_tiny_patch16_224", "sequential"] == [14**2 + 1, 32**2 + 1, 128**2 + 1]
    for (name, kind), line in steps.items():
        if kind == "parallel":
            sequential = steps[name, "sequential"]
            assert line == [math.ceil(math.log2(s)) for s in sequential]


def record(folder: Path, name: str, bench: str, date: str, rows: list[dict]) -> None:
    about = {"device": "NVIDIA H100", "date": date}
    content = {"bench": bench, "circumstances": about, "complete": True, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def records(tmp_path: Path) -> Path:
    row = {"model": "fastvim_tiny_patch16_224", "precision": "bf16", "batch": 10}
    record(
        tmp_path,
        "a",
        "model",
        "2026-02-01",
        [
            row | {"pixels": 512, "device_ms": 5.0},  # 2,000 images/s
            row | {"pixels": 224, "device_ms": 4.0},  # 2,500
            row | {"pixels": 224, "device_ms": 2.0, "blocks": "scan"},  # 5,000
            row | {"pixels": 224, "device_ms": 1.0, "correct": False},
            row | {"pixels": 1024, "failed": "out of memory"},
            row | {"pixels": 224, "model": "vim_tiny_patch16_224", "images_per_s": 700.0},
        ],
    )
    stage = {"pixels": 224, "batch": 128, "model": "fastvim", "gradient": False}
    rows = [stage | {"part": p, "median": m} for p, m in (("scan", 3.0), ("skip", 1.0))]
    record(
        tmp_path, "new", "mixer", "2026-03-01", [*rows, stage | {"part": "total", "median": 2.0}]
    )
    old = [stage | {"part": "scan", "median": 9.0}, stage | {"part": "core", "median": 1.0}]
    record(tmp_path, "old", "mixer", "2026-01-01", old)
    (tmp_path / "other.json").write_text("[]")
    return tmp_path


def test_records_give_the_best_throughput_and_the_latest_stages(records: Path) -> None:
    lines = throughput_lines(read_rows(records, "model"))
    assert lines == {
        ("fastvim_tiny_patch16_224", "bf16"): {224: 5000.0, 512: 2000.0},
        ("vim_tiny_patch16_224", "bf16"): {224: 700.0},
    }
    times = stage_times(read_rows(records, "mixer"))
    assert times == {224: {"fastvim": {"scan": 3.0, "skip": 1.0, "total": 2.0}}}
    with pytest.raises(UserError, match="no record of `fastvim bench train`"):
        read_rows(records, "train")
    with pytest.raises(UserError, match="no record"):
        read_rows(None, "model")
    (records / "broken.json").write_text('{"bench": ')
    with pytest.raises(UserError, match=r"broken\.json is no record"):
        read_rows(records, "model")


def small(**options: object) -> VisionMambaConfig:
    sizes = {"image_size": (6, 10), "patch_size": 2, "channels": 1, "embed_dim": 8, "depth": 2}
    return VisionMambaConfig(**{"num_classes": 0, "state_size": 4, **sizes, **options})


@pytest.mark.drawn("more of the models", one_in=6)
def test_the_receptive_field_is_the_central_difference_of_the_centre_token() -> None:
    with x64():
        config = small(dtype="float64", param_dtype="float64")
        field = receptive_fields(config, (2,), images=1, directions=1, seed=3)[0]
        # The same draws as documented: parameters from the seed, input and direction from the next one.
        model = build_model(config, rngs=3)
        pixels_key, directions_key = jax.random.split(jax.random.key(4))
        image = jax.random.normal(pixels_key, (1, 6, 10, 1))
        v = jax.random.normal(directions_key, (1, 1, 8))[0, 0]
        steps = 1e-5 * jnp.eye(60).reshape(60, 6, 10, 1)
        batch = jnp.concatenate([image + steps, image - steps])
        tokens, grid = model.embed(batch)
        centre = model.encode(tokens, model.poolings(grid))[0][:, 7] @ v
        slopes = np.asarray(jnp.abs(centre[:60] - centre[60:]) / 2e-5)
    expected = slopes.reshape(3, 2, 5, 2).mean((1, 3))
    assert_close(field, expected, 1e-6)


@pytest.mark.drawn
@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_the_selection_is_what_the_scan_is_given(
    pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(small(pooling=pooling, blocks="unroll"), rngs=5)
    image = jax.random.normal(jax.random.key(6), (6, 10, 1))
    found = selection_of(model, image, block=1)
    given = []
    scan = direction_module.selective_scan

    def spy(u, delta, A, B, C, **options):
        given.append((u, jax.nn.softplus(delta + options["delta_bias"]), B, C))
        return scan(u, delta, A, B, C, **options)

    monkeypatch.setattr(direction_module, "selective_scan", spy)
    model(image[None])
    _, delta, B, C = given[2]  # Two scans a block; the forward one comes first.
    sizes = (delta.mean(-1), jnp.linalg.norm(B, axis=-1), jnp.linalg.norm(C, axis=-1))
    for values, size in zip((found.delta, found.B, found.C), sizes, strict=True):
        if pooling == "mean":  # The second block pools the rows' axis: one step per column.
            assert values.shape == (3, 5)
            assert_close(values, np.tile(size[0], (3, 1)), 1e-5)
        else:
            assert_close(values, np.asarray(size).reshape(3, 5), 1e-5)
    patches = image.reshape(3, 2, 5, 2, 1).mean((1, 3))
    expected = np.tile(patches.mean(0), (3, 1, 1)) if pooling == "mean" else patches
    assert_close(found.colours, np.asarray(expected), 1e-5)


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_becomes_a_png(
    name: str, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    monkeypatch.setattr(
        receptive_field,
        "receptive_fields",
        lambda config: random.uniform(1e-8, 1, (4, *config.grid)),
    )
    model = build_model(
        VisionMambaConfig(image_size=64, patch_size=64, embed_dim=8, depth=2, num_classes=0), rngs=0
    )
    file = tmp_path / "new folder" / f"{name}.png"
    draw_figure(name, file, Inputs(records=records, model=model))
    with Image.open(file) as drawn:
        assert drawn.format == "PNG" and min(drawn.size) > 300
        assert len(np.unique(np.asarray(drawn.convert("L")))) > 20


def test_a_runs_images_are_normalised_as_in_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        selection,
        "selection_of",
        lambda model, image, block: seen.append(image) or spied(model, image, block),
    )
    spied = selection_of
    config = VisionMambaConfig(image_size=64, patch_size=64, embed_dim=8, depth=1, num_classes=0)
    model = build_model(config, rngs=0)
    photograph = tmp_path / "white.png"
    Image.new("RGB", (400, 400), "white").save(photograph)
    inputs = Inputs(image=photograph, model=model, mean=(0.5, 0.0, 0.2), std=(0.5, 2.0, 0.4))
    draw_figure("selection", tmp_path / "x.png", inputs)
    assert_close(np.asarray(seen[0][0, 0]), np.array([1.0, 0.5, 2.0]), 1e-6)


def test_selection_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without a class token"):
        draw_figure("selection", tmp_path / "x.png", Inputs(model=object()))
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    with pytest.raises(UserError, match=r"text\.jpg cannot be read as an image"):
        draw_figure("selection", tmp_path / "x.png", Inputs(image=text))
    os.mkfifo(tmp_path / "fifo.png")
    with pytest.raises(UserError, match=r"there is no such file"):
        draw_figure("selection", tmp_path / "x.png", Inputs(image=tmp_path / "fifo.png"))


@pytest.mark.parametrize(
    "text",
    [
        '{"bench": "model"}',
        '{"bench": "model", "circumstances": {"date": 3, "device": ""}, "rows": [1]}',
        "[",
    ],
)
def test_a_record_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json is no record of a benchmark"):
        read_rows(tmp_path, "model")


def test_the_command(tmp_path: Path, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(FIGURES)
    out = tmp_path / "speed.png"
    assert main(["plot", "throughput", "--records", str(records), "--out", str(out)]) == 0
    assert out.stat().st_size > 1000 and str(out) in capsys.readouterr().out
    own = tmp_path / "own.png"
    assert main(["plot", "throughput", "--card", "h200", "--out", str(own)]) == 0
    assert own.stat().st_size > 1000
    for wrong, said in (
        (["plot"], "name a figure"),
        (["plot", "throughput", "--card", "h300"], "h200"),
        (["plot", "gmac"], "Did you mean 'gmacs'"),
        (["plot", "stages", "--records", "nowhere"], "--records nowhere is no folder"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err
    taken = tmp_path / "a file"
    taken.write_text("")
    assert main(["plot", "gmacs", "--out", str(taken / "x.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.slow
def test_alternation_reaches_both_axes() -> None:
    """Compare pooling along one axis, which leaves the other one narrow, with alternation, which widens both."""
    after = (2,)
    spread = {}
    for kind in ("alternating", "only columns", "only rows"):
        config = small(image_size=14, conv_width=0, expand=1, **KINDS[kind])
        field = receptive_fields(config, after, images=8, directions=2)[0]
        centre = field[3, 3]
        across, along = (
            np.delete(field[3], 3).mean() / centre,
            np.delete(field[:, 3], 3).mean() / centre,
        )
        spread[kind] = (across, along)
    assert spread["only columns"][0] > 3 * spread["only columns"][1]
    assert spread["only rows"][1] > 3 * spread["only rows"][0]
    assert min(spread["alternating"]) > 2 * max(spread["only columns"][1], spread["only rows"][0])

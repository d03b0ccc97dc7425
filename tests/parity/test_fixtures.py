"""Every golden file: one test each, dispatched on its class and constructor arguments."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from tests.parity.channel_embed import compare_channel_embed
from tests.parity.channels import CHANNEL_KINDS
from tests.parity.compare import ASKED, Comparison, close, in_all_modes, modes_of
from tests.parity.functions import FUNCTIONS, compare_function, compare_sincos
from tests.parity.golden import (
    COVERED,
    TABLES,
    Golden,
    draw_gradients,
    draw_representatives,
    fixture_paths,
    folder,
    kind_of,
    read,
    table_paths,
)
from tests.parity.known import KNOWN
from tests.parity.masked import (
    compare_masked,
    compare_masking,
    compare_pixel_loss,
    compare_probe_head,
)
from tests.parity.models import compare_mixer, compare_model
from tests.parity.training import compare_schedules, compare_train_steps

KINDS = {path: kind_of(path) for path in fixture_paths()}
PATHS = [path for path, kind in KINDS.items() if kind in COVERED]
SEED = int(os.environ["FASTVIM_TEST_SEED"])
REPRESENTATIVES = sorted(draw_representatives(PATHS, SEED))
MASKED = {"FastMaskVimMAE", "VimMAE", "ViTMAE"}
MODELS = {"FastVim", "FastVimBackbone", "Vim", "VimBackbone", "ViT", *CHANNEL_KINDS}
MODULES = {"ChannelPatchEmbed", "FastVimMixer"}
OF_CLASSES = MODELS | MASKED | MODULES
# Each run compares a tenth of the known fixtures of each class of models, rounded up, and gradients of half of them.
# A third of the fixtures meet a further mode: which one and when, the seed decides for each by itself.
TURNS = {
    path.stem: draw // 3
    for path in PATHS
    if KINDS[path] in OF_CLASSES and (draw := crc32(f"{SEED} {path.stem}".encode())) % 3 == 0
}
BACKWARDS = draw_gradients({path: KINDS[path] for path in PATHS}, SEED)
COMPARED = PATHS
ON_OTHER_SET = os.environ.get("FASTVIM_PARITY_FIXTURES") == "representatives"
if ON_OTHER_SET:
    # Of every fourth class of models, others in each run, and of all functions.
    of_classes = [p.stem for p in PATHS if KINDS[p] in OF_CLASSES and p.stem in REPRESENTATIVES]
    kept = of_classes[SEED // 7919 % 4 :: 4]
    COMPARED = [
        p
        for p in PATHS
        if p.stem in kept or (p.stem in REPRESENTATIVES and p.stem not in of_classes)
    ]


def marks(path: Path) -> tuple[pytest.MarkDecorator, ...]:
    """Draw known fixtures of models within their class, unless the environment says which to compare."""
    if ASKED or ON_OTHER_SET or path.stem not in KNOWN or KINDS[path] not in OF_CLASSES:
        return ()
    return (pytest.mark.drawn(f"golden {KINDS[path]}"),)


def comparisons(golden: Golden) -> list[Comparison]:
    """Compare one fixture: models in the modes of `modes_of`, functions in the two dtypes that their bounds are for."""
    modes = modes_of(golden.name, TURNS.get(golden.name))
    dtypes = dict.fromkeys(dtype for dtype, _ in modes)
    drawn = golden.name in BACKWARDS or in_all_modes(golden.name) or bool(ASKED)
    if golden.kind in MODELS:
        return [compare_model(golden, dtype, blocks, gradients=drawn) for dtype, blocks in modes]
    if golden.kind in MASKED:
        return [compare_masked(golden, dtype) for dtype in dtypes]
    if golden.kind == "mae_pixel_loss":
        return [compare_pixel_loss(golden, dtype) for dtype in ("float64", "float32")]
    if golden.kind == "linear_probe_head":
        return [compare_probe_head(golden, dtype) for dtype in ("float64", "float32")]
    if golden.kind == "ChannelPatchEmbed":
        return [compare_channel_embed(golden, dtype) for dtype in dtypes]
    if golden.kind == "FastVimMixer":
        return [compare_mixer(golden, dtype) for dtype in dtypes]
    if golden.kind == "FastVimTrainSteps":
        ways = ("scan", "unroll")
        ways = ways if in_all_modes(golden.name) else ways[SEED % 2 :][:1]
        return [compare_train_steps(golden, blocks) for blocks in ways]
    if golden.kind in FUNCTIONS:
        return [compare_function(golden, dtype) for dtype in ("float64", "float32")]
    single = {
        "schedules": compare_schedules,
        "sincos_pos_embed": compare_sincos,
        "random_masking": compare_masking,
    }
    return [single[golden.kind](golden)]


@pytest.mark.skipif(not KINDS, reason="no golden numbers here: set FASTVIM_PARITY_DIR")
@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=marks(path)) for path in COMPARED]
)
def test_golden_numbers(path: Path, record_property: Any) -> None:
    golden = read(path)
    if golden.quirk:
        pytest.skip("documents a path of the reference that no released recipe uses")
    close(comparisons(golden), record_property)


def test_every_golden_file_is_compared(record_property: Any) -> None:
    """Check that every golden file is compared, except quirks of the reference, which are listed."""
    if folder() is None:
        line = "parity: nothing compared, there are no golden numbers (set FASTVIM_PARITY_DIR)"
        record_property("parity", {"lines": [line]})
        pytest.skip("no golden numbers here: set FASTVIM_PARITY_DIR")
    quirks = [path.stem for path in PATHS if read(path).quirk]
    lines = [f"  not compared, quirks of the reference: {', '.join(quirks)}"] if quirks else []
    record_property("parity", {"lines": lines})
    assert not {path.name: kind for path, kind in KINDS.items() if kind not in COVERED}
    assert not {path.stem for path in table_paths()} - TABLES
    index = folder() / "index.json"
    if index.exists():
        listed = {entry["file"] for entry in json.loads(index.read_text())}
        present = {path.name for path in [*KINDS, *table_paths()]}
        missing = {name for name in listed - present if name != index.name}
        assert not missing, f"listed in index.json but not there: {sorted(missing)}"

"""The comparison can fail: one entry moved by a thousandth, an unknown argument, a missing array."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.parity.arguments import UnknownArgumentError, model_fields
from tests.parity.compare import BOUNDS, Comparison, close
from tests.parity.golden import COVERED, Golden, draw_gradients, fixture_paths, kind_of, read
from tests.parity.models import compare_mixer

ARRAYS = {"outputs": "out", "grads": "in_proj.weight"}


def mixers() -> list[Golden]:
    """Return the smallest fixture with outputs and gradients, if there are golden numbers."""
    return [read(path) for path in fixture_paths() if kind_of(path) == "FastVimMixer"][:1]


def moved(golden: Golden, part: str, seed: int) -> Golden:
    """Return the fixture with one entry of one array moved by 1e-3 of the array's largest."""
    name = ARRAYS[part]
    array = getattr(golden, part)[name].astype(np.float64)
    array.flat[np.random.default_rng(seed).integers(array.size)] += 1e-3 * np.abs(array).max()
    return dataclasses.replace(golden, **{part: getattr(golden, part) | {name: array}})


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.parametrize("golden", mixers() or [None], ids=lambda g: g.name if g else "none")
def test_one_entry_off_by_a_thousandth_is_seen(golden: Golden | None, seed: int) -> None:
    if golden is None:
        pytest.skip("no golden numbers here: set FASTVIM_PARITY_DIR")
    ignore = lambda *_: None  # noqa: E731
    close([compare_mixer(golden, "float32")], ignore)
    for part, name in ARRAYS.items():
        with pytest.raises(AssertionError, match=f"{name}: off by"):
            close([compare_mixer(moved(golden, part, seed), "float32")], ignore)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("what", ["output", "grad"])
def test_bounds_lie_below_a_thousandth(dtype: str, what: str, rng: np.random.Generator) -> None:
    expected = rng.standard_normal((4, 5))
    actual = expected.copy()
    actual.flat[rng.integers(expected.size)] += 1e-3 * np.abs(expected).max()
    comparison = Comparison("made up", "FastVim", dtype)
    getattr(comparison, what)("array", expected, expected)
    assert not comparison.problems
    getattr(comparison, what)("array", actual, expected)
    assert len(comparison.problems) == 1
    assert BOUNDS[dtype][what == "grad"] < comparison.worst(what)[0] < 2e-3


def test_shapes_and_holes_are_problems() -> None:
    comparison = Comparison("made up", "FastVim", "float32")
    comparison.output("misshapen", np.zeros(3), np.zeros((3, 1)))
    comparison.output("undefined", np.full(3, np.nan), np.zeros(3))
    comparison.zero_grad("used", np.array([0.0, 1e-30]))
    assert len(comparison.problems) == 3
    with pytest.raises(AssertionError, match="nothing was compared"):
        close([Comparison("empty", "FastVim", "float32")], lambda *_: None)


@pytest.mark.parametrize("kind", sorted(COVERED & {"FastVim", "Vim", "ViT", "VimBackbone"}))
def test_an_unknown_argument_is_refused(kind: str) -> None:
    with pytest.raises(UnknownArgumentError, match="if_rope"):
        model_fields(kind, {"patch_size": 4, "if_rope": True})


@pytest.mark.parametrize(
    "kwargs", [{"stride": 2}, {"final_pool_type": "median"}, {"drop_rate": 0.1}], ids=str
)
def test_a_value_without_counterpart_is_refused(kwargs: dict) -> None:
    with pytest.raises(UnknownArgumentError, match=next(iter(kwargs))):
        model_fields("FastVim", {"patch_size": 4} | kwargs)


@pytest.mark.skipif(not fixture_paths(), reason="no golden numbers here: set FASTVIM_PARITY_DIR")
def test_gradients_of_half_of_each_class_are_drawn_and_of_all_in_time(seed: int) -> None:
    kinds = {path: kind_of(path) for path in fixture_paths()}
    of_class: dict[str, set[str]] = {}
    for path, kind in kinds.items():
        of_class.setdefault(kind, set()).add(path.stem)
    draws = [draw_gradients(kinds, seed + i) for i in range(40)]
    for names in of_class.values():
        assert {len(names & drawn) for drawn in draws} == {(len(names) + 1) // 2}
    assert set().union(*draws) == {path.stem for path in kinds}

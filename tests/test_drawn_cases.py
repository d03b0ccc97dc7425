"""Drawing of cases: how many, which, and what is never left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.drawn_cases import draw_cases


@dataclasses.dataclass(eq=False)
class Item:
    """What a collected test shows of itself."""

    nodeid: str
    mark: pytest.Mark | None

    @property
    def path(self) -> Path:
        return Path(self.nodeid.partition("::")[0]).resolve()

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        assert name == "drawn"
        return self.mark


def cases(test: str, count: int, mark: pytest.MarkDecorator | None = pytest.mark.drawn) -> list:
    return [Item(f"tests/a.py::{test}[{i}]", mark and mark.mark) for i in range(count)]


def names(items) -> list[str]:
    return [item.nodeid.partition("::")[2] for item in items]


def test_a_tenth_of_each_test_runs_and_everything_without_the_mark():
    items = cases("one", 2) + cases("plain", 4, None) + cases("other", 11)
    kept, left_out = draw_cases(items, ["tests/a.py"], seed=5)
    assert names(kept)[1:5] == [f"plain[{i}]" for i in range(4)]
    assert [n.partition("[")[0] for n in names(kept)] == ["one"] + ["plain"] * 4 + ["other"] * 2
    assert sorted(names(kept + left_out)) == sorted(names(items))


def test_tests_of_one_group_are_drawn_together():
    mark = pytest.mark.drawn("shapes")
    items = cases("one", 1, mark) + cases("other", 2, mark)
    assert len(draw_cases(items, [], seed=5)[0]) == 1


def test_a_group_may_have_a_share_of_its_own():
    items = cases("one", 9, pytest.mark.drawn("commands", one_in=4))
    assert len(draw_cases(items, [], seed=5)[0]) == 3
    with pytest.raises(ValueError, match="one_in=10, others of 'commands' 4"):
        draw_cases(items + cases("other", 1, pytest.mark.drawn("commands")), [], seed=5)


def test_every_case_runs_in_some_run_and_a_seed_repeats_its_draw():
    items = cases("one", 9)
    kept = [names(draw_cases(items, [], seed)[0]) for seed in range(100)]
    assert set().union(*kept) == set(names(items))
    assert names(draw_cases(items, [], 3)[0]) == kept[3]


@pytest.mark.parametrize(
    ("argument", "ran"), [("tests/a.py::one[7]", ["one[7]"]), ("tests/a.py::one", 9)]
)
def test_what_is_asked_for_by_name_runs(argument, ran):
    asked = [item for item in cases("one", 9) if argument in (item.nodeid, "tests/a.py::one")]
    for seed in range(20):
        kept = names(draw_cases(asked, [argument], seed)[0])
        assert kept == ran or len(kept) == ran
        # Another test whose name begins alike is drawn as ever.
        assert len(draw_cases(cases("one_more", 11), [argument], seed)[0]) == 2

"""Draw which cases of the tests marked `drawn` a run has, as inputs are drawn: by FASTVIM_TEST_SEED."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

SHARE = 1 / 10


def draw_cases(
    items: list[pytest.Item], arguments: Iterable[str], seed: int
) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Split collected tests into those to run and those to leave out, in their order.

    Of each group a tenth is run, rounded up. A group is the cases of one test, or all tests whose marks name the same
    group: `@pytest.mark.drawn("core shapes")`. Tests without the mark are run, and so is what `arguments`, the
    command line's, ask for by node id ("file.py::test" or "file.py::test[case]").
    """
    asked = [_parts(argument) for argument in arguments if "::" in argument]
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if (mark := item.get_closest_marker("drawn")) and not _is_asked(item, asked):
            name = mark.args[0] if mark.args else item.nodeid.partition("[")[0]
            groups.setdefault(name, []).append(item)
    left_out: set[pytest.Item] = set()
    for group in groups.values():
        in_turn = sorted(group, key=lambda item: zlib.crc32(f"{seed} {item.nodeid}".encode()))
        left_out.update(in_turn[math.ceil(len(group) * SHARE) :])
    return [i for i in items if i not in left_out], [i for i in items if i in left_out]


def _parts(argument: str) -> tuple[Path, str]:
    file, _, name = argument.partition("::")
    return Path(file).resolve(), name


def _is_asked(item: pytest.Item, asked: list[tuple[Path, str]]) -> bool:
    name = item.nodeid.partition("::")[2]
    return any(item.path == file and (name == n or name.startswith(f"{n}[")) for file, n in asked)

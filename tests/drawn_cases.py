"""Draw which cases of the tests marked `drawn` a run has, as inputs are drawn: by FASTVIM_TEST_SEED."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

ONE_IN = 10


def draw_cases(
    items: list[pytest.Item], arguments: Iterable[str], seed: int
) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Split collected tests into those to run and those to leave out, in their order.

    Of each group a tenth is run, rounded up, or another share: `@pytest.mark.drawn("commands", one_in=4)`. A group is
    the cases of one test, or all tests whose marks name the same group. Tests without the mark are run, and so is what
    `arguments`, the command line's, ask for by node id ("file.py::test" or "file.py::test[case]").

    Raises:
        ValueError: the marks of one group differ in their share.
    """
    asked = [_parts(argument) for argument in arguments if "::" in argument]
    groups: dict[str, list[pytest.Item]] = {}
    shares: dict[str, int] = {}
    for item in items:
        if (mark := item.get_closest_marker("drawn")) and not _is_asked(item, asked):
            name = mark.args[0] if mark.args else item.nodeid.partition("[")[0]
            groups.setdefault(name, []).append(item)
            share = mark.kwargs.get("one_in", ONE_IN)
            if shares.setdefault(name, share) != share:
                raise ValueError(
                    f"{item.nodeid}: one_in={share}, others of {name!r} {shares[name]}"
                )
    left_out: set[pytest.Item] = set()
    for name, group in groups.items():
        in_turn = sorted(group, key=lambda item: zlib.crc32(f"{seed} {item.nodeid}".encode()))
        left_out.update(in_turn[math.ceil(len(group) / shares[name]) :])
    return [i for i in items if i not in left_out], [i for i in items if i in left_out]


def _parts(argument: str) -> tuple[Path, str]:
    file, _, name = argument.partition("::")
    return Path(file).resolve(), name


def _is_asked(item: pytest.Item, asked: list[tuple[Path, str]]) -> bool:
    name = item.nodeid.partition("::")[2]
    return any(item.path == file and (name == n or name.startswith(f"{n}[")) for file, n in asked)

"""The lines that a run prints about the golden numbers: how much was compared, how close, and what was not."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tests.parity.compare import BOUNDS


def summary_lines(records: list[Any]) -> list[str]:
    """Collect lines of the terminal summary from what the tests recorded as "parity"."""
    compared = [r for r in records if "dtype" in r and not r["kind"].endswith(".json")]
    tables = [r for r in records if "dtype" in r and r["kind"].endswith(".json")]
    lines = [line for r in records for line in r.get("lines", [])]
    for table in sorted({r["kind"] for r in tables}):
        entries = sum(r["arrays"][0] for r in tables if r["kind"] == table)
        wrong = [r["name"] for r in tables if r["kind"] == table and not r["passed"]]
        verdict = f"NOT equal: {', '.join(wrong)}" if wrong else "equal"
        lines.insert(0, f"  {table}: {entries} entries compared, {verdict}")
    if not compared:
        return lines
    fixtures = {r["name"] for r in compared}
    failed = sorted({r["name"] for r in compared if not r["passed"]})
    arrays = sum(sum(r["arrays"]) for r in compared)
    head = f"parity: {len(fixtures)} fixtures, {arrays} arrays compared"
    lines.insert(
        0, head + (f"; NOT within bounds: {', '.join(failed)}" if failed else ", all within bounds")
    )
    for dtype, bounds in BOUNDS.items():
        here = [r for r in compared if r["dtype"] == dtype]
        for index, what in enumerate(("outputs", "gradients")):
            count = sum(r["arrays"][index] for r in here)
            if count:
                record = max(here, key=lambda r: r["worst"][index][0])
                error, name = record["worst"][index]
                lines.append(
                    f"  {dtype:8} {what:9} {count:5}  worst {error:.1e} (bound {bounds[index]:.0e})"
                    f"  {record['name']}: {name}"
                )
    lines += by_class(compared)
    return lines


def by_class(compared: list[Any]) -> list[str]:
    """Return one line per class: fixtures, and the worst output / gradient error of each dtype."""
    groups: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for record in compared:
        groups[record["kind"]][record["dtype"]].append(record)
    lines = []
    for kind in sorted(groups, key=str.lower):
        names = {r["name"] for records in groups[kind].values() for r in records}
        cells = []
        for dtype in BOUNDS:
            if records := groups[kind].get(dtype):
                worst = [max(r["worst"][i][0] for r in records) for i in (0, 1)]
                cells.append(f"{dtype} {worst[0]:.0e} / {worst[1]:.0e}")
        lines.append(f"  {kind} ({len(names)}): " + ", ".join(cells))
    return lines

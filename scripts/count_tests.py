"""Adds up the counts of the pytest runs whose JUnit files are given; the total is the last line."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path


def counts(report: Path) -> Counter[str]:
    """Count passed, failed and skipped tests of one report; an error in set-up or tear-down is a failure."""
    total: Counter[str] = Counter()
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        tests, failures, errors, skipped = (
            int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")
        )
        total += Counter(
            passed=tests - failures - errors - skipped, failed=failures + errors, skipped=skipped
        )
    return total


def line(count: Counter[str]) -> str:
    """Write one line in the form that test runners close with."""
    return f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped"


def main(paths: list[str]) -> int:
    """Print every report's counts and their sum; 1 if a test failed, a report is missing or none passed."""
    reports = [Path(path) for path in paths]
    missing = [report for report in reports if not report.is_file()]
    for report in missing:
        print(f"{report} is missing")
    each = {report: counts(report) for report in reports if report.is_file()}
    for report, count in each.items():
        print(f"{report.stem:>10}: {line(count)}")
    total = sum(each.values(), Counter())
    print(line(total))
    return int(bool(missing) or total["failed"] > 0 or total["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

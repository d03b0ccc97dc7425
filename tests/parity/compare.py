"""How far an array may be from its golden value, and the record of how far it was."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tests.parity.known import KNOWN
from tests.support import ALL_CASES, relative_error

# Every fixture is compared in float64. A third of the fixtures, other ones each run, are compared in one of `OTHERS` as
# well, which the seed chooses. Each is one more program to compile.
# A fixture that known.py does not name is compared in all, and with FASTVIM_PARITY_DTYPES=all (FASTVIM_TEST_CASES=all
# means that, too) each is. A list such as "float64" compares every fixture in those dtypes.
OTHERS = (("float32", "scan"), ("bfloat16", "scan"), ("float64", "unroll"))
ASKED = os.environ.get("FASTVIM_PARITY_DTYPES", "all" if ALL_CASES else "")
# (outputs, gradients), relative to the largest entry of each array.
BOUNDS = {
    "float64": (1e-7, 1e-6),
    "float32": (5e-5, 5e-4),
    "bfloat16": (2e-2, 5e-2),
    # With activations="compute"; measured, see benchmarks/NOTES.md. Rounded tokens may change which one is a line's
    # maximum, which moves that line's whole gradient.
    "bfloat16 compute": (1e-1, 3e-1),
    "bfloat16 compute, max": (1e-1, 1.0),
}


def table_bound(side: int) -> float:
    """Return how far sin-cos tables computed in float32 may be apart on a grid of `side` positions.

    Frequencies are powers in float32, whose last places differ among processors, times the position.
    """
    return 1e-7 + 2.0**-22 * (side - 1)


@dataclasses.dataclass
class Comparison:
    """The arrays of one fixture in one dtype; `close` raises if any is off, naming all of them.

    `mode` tells the comparisons of one fixture and dtype apart ("scan", "unroll", ...).
    """

    name: str
    kind: str
    dtype: str
    mode: str = ""
    errors: dict[str, dict[str, float]] = dataclasses.field(
        default_factory=lambda: {"output": {}, "grad": {}}
    )
    problems: list[str] = dataclasses.field(default_factory=list)

    def output(
        self, name: str, actual: ArrayLike, expected: ArrayLike, bound: float | None = None
    ) -> None:
        """Compare one output; `bound` replaces the dtype's own."""
        self._compare(
            "output", name, actual, expected, BOUNDS[self.dtype][0] if bound is None else bound
        )

    def grad(self, name: str, actual: ArrayLike, expected: ArrayLike) -> None:
        """Compare one gradient."""
        self._compare("grad", name, actual, expected, BOUNDS[self.dtype][1])

    def zero_grad(self, name: str, actual: ArrayLike) -> None:
        """Check that a parameter that the outputs do not depend on has a gradient of exactly zero."""
        if np.any(np.asarray(actual) != 0):
            self.problems.append(
                f"gradient of {name}: not zero, although the outputs do not depend on it"
            )

    def missing(self, what: str) -> None:
        """Record that something that had to be compared is absent."""
        self.problems.append(f"missing: {what}")

    def _compare(
        self, what: str, name: str, actual: ArrayLike, expected: ArrayLike, bound: float
    ) -> None:
        try:
            error = relative_error(actual, expected, name)
        except AssertionError as failure:
            self.problems.append(f"{what} {failure}")
            return
        self.errors[what][name] = error
        if not error <= bound:
            self.problems.append(
                f"{what} {name}: off by {error:.2e} of its largest entry, bound {bound:.0e}"
            )

    def worst(self, what: str) -> tuple[float, str]:
        """Return the largest error of the outputs or of the gradients, and whose it is."""
        errors = self.errors[what]
        name = max(errors, key=errors.__getitem__, default="")
        return errors.get(name, 0.0), name

    def record(self) -> dict[str, Any]:
        """Return what the summary needs, in plain types."""
        return {
            "name": self.name,
            "kind": self.kind,
            "dtype": self.dtype,
            "mode": self.mode,
            "arrays": [len(self.errors["output"]), len(self.errors["grad"])],
            "worst": [self.worst("output"), self.worst("grad")],
            "passed": not self.problems,
        }

    def lines(self) -> list[str]:
        """Return one line per problem."""
        label = " ".join(part for part in (self.name, self.dtype, self.mode) if part)
        return [f"{label}: {problem}" for problem in self.problems]


def in_all_modes(name: str) -> bool:
    """Tell whether a fixture is compared in every dtype and mode, whatever a run draws."""
    return ASKED == "all" or (not ASKED and name not in KNOWN)


def modes_of(name: str, turn: int | None) -> list[tuple[str, str]]:
    """Return what to compare a fixture in: dtypes, and ways to run the blocks.

    Args:
        name: of the fixture.
        turn: chooses one of `OTHERS` for a fixture that was drawn; None for all other fixtures.
    """
    if ASKED and ASKED != "all":
        return [(dtype, "scan") for dtype in ASKED.split(",")]
    if in_all_modes(name):
        return [("float64", "scan"), *OTHERS]
    others = [] if turn is None else [OTHERS[turn % len(OTHERS)]]
    return [("float64", "scan"), *others]


def close(comparisons: list[Comparison], record_property: Any) -> None:
    """Record every comparison for the summary, then raise if any of them saw a problem or compared nothing."""
    for comparison in comparisons:
        record_property("parity", comparison.record())
    problems = [line for comparison in comparisons for line in comparison.lines()]
    problems += [
        f"{c.name} {c.dtype}: nothing was compared"
        for c in comparisons
        if not sum(c.record()["arrays"])
    ]
    assert comparisons, "nothing was compared"
    assert not problems, "\n  ".join([f"{len(problems)} problems:", *problems])

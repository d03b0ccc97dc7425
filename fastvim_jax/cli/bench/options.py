"""Check options and measure: what all bench commands share."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastvim_jax.errors import UserError

if TYPE_CHECKING:
    from fastvim_jax.bench.record import Columns
    from pallas_kernels import timing

Direction = Literal["forward", "both"]


def flag(name: str) -> str:
    """Spell a field as the command line does."""
    return f"--{name.replace('_', '-')}"


class Options:
    """Refuse numbers below one, and empty lists where at least one value is needed."""

    zero: ClassVar[tuple[str, ...]] = ()
    """Fields that may be 0."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            many = value if isinstance(value, tuple) else (value,)
            least = 0 if field.name in self.zero else 1
            if any(isinstance(n, int) and not isinstance(n, bool) and n < least for n in many):
                needed = "be positive" if least else "not be negative"
                raise UserError(
                    f"{flag(field.name)} must {needed}, got {' '.join(map(str, many))}."
                )
            if field.default and value == ():
                raise UserError(f"{flag(field.name)} needs at least one value.")

    def refuse(self, mode: str, *names: str) -> None:
        """Raise if an option is given that a mode would ignore."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.name in names and getattr(self, field.name) != field.default:
                raise UserError(f"{mode} does not use {flag(field.name)}.")


def measure(
    bench: str,
    cases: Sequence[tuple[timing.Row, timing.Case]],
    columns: Columns,
    arguments: Sequence[str],
    file: Path | None,
    record: str = "",
) -> list[dict[str, Any]]:
    """Measure the cases, print a table and keep the rows in `file`; return the rows."""
    from fastvim_jax.bench.record import show
    from pallas_kernels import timing

    command = shlex.join(["fastvim", "bench", bench, *arguments])
    return show(record or bench, timing.run(cases), columns, command=command, file=file)


def status(rows: Sequence[dict[str, Any]]) -> int:
    """Return the exit status: 1 if a measured result was wrong."""
    from fastvim_jax.bench.record import sound

    if all("skipped" in row for row in rows):
        raise UserError("none of these measurements can run here: see the reasons above.")
    return 0 if sound(rows) else 1


def gradients_of(directions: Sequence[Direction]) -> list[bool]:
    """Tell for each direction whether gradients are taken."""
    return [direction == "both" for direction in directions]


def on_gpu() -> bool:
    """Tell whether JAX computes on a GPU."""
    import jax

    return jax.default_backend() == "gpu"

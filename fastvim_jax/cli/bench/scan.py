"""`fastvim bench scan`: every implementation of the selective scan, both directions at once, and block sizes."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastvim_jax.cli.bench.options import (
    Direction,
    Options,
    gradients_of,
    measure,
    status,
)
from fastvim_jax.cli.usage import as_usage_error, parse
from fastvim_jax.errors import UserError

if TYPE_CHECKING:
    from pallas_kernels.selective_scan.arg_specs import ScanSpec

PICTURES = (".png", ".svg", ".pdf", ".jpg")


@dataclasses.dataclass(frozen=True)
class Scan(Options):
    """Measure the selective scan."""

    lengths: tuple[int, ...] = ()
    """Scan lengths; by default 7 to 16384 and the shapes that kernels are tuned for on a GPU, 7 to 4096 elsewhere."""
    batches: tuple[int, ...] = ()
    """Sequences per batch, one number for each length; by default chosen so that all lengths are about equal work."""
    channels: int | None = None
    """Channels; by default 384 on a GPU (the Tiny size), 64 elsewhere."""
    states: int = 16
    """States of a channel."""
    implementations: tuple[
        Literal["pallas", "triton", "xla_associative", "xla_sequential", "mamba_ssm"], ...
    ] = ("pallas", "triton", "xla_associative", "xla_sequential", "mamba_ssm")
    """Implementations to measure; those that cannot run here are skipped."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Dtypes of the inputs. In bfloat16 only the Pallas kernels are measured."""
    directions: tuple[Direction, ...] = ("forward", "both")
    """forward, or forward and backward with all gradients."""
    pair: bool = False
    """Instead measure the scans of a mixer's two directions, one by one and at once; by default those of FastVim."""
    tune: bool = False
    """Instead try block sizes for the Pallas kernels, and keep those that beat the built-in rules (Hopper GPUs)."""
    tuned_file: Path | None = None
    """File for the block sizes found by --tune; by default the one that the kernels read."""
    plot: Path | None = None
    """Draw the times over the lengths to this file: .png, .svg, .pdf or .jpg."""
    json: Path | None = None
    """Write all rows to this file, with device, versions and commit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pair and self.tune:
            raise UserError("choose one of --pair and --tune.")
        if not self.lengths:
            self.refuse("without --lengths, the bench", "batches")
        if self.pair:
            self.refuse("--pair", "implementations", "plot")
            if not self.lengths:
                self.refuse("--pair without --lengths", "channels", "states")
        if self.tune:
            self.refuse("--tune", "implementations", "dtypes", "plot")
        elif self.tuned_file is not None:
            raise UserError("--tuned-file is for --tune.")
        if self.plot is not None and self.plot.suffix.lower() not in PICTURES:
            raise UserError(f"--plot {self.plot} must end in one of {', '.join(PICTURES)}.")


def scan(arguments: Sequence[str]) -> int:
    """Measure the selective scan."""
    chosen = parse(Scan, "bench scan", arguments, f"{Scan.__doc__}")
    from fastvim_jax.bench.scan import default_specs, plot, print_steps, specs
    from pallas_kernels.selective_scan import bench

    with as_usage_error():
        shapes = (
            specs(chosen.lengths, chosen.batches, chosen.channels, chosen.states)
            if chosen.lengths
            else default_specs(chosen.channels, chosen.states)
        )
    gradients = gradients_of(chosen.directions)
    if chosen.pair:
        return _pair(shapes if chosen.lengths else None, gradients, chosen, arguments)
    if chosen.tune:
        return _tune(shapes, gradients, chosen, arguments)
    cases = bench.cases(
        shapes,
        dtypes=chosen.dtypes,
        implementations=chosen.implementations,
        gradients=gradients,
    )
    rows = measure("scan", cases, bench.COLUMNS, arguments, chosen.json)
    print_steps(shapes)
    if chosen.plot:
        plot(rows, chosen.plot)
        print(f"The plot is {chosen.plot}.")
    return status(rows)


def _pair(
    shapes: Sequence[ScanSpec] | None,
    gradients: Sequence[bool],
    chosen: Scan,
    arguments: Sequence[str],
) -> int:
    from pallas_kernels.selective_scan import bench_bidirectional

    cases = bench_bidirectional.cases(
        shapes or bench_bidirectional.SPECS, dtypes=chosen.dtypes, gradients=gradients
    )
    columns = bench_bidirectional.COLUMNS
    return status(measure("scan", cases, columns, arguments, chosen.json, record="pair"))


def _tune(
    shapes: Sequence[ScanSpec], gradients: Sequence[bool], chosen: Scan, arguments: Sequence[str]
) -> int:
    from pallas_kernels.selective_scan import tune

    try:
        cases = tune.cases(shapes, gradients)
    except NotImplementedError as reason:
        raise UserError(f"{reason}.") from reason
    rows = measure("scan", cases, tune.COLUMNS, arguments, chosen.json, record="tune")
    file = chosen.tuned_file or tune.default_file()
    kept = tune.keep(rows, file, shlex.join(["fastvim", "bench", "scan", *arguments]))
    print(f"Faster than the rules, kept in {file}: {', '.join(kept) or 'nothing'}.")
    return status(rows)

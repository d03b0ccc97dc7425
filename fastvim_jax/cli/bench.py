"""`fastvim bench scan|mixer|model|train|data`: measurements, printed as tables and kept as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastvim_jax.cli.bench_data import data
from fastvim_jax.cli.usage import UsageError, as_usage_error, parse
from fastvim_jax.errors import UserError, suggest

if TYPE_CHECKING:
    from fastvim_jax.analysis.benchmarks.record import Columns
    from pallas_kernels import timing
    from pallas_kernels.selective_scan.arg_specs import ScanSpec

HELP = """\
Usage: fastvim bench BENCH [--json FILE] [OPTIONS]

Measures on the device at hand (device time on a GPU, the clock elsewhere), checks the results it measures, and prints
a table. Without options it takes shapes that fit the device; `fastvim bench BENCH --help` lists the options.

Benches:
  scan     the selective scan: every implementation over lengths 7 to 16384
  mixer    one mixer: pool, projection, scan, repeat, skip, and its whole core
  model    images a second of FastVim, Vim and ViT
  train    images a second of training steps; largest batch; trace and compile time
  data     reading images: each stage, the whole pipeline, a PyTorch DataLoader on the same files (on the host)
"""

Precision = Literal["bf16", "tf32", "f32"]
Direction = Literal["forward", "both"]
PICTURES = (".png", ".svg", ".pdf", ".jpg")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class _Options:
    """Refuses numbers below one, and nothing where something is needed."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            many = value if isinstance(value, tuple) else (value,)
            if any(isinstance(n, int) and not isinstance(n, bool) and n < 1 for n in many):
                raise UserError(
                    f"{_flag(field.name)} must be positive, got {' '.join(map(str, many))}."
                )
            if field.default and value == ():
                raise UserError(f"{_flag(field.name)} needs at least one value.")

    def refuse(self, mode: str, *names: str) -> None:
        """Options that a mode would ignore."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.name in names and getattr(self, field.name) != field.default:
                raise UserError(f"{mode} does not use {_flag(field.name)}.")


@dataclasses.dataclass(frozen=True)
class Scan(_Options):
    """What to measure of the selective scan."""

    lengths: tuple[int, ...] = ()
    """Scan lengths; by default 7 to 16384 and the shapes that kernels are tuned for on a GPU, 7 to 4096 elsewhere."""
    batches: tuple[int, ...] = ()
    """Sequences at a time, one number for each length; by default so many that all lengths are about equal work."""
    channels: int | None = None
    """Channels; by default 384 on a GPU (the Tiny size), 64 elsewhere."""
    states: int = 16
    """States of a channel."""
    implementations: tuple[Literal["pallas", "xla_associative", "xla_sequential", "mamba_ssm"], ...] = (
        "pallas", "xla_associative", "xla_sequential", "mamba_ssm",
    )  # fmt: skip
    """Which to measure; those that cannot run here are skipped."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of the sequences; the kernels alone are measured in bfloat16."""
    directions: tuple[Direction, ...] = ("forward", "both")
    """forward, or forward and backward with all gradients."""
    pair: bool = False
    """Instead measure the scans of a mixer's two directions, one by one and at once; by default those of FastVim."""
    tune: bool = False
    """Instead try block sizes for the Pallas kernels, and keep those that beat the built-in rules (Hopper GPUs)."""
    tuned_file: Path | None = None
    """Where --tune keeps them; by default beside the kernels, which read them there."""
    plot: Path | None = None
    """Draw the times over the lengths into this file, a .png, .svg, .pdf or .jpg."""
    json: Path | None = None
    """Keep all rows in this file, with device, versions and commit."""

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


@dataclasses.dataclass(frozen=True)
class Mixer(_Options):
    """What to measure of one mixer."""

    pixels: tuple[int, ...] = ()
    """Sides of the images, in whole patches of 16; by default 224 to 2048 on a GPU, 64 and 128 elsewhere."""
    batch: int | None = None
    """Images; by default 128 on a GPU, 2 elsewhere."""
    width: int | None = None
    """Width of the model; by default 192 (Tiny) on a GPU, 64 elsewhere."""
    parts: tuple[Literal["stages", "core"], ...] = ("stages", "core")
    """stages: of the state-space part, one by one. core: all between the mixer's two projections."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of the core; stages are in float32."""
    directions: tuple[Direction, ...] = ("forward", "both")
    """forward, or forward and backward with all gradients (of stages: of all together)."""
    json: Path | None = None
    """Keep all rows in this file, with device, versions and commit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(side % 16 for side in self.pixels):
            raise UserError("--pixels must be multiples of 16, the side of a patch.")


@dataclasses.dataclass(frozen=True)
class Model(_Options):
    """Which models to measure. All combinations of models, pixels, batches and precisions are taken."""

    models: tuple[str, ...] = ()
    """Names, see `fastvim models`; by default FastVim-T, Vim-T and ViT-T on a GPU, FastVim-T elsewhere."""
    pixels: tuple[int, ...] = (224,)
    """Sides of the images."""
    batches: tuple[int, ...] = ()
    """Images at a time; by default on a GPU 128 at 224 pixels, fewer at larger sizes; 2 elsewhere."""
    precisions: tuple[Precision, ...] = ("bf16",)
    """bf16, tf32 (float32, products in TF32), f32 (products in full float32)."""
    activations: Literal["compute", "wide"] = "compute"
    """What bf16 models keep between products; see the option of the models."""
    blocks: Literal["unroll", "scan"] | None = None
    """By default unroll on a GPU, scan elsewhere."""
    depth: int | None = None
    """Number of blocks, to measure a part of a model."""
    json: Path | None = None
    """Keep all rows in this file, with device, versions and commit."""


@dataclasses.dataclass(frozen=True)
class Train(Model):
    """Which training steps to measure: forward, backward and AdamW."""

    largest_batch: bool = False
    """Instead find the first of the batches, as given, of which a step fits into the device's memory."""
    compile_only: bool = False
    """Instead trace and compile only, and count the program's lines."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.largest_batch and self.compile_only:
            raise UserError("choose one of --largest-batch and --compile-only.")


def scan(arguments: Sequence[str]) -> int:
    """The selective scan."""
    chosen = parse(Scan, "bench scan", arguments, f"{Scan.__doc__}")
    from fastvim_jax.analysis.benchmarks.scan import default_specs, plot, print_steps, specs
    from pallas_kernels.selective_scan import bench

    with as_usage_error():
        shapes = (
            specs(chosen.lengths, chosen.batches, chosen.channels, chosen.states)
            if chosen.lengths
            else default_specs(chosen.channels, chosen.states)
        )
    gradients = _gradients(chosen.directions)
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
    rows = _measure("scan", cases, bench.COLUMNS, arguments, chosen.json)
    print_steps(shapes)
    if chosen.plot:
        plot(rows, chosen.plot)
        print(f"The plot is {chosen.plot}.")
    return _status(rows)


def _pair(
    shapes: Sequence[ScanSpec] | None,
    gradients: Sequence[bool],
    chosen: Scan,
    arguments: Sequence[str],
) -> int:
    from pallas_kernels.selective_scan import bench_pair

    cases = bench_pair.cases(shapes or bench_pair.SPECS, dtypes=chosen.dtypes, gradients=gradients)
    columns = bench_pair.COLUMNS
    return _status(_measure("scan", cases, columns, arguments, chosen.json, record="pair"))


def _tune(
    shapes: Sequence[ScanSpec], gradients: Sequence[bool], chosen: Scan, arguments: Sequence[str]
) -> int:
    from pallas_kernels.selective_scan import tune

    try:
        cases = tune.cases(shapes, gradients)
    except NotImplementedError as reason:
        raise UserError(f"{reason}.") from reason
    rows = _measure("scan", cases, tune.COLUMNS, arguments, chosen.json, record="tune")
    file = chosen.tuned_file or tune.default_file()
    kept = tune.keep(rows, file, shlex.join(["fastvim", "bench", "scan", *arguments]))
    print(f"Faster than the rules, kept in {file}: {', '.join(kept) or 'nothing'}.")
    return _status(rows)


def mixer(arguments: Sequence[str]) -> int:
    """One mixer."""
    chosen = parse(Mixer, "bench mixer", arguments, f"{Mixer.__doc__}")
    from fastvim_jax.analysis.benchmarks import mixer as bench

    gpu = _on_gpu()
    cases = bench.cases(
        width=chosen.width or (192 if gpu else 64),
        batch=chosen.batch or (128 if gpu else 2),
        pixels=chosen.pixels or ((224, 512, 1024, 2048) if gpu else (64, 128)),
        parts=chosen.parts,
        dtypes=chosen.dtypes,
        gradients=_gradients(chosen.directions),
    )
    return _status(_measure("mixer", cases, bench.COLUMNS, arguments, chosen.json))


def model(arguments: Sequence[str]) -> int:
    """Models, forward."""
    chosen = parse(Model, "bench model", arguments, f"{Model.__doc__}")
    from fastvim_jax.analysis.benchmarks import model as bench

    with as_usage_error():
        cases = bench.cases(_settings(chosen), **_how(chosen))
    return _status(_measure("model", cases, bench.COLUMNS, arguments, chosen.json))


def train(arguments: Sequence[str]) -> int:
    """Training steps."""
    chosen = parse(Train, "bench train", arguments, f"{Train.__doc__}")
    from fastvim_jax.training import benchmark as bench

    make = bench.largest_batch_cases if chosen.largest_batch else bench.step_cases
    make = bench.compile_cases if chosen.compile_only else make
    with as_usage_error():
        cases = make(_settings(chosen), **_how(chosen))
    return _status(_measure("train", cases, bench.COLUMNS, arguments, chosen.json))


BENCHES: dict[str, Callable[[Sequence[str]], int]] = {
    "scan": scan,
    "mixer": mixer,
    "model": model,
    "train": train,
    "data": data,
}


def run(arguments: Sequence[str]) -> int:
    """Measure something."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in BENCHES:
        hint = suggest(name, BENCHES) or f" Benches: {', '.join(BENCHES)}."
        raise UsageError(f"unknown bench {name!r}.{hint}")
    with _no_compilation_cache():
        return BENCHES[name](rest)


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """Compile times are measured, too."""
    import jax

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _measure(
    bench: str,
    cases: Sequence[tuple[timing.Row, timing.Case]],
    columns: Columns,
    arguments: Sequence[str],
    file: Path | None,
    record: str = "",
) -> list[dict[str, Any]]:
    from fastvim_jax.analysis.benchmarks.record import show
    from pallas_kernels import timing

    command = shlex.join(["fastvim", "bench", bench, *arguments])
    return show(record or bench, timing.run(cases), columns, command=command, file=file)


def _status(rows: Sequence[dict[str, Any]]) -> int:
    from fastvim_jax.analysis.benchmarks.record import sound

    if all("skipped" in row for row in rows):
        raise UserError("nothing of what was asked for runs here: see the reasons above.")
    return 0 if sound(rows) else 1


def _gradients(directions: Sequence[Direction]) -> list[bool]:
    return [direction == "both" for direction in directions]


def _on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def _settings(chosen: Model) -> list[tuple[str, int, int, str]]:
    """All combinations; pixels name batches where none are given."""
    from fastvim_jax.analysis.benchmarks.model import BATCHES

    gpu = _on_gpu()
    tiny = ("fastvim_tiny_patch16_224", "vim_tiny_patch16_224", "vit_tiny_patch16_224")
    return [
        (name, pixels, batch, precision)
        for name in chosen.models or (tiny if gpu else tiny[:1])
        for pixels in chosen.pixels
        for batch in chosen.batches or (BATCHES.get(pixels, 1) if gpu else 2,)
        for precision in chosen.precisions
    ]


def _how(chosen: Model) -> dict[str, Any]:
    blocks = chosen.blocks or ("unroll" if _on_gpu() else "scan")
    depth = {} if chosen.depth is None else {"depth": chosen.depth}
    return {"activations": chosen.activations, "blocks": blocks, **depth}

"""`fastvim models [PATTERN]`: list the models and their costs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated

import tyro

from fastvim_jax.cli.usage import UsageError, as_usage_error, parse
from fastvim_jax.errors import UserError, suggest


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The models to list."""

    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATTERN")] = "*"
    """Names to list: a part of a name, or a pattern with * and ?."""
    image_size: int | tuple[int, int] | None = None
    """Cost at this side, or height and width, in pixels; by default at the model's own size."""
    gpu: bool = False
    """List at how many square sizes the models run as fused GPU kernels, and why not at the others."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.gpu and self.image_size is not None:
            raise UserError("--gpu asks about all sizes: leave out --image-size.")


def run(arguments: Sequence[str]) -> int:
    """List models with their parameters, multiply-adds, scan steps and parallel steps per block."""
    chosen = parse(Arguments, "models", arguments, f"{run.__doc__}")
    from fastvim_jax.analysis import model_cost
    from fastvim_jax.models import list_models, model_config

    names = list_models(chosen.pattern)
    if not names:
        raise UsageError(
            f"no model matches {chosen.pattern!r}.{suggest(chosen.pattern, _stems(list_models()))} "
            "`fastvim models` lists all."
        )
    if chosen.gpu:
        return _gpu(names, chosen.json)
    with as_usage_error():
        costs = {name: model_cost(model_config(name), chosen.image_size) for name in names}
    if chosen.json:
        print(
            json.dumps({name: dataclasses.asdict(cost) for name, cost in costs.items()}, indent=2)
        )
        return 0
    width = max(map(len, [*names, "model"]))
    print(
        f"{'model':<{width}}  {'parameters':>11}  {'GMACs':>7}  {'scan steps':>10}  parallel steps"
    )
    for name, cost in costs.items():
        print(
            f"{name:<{width}}  {cost.parameters:>11,}  {cost.gmacs:>7.2f}  "
            f"{_steps(cost.scan_steps):>10}  {_steps(cost.parallel_steps):>14}"
        )
    size = f"images of {_size(chosen.image_size)}" if chosen.image_size else "each model's own size"
    print(
        f"\nGMACs: billions of multiply-adds per image, at {size}.\n"
        "Steps: of each direction's scan in a block (even/odd blocks where they differ), one after the\n"
        "other, and as a parallel scan."
    )
    return 0


def _gpu(names: Sequence[str], as_json: bool) -> int:
    from fastvim_jax.analysis.coverage import LARGEST, SMALLEST, preset_coverage

    with as_usage_error():
        found = preset_coverage(names)
        if not found:
            raise UserError("none of these models has mixers; ViTs run cuDNN's attention.")
    if as_json:
        print(json.dumps(found, indent=2, default=dataclasses.asdict))
        return 0
    width = max(map(len, found))
    print(f"{'model':<{width}}  dtype  fused at    else")
    for name, of_precision in found.items():
        for precision, its in of_precision.items():
            share = f"{len(its.fused)} of {len(its.sizes)}"
            reasons = [
                f"{reason} ({', '.join(map(str, sizes[:6]))}{', ...' if len(sizes) > 6 else ''} px)"
                for reason, sizes in its.fallbacks.items()
            ]
            print(f"{name:<{width}}  {precision:<5}  {share:<10}  {'; '.join(reasons) or '-'}")
    print(
        f"\nOf the square sizes of whole patches from {SMALLEST} to {LARGEST} pixels, on Hopper GPUs.\n"
        'bf16: with activations="compute"; with "wide" as f32. Elsewhere the scan alone runs as a kernel.'
    )
    return 0


def _size(size: int | tuple[int, int]) -> str:
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height} x {width} pixels"


def _stems(names: Sequence[str]) -> list[str]:
    """List the names and their beginnings (`vim`, `vim_tiny`, ...), because a pattern need not be a whole name."""
    parts = (name.split("_") for name in names)
    return list(dict.fromkeys("_".join(p[:i]) for p in parts for i in range(1, len(p) + 1)))


def _steps(steps: tuple[int, ...]) -> str:
    return "/".join(str(s) for s in dict.fromkeys(steps)) or "-"

"""`fastvim eval RUN` of a detection run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

from fastvim_jax.cli.eval_options import EvalOptions
from fastvim_jax.cli.join import join_processes
from fastvim_jax.cli.usage import as_usage_error, parse
from fastvim_jax.errors import counted

_KINDS = {"bbox_ap": "box AP", "segm_ap": "mask AP"}


@dataclasses.dataclass(frozen=True)
class Arguments(EvalOptions):
    """The run to evaluate, and the data."""

    weights: Literal["raw", "ema"] | None = None
    """The trained weights or their average; by default the average, unless raw scored better in the run's log."""
    eval_sizes: tuple[tuple[int, int], ...] = ()
    """Padded sizes, heights and widths in turn (see data.eval_sizes); by default those of the run's config."""


def run(arguments: Sequence[str]) -> int:
    """Evaluate a detection run: AP of boxes and masks, by pycocotools."""
    from fastvim_jax.distributed import is_first_process
    from fastvim_jax.training.detection.run_scores import score_run

    chosen = parse(Arguments, "eval", arguments, f"{run.__doc__}")
    join_processes()
    data = chosen.data()
    if chosen.eval_sizes:
        with as_usage_error():
            data = dataclasses.replace(data, eval_sizes=chosen.eval_sizes)
    found = score_run(
        chosen.run, data, weights=chosen.weights, step=chosen.step, progress=not chosen.json
    )
    if not is_first_process():
        return 0
    if chosen.json:
        scores: dict[str, Any] = {"count": found.count, **found.scores}
        scores |= {"classes": found.classes} if chosen.per_class else {}
        whole = {"run": str(chosen.run), "step": found.step, "weights": found.weights}
        whole |= {"split": data.eval_split, "scores": scores}
        print(json.dumps(whole, indent=2, ensure_ascii=False))
        return 0
    what = f"{chosen.run} at step {found.step} ({found.weights} weights)"
    print(f"{what}, on {counted(found.count, 'image')} of {data.eval_split}:")
    for key, name in _KINDS.items():
        if key in found.scores:
            parts = {part: found.scores[f"{key}{part}"] for part in ("", "50", "75")}
            sizes = {s: found.scores[f"{key}_{s}"] for s in ("small", "medium", "large")}
            shown = ", ".join(f"{name}{part} {_share(value)}" for part, value in parts.items())
            print(f"  {shown}; {', '.join(f'{s} {_share(value)}' for s, value in sizes.items())}")
    if chosen.per_class:
        heads = " ".join(f"{name:>8}" for key, name in _KINDS.items() if key in found.scores)
        print(f"  {heads} objects  class")
    for row in found.classes if chosen.per_class else ():
        shares = " ".join(f"{_share(row[key]):>8}" for key in _KINDS if key in row)
        print(f"  {shares} {row['objects']:>7}  {row['class']}")
    return 0


def _share(value: float | None) -> str:
    return "-" if value is None or value < 0 else f"{value:.2%}"

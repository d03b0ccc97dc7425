"""`fastvim eval RUN` of a segmentation run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from fastvim_jax.cli.eval_options import EvalOptions
from fastvim_jax.cli.join import join_processes
from fastvim_jax.cli.usage import parse
from fastvim_jax.errors import counted


def run(arguments: Sequence[str]) -> int:
    """Evaluate a segmentation run by slide inference: mIoU, mAcc and aAcc over all pixels of all images."""
    from fastvim_jax.distributed import is_first_process
    from fastvim_jax.training.segmentation.run_scores import score_run

    chosen = parse(EvalOptions, "eval", arguments, f"{run.__doc__}")
    join_processes()
    data = chosen.data()
    found = score_run(chosen.run, data, step=chosen.step, progress=not chosen.json)
    if not is_first_process():
        return 0
    scores: dict[str, Any] = {"count": found.count, **found.areas.scores()}
    names = zip(found.class_names, found.areas.iou, found.areas.accuracy, strict=True)
    classes = [{"class": n, "iou": _known(iou), "accuracy": _known(acc)} for n, iou, acc in names]
    for reason in found.unread:
        print(f"fastvim: left out: {reason}", file=sys.stderr)
    if chosen.json:
        more = {"classes": classes} if chosen.per_class else {}
        whole = {"run": str(chosen.run), "step": found.step, "split": data.eval_split}
        print(json.dumps({**whole, "scores": scores | more}, indent=2, ensure_ascii=False))
        return 0
    print(
        f"{chosen.run} at step {found.step}, on {counted(found.count, 'image')} of {data.eval_split}: mIoU "
        f"{scores['miou']:.2%}, mAcc {scores['macc']:.2%}, aAcc {scores['aacc']:.2%}"
    )
    if chosen.per_class:
        print("       IoU accuracy  class")
    for row in classes if chosen.per_class else ():
        shares = (
            "       -" if row[key] is None else f"{row[key]:>8.2%}" for key in ("iou", "accuracy")
        )
        print(f"  {' '.join(shares)}  {row['class']}")
    return 0


def _known(ratio: float) -> float | None:
    return None if math.isnan(ratio) else float(ratio)

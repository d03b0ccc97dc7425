"""Compare recipes for CIFAR-10 on the first 5,000 training images, which no trial trains on. Test images are not read.

python benchmarks/cifar_trials.py run RUNS --share 0.33 [--devices 0,1] [--seconds 430]
python benchmarks/cifar_trials.py collect RUNS --commit HASH
python benchmarks/cifar_trials.py report      # prints the table for small_images_notes.md

All trials are changes of experiments/cifar10/fastvim_fine.py, and take about the same time, because the recipe's time
is limited: a larger model trains fewer epochs. Their epochs are a fifth of what a run alone on a GPU has time for. The
two that did best are compared over more epochs (`*_long`), because strong augmentation pays late.
"""

from __future__ import annotations

import sys
from typing import Any

import jobs

TOPIC = "cifar_trials"
HELD_OUT = ("--data.train-split", "train[5000:]", "--data.eval-split", "train[:5000]")
STRONG = (
    "--data.augment-on", "device", "--data.rand-augment", "9", "--data.mixup", "0.8", "--data.cutmix", "1.0",
)  # fmt: skip
HALF = (*STRONG, "--data.mix-prob", "0.5")
TRIALS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "light": (40, "as it is: crop, flip, cutmix on half of the batches", ()),
    "half": (40, "RandAugment 9, mixup or cutmix on half of the batches", HALF),
    "full": (
        40, "RandAugment 9, erasing 0.25, mixup or cutmix on all batches",
        (*STRONG, "--data.mix-prob", "1.0", "--data.random-erasing", "0.25"),
    ),
    "deep": (27, "half, 12 blocks", (*HALF, "--model.depth", "12")),
    "wide": (27, "half, 256 wide", (*HALF, "--model.embed-dim", "256")),
    "large_batch": (
        42, "half, batch 1024, learning rate 6e-3",
        (*HALF, "--data.batch-size", "1024", "--optimizer.learning-rate", "6e-3", "--log-every-steps", "44"),
    ),
    "light_long": (100, "as it is: crop, flip, cutmix on half of the batches", ()),
    "half_long": (100, "RandAugment 9, mixup or cutmix on half of the batches", HALF),
}  # fmt: skip
"""Epochs, description and changes of each trial, by name."""
JOBS = [
    jobs.training(
        f"{name}_s0",
        "cifar10/fastvim_fine",
        "--epochs",
        str(epochs),
        "--evaluate-every-epochs",
        "10",
        *HELD_OUT,
        *changes,
    )
    for name, (epochs, _, changes) in TRIALS.items()
]


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Write one row for each trial that has a record, the best first."""
    rows = []
    for name, (record, *_) in found.items():
        raw, averaged = (100 * record["evaluation"][f"{kind}_top1"] for kind in ("raw", "ema"))
        loss = record["log"][-1]["loss"]
        row = (
            f"| {TRIALS[name][1]} | {record['epochs']} | {averaged:.2f} | {raw:.2f} | {loss:.3f} |"
        )
        rows.append((-averaged, row))
    head = "| recipe | epochs | averaged weights, top-1 % | last weights, top-1 % | last loss |\n|---|--:|--:|--:|--:|"
    return "\n".join([head, *(row for _, row in sorted(rows))])


def report() -> None:
    """Print the table of the kept records."""
    print(table(jobs.load(JOBS, TOPIC)))


if __name__ == "__main__":
    sys.exit(jobs.command_line(__doc__ or "", JOBS, TOPIC, report))

"""Runs the experiments of masked pre-training on the GPUs of one host, keeps their results, and writes masked.md.

    FASTVIM_DATA_DIR=... python benchmarks/masked.py run RUNS --devices 0,1,2,3 --seconds 540
    python benchmarks/masked.py collect RUNS --commit HASH
    python benchmarks/masked.py report

`run` trains every job of JOBS in a folder of its own in RUNS, one process a GPU, or several with --share. After
--seconds it stops the jobs under way, which save; asked again, it goes on with them. A job that begins from another
waits for it.

Stated beforehand, in the commit that brought this file: pre-training must be ahead of training from scratch with a
tenth of CIFAR-10's labels (`tenth` against `tenth_scratch`, three seeds each, same epochs). All else as it falls.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from jobs import Job, circumstances, command_line, load, training

HERE = Path(__file__).parent
RECORDS = HERE / "results" / "h100" / "masked"

CIFAR, TINY = "mae_cifar10", "mae_tiny_imagenet"
UNSCALED = "--no-scale-from-init"
EVERY_BLOCK = ("--optimizer.layer-rule", "blocks")
SHORT = ("--epochs", "40", "--evaluate-every-epochs", "0", "--pictures", "0")
SCANNED = ("--model.blocks", "scan")
"""Short runs compile their blocks as a loop: what they compute is the same, and compiling takes a third of the time."""


def _seeds(
    name: str, experiment: str, *arguments: str, seeds: int = 3, after: str = "", one: bool = False
) -> list[Job]:
    """List a job for each seed, from the run `after` of the same seed, or with `one` from that of seed 0."""
    return [
        training(
            f"{name}_s{seed}",
            experiment,
            "--seed",
            str(seed),
            *arguments,
            after=f"{after}_s{0 if one else seed}" if after else "",
            like=f"{name}_s0" if seed else "",
        )
        for seed in range(seeds)
    ]


def _tuned(name: str, after: str, *arguments: str, **options: Any) -> list[Job]:
    return _seeds(name, f"{CIFAR}/finetune_tenth", *SCANNED, *arguments, after=after, **options)


def _one(name: str, experiment: str, *arguments: str, after: str = "") -> list[Job]:
    return _seeds(name, experiment, *arguments, seeds=1, after=after)


JOBS: list[Job] = [
    *_seeds("pretrain40", f"{CIFAR}/pretrain", *SHORT),
    *_one("pretrain40_consistent", f"{CIFAR}/pretrain_consistent", *SHORT),
    *_one("pretrain40_true_mean", f"{CIFAR}/pretrain_true_mean", *SHORT),
    *_seeds("tenth_scratch", f"{CIFAR}/scratch_tenth"),
    *_tuned("tenth40", "pretrain40"),
    *_one("probe40", f"{CIFAR}/probe", *SCANNED, after="pretrain40"),
    *_one("probe40_unscaled", f"{CIFAR}/probe", *SCANNED, UNSCALED, after="pretrain40"),
    *_tuned("tenth40_unscaled", "pretrain40", UNSCALED),
    *_tuned("tenth40_every_block", "pretrain40", *EVERY_BLOCK),
    *_one("full_scratch", f"{CIFAR}/scratch", *SCANNED),
    *_one("full40", f"{CIFAR}/finetune", *SCANNED, after="pretrain40"),
    *_tuned("tenth40_consistent", "pretrain40_consistent", one=True),
    *_tuned("tenth40_true_mean", "pretrain40_true_mean", one=True),
    *_one("probe40_consistent", f"{CIFAR}/probe", *SCANNED, after="pretrain40_consistent"),
    *_one("probe40_true_mean", f"{CIFAR}/probe", *SCANNED, after="pretrain40_true_mean"),
    *_one("full40_unscaled", f"{CIFAR}/finetune", *SCANNED, UNSCALED, after="pretrain40"),
    *_one("tiny_pretrain", f"{TINY}/pretrain", *SHORT[2:], "--epochs", "200"),
    *_one("tiny_scratch", f"{TINY}/scratch", *SCANNED),
    *_one("tiny", f"{TINY}/finetune", *SCANNED, after="tiny_pretrain"),
    *_one("tiny_probe", f"{TINY}/probe", *SCANNED, after="tiny_pretrain"),
    *_one("tiny_probe_unscaled", f"{TINY}/probe", *SCANNED, UNSCALED, after="tiny_pretrain"),
    *_seeds("pretrain", f"{CIFAR}/pretrain"),
    *_seeds("tenth", f"{CIFAR}/finetune_tenth", after="pretrain"),
]  # fmt: skip


def top1(record: dict[str, Any]) -> float:
    """Return the top-1 % of the averaged weights, or the raw ones if no average was kept."""
    scores = record["evaluation"]
    return 100 * scores.get("ema_top1", scores.get("raw_top1"))


ROWS = (
    ("10 % of the labels, 100 epochs", "", ""),
    ("from scratch", "tenth_scratch", ""),
    ("pre-trained for 200 epochs", "tenth", ""),
    ("pre-trained for 40 epochs", "tenth40", ""),
    ("no scaling factor", "tenth40_unscaled", "84.6 against 84.9 (L)"),
    ("rates fall at every block", "tenth40_every_block", "83.9 against 84.9 (L)"),
    ("pre-trained with true mean", "tenth40_true_mean", "82.8 against 83.0 (B)"),
    ("pre-trained with consistent reversal", "tenth40_consistent", "not published"),
    ("All labels, 30 epochs", "", ""),
    ("from scratch", "full_scratch", ""),
    ("pre-trained for 40 epochs", "full40", ""),
    ("no scaling factor", "full40_unscaled", "84.6 against 84.9 (L)"),
    ("Linear probe, all labels", "", ""),
    ("scaling factor 0.25", "probe40", "60.2 (L)"),
    ("no scaling factor", "probe40_unscaled", "0.02 (L)"),
    ("true mean", "probe40_true_mean", ""),
    ("consistent reversal", "probe40_consistent", "not published"),
    ("A tenth of Tiny-ImageNet, 100 epochs", "", ""),
    ("from scratch", "tiny_scratch", ""),
    ("pre-trained for 200 epochs", "tiny", ""),
    ("probe, scaling factor 0.25", "tiny_probe", ""),
    ("probe, no scaling factor", "tiny_probe_unscaled", ""),
)

HEAD = """# Masked pre-training at a small size

Generated by `benchmarks/masked.py report` from recorded runs; do not edit. CIFAR-10 (a JPEG copy) and a tenth of
Tiny-ImageNet; FastVim of 12 blocks x 192, 64 patches of which 16 are seen; test images read once a run; nothing tuned.
`benchmarks/masked.py run` makes all of it again. Several runs shared a GPU, so minutes are not those of a run alone.

The recipe pre-trains for 200 epochs. All comparisons but the first start from 40, so that they fit the time there was.
Each seed has its own pre-training of 40 epochs; true mean and consistent reversal have one pre-training, and its
fine-tunings differ in seed.
"""


def report() -> None:
    """Write masked.md from the kept runs."""
    (HERE / "masked.md").write_text(page(load(JOBS, RECORDS)))


def page(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page's text."""
    lines = ["| run | top-1 % | seeds | minutes | paper, ImageNet |", "|---|--:|--:|--:|---|"]
    for title, rows in _groups():
        found = [row for row in rows if row[1] in runs]
        if found:
            lines.append(f"| **{title}** | | | | |")
            lines += [_row(name, runs[key], paper) for name, key, paper in found]
    losses = [
        "| pre-training | epochs | loss on test images | images/s | minutes |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in runs:
        if "pretrain" in name:
            losses += [_loss_row(record) for record in runs[name]]
    records = [record for found in runs.values() for record in found]
    end = f"{circumstances(records)}. Every record has its curve: `results/h100/masked/`."
    return "\n".join([HEAD, _verdict(runs), *lines, "", *losses, "", end]) + "\n"


def _groups() -> list[tuple[str, list[tuple[str, str, str]]]]:
    groups: list[tuple[str, list[tuple[str, str, str]]]] = []
    for row in ROWS:
        if row[1]:
            groups[-1][1].append(row)
        else:
            groups.append((row[0], []))
    return groups


def _row(title: str, records: list[dict[str, Any]], paper: str) -> str:
    values = [top1(record) for record in records]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    minutes = statistics.fmean(record["seconds"] for record in records) / 60
    each = ", ".join(f"{v:.2f}" for v in values)
    return (
        f"| {title} | {statistics.fmean(values):.2f}{spread} | {each} | {minutes:.1f} | {paper} |"
    )


def _loss_row(record: dict[str, Any]) -> str:
    rates = [x["images_per_second"] for x in record["log"] if "images_per_second" in x]
    return (
        f"| `{record['job']}` | {record['log'][-1]['epoch']:.0f} | {record['evaluation']['raw_loss']:.4f} | "
        f"{statistics.median(rates):,.0f} | {record['seconds'] / 60:.1f} |"
    )


def _verdict(runs: dict[str, list[dict[str, Any]]]) -> str:
    if "tenth_scratch" not in runs or not {"tenth", "tenth40"} & runs.keys():
        return "The comparison stated beforehand has not been run.\n"
    said = [
        "Stated beforehand: with a tenth of CIFAR-10's labels, pre-training must be ahead of training from scratch."
    ]
    scratch = [top1(record) for record in runs["tenth_scratch"]]
    for name, epochs in (("tenth40", 40), ("tenth", 200)):
        if name in runs:
            tuned = [top1(record) for record in runs[name]]
            ahead = statistics.fmean(tuned) - statistics.fmean(scratch)
            overlap = (
                "every seed of the one above every seed of the other"
                if min(tuned) > max(scratch)
                else "the seeds overlap"
            )
            said.append(
                f"After {epochs} epochs of it, it is {ahead:+.2f} points ahead ({len(tuned)} and {len(scratch)} seeds; "
                f"{overlap})."
            )
    return "\n".join(said) + "\n"


def main() -> int:
    """Run, collect or report."""
    return command_line(__doc__, JOBS, RECORDS, report)


if __name__ == "__main__":
    sys.exit(main())

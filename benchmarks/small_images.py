"""Keeps finished runs of experiments/cifar10 and experiments/tiny_imagenet, and makes small_images.md from them.

python benchmarks/small_images.py collect RUN_FOLDER ... --commit HASH
python benchmarks/small_images.py report
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS = HERE / "results" / "h100" / "small_images"
KEPT = ("epoch", "loss", "learning_rate", "grad_norm", "images_per_second", "seconds")

# What the paper reports for the same change at the size of ImageNet, top-1 %, model Small.
PAPER = {
    "cifar10/fastvim": 81.1,
    "cifar10/vim": 80.5,
    "cifar10/only_columns": 80.0,
    "cifar10/only_rows": 79.6,
    "cifar10/no_conv": 78.4,
    "cifar10/vit": 80.1,
    "cifar10/vit_pooled": 73.9,
    "cifar10/vit_pooled_conv": 74.0,
}


def collect(folder: Path, commit: str) -> None:
    """Keep what a finished run's folder says: circumstances, the log, the one evaluation."""
    starts = json.loads((folder / "environment.json").read_text())["starts"]
    config = json.loads((folder / "config.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = (line for line in lines if line["kind"] == "eval")
    arguments = list(starts[0]["command"][1:])
    if "--run-dir" in arguments:  # where it lay is nobody's business
        at = arguments.index("--run-dir")
        del arguments[at : at + 2]
    record = {
        "experiment": arguments[1],
        "seed": config["seed"],
        "command": " ".join(["fastvim", *arguments]),
        "device": starts[0]["device"]["kind"],
        "versions": starts[0]["versions"],
        "commit": commit,
        "started": [start["started"] for start in starts],
        "seconds": _duration(lines),
        "evaluation": {
            k: v for k, v in evaluation.items() if k.startswith(("raw", "ema", "count"))
        },
        "log": [
            {key: round(line[key], 6) for key in KEPT if key in line}
            for line in lines
            if line["kind"] == "train"
        ],
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    name = f"{record['experiment'].replace('/', '_')}_s{record['seed']}.json"
    text = json.dumps(record, indent=1)
    (RECORDS / name).write_text(text.replace("\n   ", " ").replace("\n  }", " }") + "\n")


def _duration(lines: list[dict[str, Any]]) -> float:
    """Seconds of training; the log's clock starts anew when a run is resumed."""
    times = [line["seconds"] for line in lines if line["kind"] == "train"]
    return times[-1] + sum(a for a, b in itertools.pairwise(times) if b < a)


def load() -> dict[str, list[dict[str, Any]]]:
    """Load the kept runs by experiment, in the order of PAPER."""
    runs = defaultdict(list)
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text())
        runs[record["experiment"]].append(record)
    order = [*PAPER, *sorted(set(runs) - set(PAPER))]
    return {name: runs[name] for name in order if name in runs}


def scores(runs: list[dict[str, Any]]) -> list[float]:
    """Top-1 % of the averaged weights, by seed."""
    return [100 * run["evaluation"]["ema_top1"] for run in sorted(runs, key=lambda r: r["seed"])]


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Write one row for each experiment."""
    lines = [
        "| experiment | top-1 % | seeds | epochs | final loss | minutes a run | paper, ImageNet |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in runs.items():
        values = scores(found)
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        each = ", ".join(f"{v:.2f}" for v in values)
        loss = statistics.fmean(run["log"][-1]["loss"] for run in found)
        minutes = statistics.fmean(run["seconds"] for run in found) / 60
        paper = f"{PAPER[name]}" if name in PAPER else ""
        lines.append(
            f"| `{name}` | **{statistics.fmean(values):.2f}**{spread} | {each} | {found[0]['log'][-1]['epoch']:.0f} "
            f"| {loss:.3f} | {minutes:.1f} | {paper} |"
        )
    return "\n".join(lines)


def comparisons(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Compare the paper's claims with the numbers of this size."""
    mean = {name: statistics.fmean(scores(found)) for name, found in runs.items()}
    pairs = (
        ("alternating pooling ahead of only columns", "cifar10/fastvim", "cifar10/only_columns"),
        ("alternating pooling ahead of only rows", "cifar10/fastvim", "cifar10/only_rows"),
        ("pooling costs Vim", "cifar10/vim", "cifar10/fastvim"),
        ("pooling costs ViT", "cifar10/vit", "cifar10/vit_pooled"),
        (
            "the same, with a convolution before the pooling",
            "cifar10/vit",
            "cifar10/vit_pooled_conv",
        ),
        ("the convolution brings FastVim", "cifar10/fastvim", "cifar10/no_conv"),
    )
    lines = ["| claim | points here | points in the paper |", "|---|--:|--:|"]
    for what, first, second in pairs:
        if first in mean and second in mean:
            paper = PAPER[first] - PAPER[second]
            lines.append(f"| {what} | {mean[first] - mean[second]:+.2f} | {paper:+.1f} |")
    return "\n".join(lines)


def plot(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Training loss by epoch, and every run's accuracy."""
    import matplotlib.pyplot as plt

    runs = {name: found for name, found in runs.items() if name.startswith("cifar10/")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for place, (name, found) in enumerate(runs.items()):
        colour = f"C{place}"
        for run in found:
            log = run["log"]
            label = name.removeprefix("cifar10/") if run is found[0] else None
            left.plot(
                [x["epoch"] for x in log], [x["loss"] for x in log], colour, lw=1, label=label
            )
        values = scores(found)
        right.plot(values, [place] * len(values), "o", color=colour, alpha=0.7)
    left.set(xlabel="epoch", ylabel="training loss (cutmix, smoothed labels)")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    right.set_yticks(range(len(runs)), [name.removeprefix("cifar10/") for name in runs])
    right.invert_yaxis()
    right.set(xlabel="test top-1 %, averaged weights, one point a seed")
    right.grid(alpha=0.3)
    figure.suptitle("CIFAR-10 (JPEG copy), one H100")
    figure.tight_layout()
    figure.savefig(HERE / "small_images.png", dpi=120)


def report() -> None:
    """Write small_images.md and its plot."""
    runs = load()
    plot(runs)
    records = [run for found in runs.values() for run in found]
    devices = sorted({f"{run['device']}, JAX {run['versions']['jax']}" for run in records})
    commits = sorted({f"{run['started'][0][:10]}, commit {run['commit'][:7]}" for run in records})
    parts = [
        "# CIFAR-10 and Tiny-ImageNet on one H100\n",
        "Generated by `benchmarks/small_images.py report` from recorded runs; do not edit. Fixed epochs, final\n"
        "averaged weights, the test images read once a run. The images are a JPEG copy of CIFAR-10 (quality 75), so a\n"
        "little below published figures; Tiny-ImageNet is a tenth of its training images (50 a class).\n",
        table(runs),
        "\nUp to seven runs shared the GPU, so the minutes are those of a seventh of it, about; alone, see below.\n",
        "![Training loss by epoch; test accuracy of every run](small_images.png)\n",
        "## The paper's claims at this size\n",
        comparisons(runs),
        "\nPositive: the first is ahead, or the second one's loss, in points of top-1 %.\n",
        (HERE / "small_images_notes.md").read_text(),
        f"{'; '.join(devices)}; {'; '.join(commits)}. Every record has\n"
        "its command, versions and log: `results/h100/small_images/`.\n",
    ]
    (HERE / "small_images.md").write_text("\n".join(parts))


def main() -> None:
    """Collect or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="keep finished runs")
    collecting.add_argument("folders", nargs="+", type=Path)
    collecting.add_argument("--commit", required=True, help="of the code that ran")
    commands.add_parser("report", help="write small_images.md")
    options = parser.parse_args()
    if options.command == "report":
        report()
    else:
        for folder in options.folders:
            collect(folder, options.commit)


if __name__ == "__main__":
    main()

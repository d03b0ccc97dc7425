"""Keep records of finished runs of experiments/cifar10 and experiments/tiny_imagenet, and write small_images.md.

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

from jobs import RESULTS, card, cards, one_of_each

HERE = Path(__file__).parent
TOPIC = "small_images"
KEPT = ("epoch", "loss", "learning_rate", "grad_norm", "images_per_second", "seconds")

# Top-1 % in the paper of models with the same changes, on ImageNet, size Small.
CHANGES = {
    "fastvim": 81.1,
    "vim": 80.5,
    "only_columns": 80.0,
    "only_rows": 79.6,
    "no_conv": 78.4,
    "vit": 80.1,
    "vit_pooled": 73.9,
    "vit_pooled_conv": 74.0,
}
NAMES = ("fastvim", "fastvim_fine", *(name for name in CHANGES if name != "fastvim"))
"""All experiments, in the order of the page. The paper has no model with a patch size like `fastvim_fine`'s."""
DATA = {"cifar10": "CIFAR-10", "tiny_imagenet": "Tiny-ImageNet"}
PAPER = {f"{data}/{name}": value for data in DATA for name, value in CHANGES.items()}


def collect(folder: Path, commit: str) -> None:
    """Write the record of a finished run: circumstances, log and its only evaluation."""
    starts = json.loads((folder / "environment.json").read_text())["starts"]
    config = json.loads((folder / "config.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = (line for line in lines if line["kind"] == "eval")
    arguments = list(starts[0]["command"][1:])
    if "--run-dir" in arguments:  # records name no folders of the machine
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
    records = RESULTS / card(record["device"]) / TOPIC
    records.mkdir(parents=True, exist_ok=True)
    name = f"{record['experiment'].replace('/', '_')}_s{record['seed']}.json"
    text = json.dumps(record, indent=1)
    (records / name).write_text(text.replace("\n   ", " ").replace("\n  }", " }") + "\n")


def _duration(lines: list[dict[str, Any]]) -> float:
    """Return the seconds of training, summed over all starts, because a resumed run's clock starts again at 0."""
    times = [line["seconds"] for line in lines if line["kind"] == "train"]
    return times[-1] + sum(a for a, b in itertools.pairwise(times) if b < a)


def load() -> dict[str, list[dict[str, Any]]]:
    """Load the kept runs of every card by experiment, in the order of NAMES."""
    runs = defaultdict(list)
    for path in one_of_each(RESULTS.glob(f"*/{TOPIC}/*.json")):
        record = json.loads(path.read_text())
        runs[record["experiment"]].append(record)
    order = [f"{data}/{name}" for data in DATA for name in NAMES]
    return dict(sorted(runs.items(), key=lambda item: order.index(item[0])))


def scores(runs: list[dict[str, Any]]) -> list[float]:
    """Return the top-1 % of the averaged weights, in the order of seeds."""
    return [100 * run["evaluation"]["ema_top1"] for run in sorted(runs, key=lambda r: r["seed"])]


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Write one row for each experiment."""
    lines = [
        "| experiment | top-1 % | seeds | epochs | final loss | minutes a run | card | paper, ImageNet |",
        "|---|--:|--:|--:|--:|--:|---|--:|",
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
            f"| {loss:.3f} | {minutes:.1f} | {cards(found)} | {paper} |"
        )
    return "\n".join(lines)


def comparisons(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Compare the paper's claims with the numbers of this size."""
    mean = {name: statistics.fmean(scores(found)) for name, found in runs.items()}
    pairs = (
        ("alternating pooling ahead of only columns", "fastvim", "only_columns"),
        ("alternating pooling ahead of only rows", "fastvim", "only_rows"),
        ("pooling costs Vim", "vim", "fastvim"),
        ("pooling costs ViT", "vit", "vit_pooled"),
        ("the same, with a convolution before the pooling", "vit", "vit_pooled_conv"),
        ("the convolution brings FastVim", "fastvim", "no_conv"),
    )
    lines = [
        f"| claim | {' | '.join(DATA.values())} | points in the paper |",
        "|---|" + "--:|" * (len(DATA) + 1),
    ]
    for what, first, second in pairs:
        named = [(f"{data}/{first}", f"{data}/{second}") for data in DATA]
        points = [f"{mean[a] - mean[b]:+.2f}" if {a, b} <= mean.keys() else "–" for a, b in named]
        paper = CHANGES[first] - CHANGES[second]
        lines.append(f"| {what} | {' | '.join(points)} | {paper:+.1f} |")
    return "\n".join(lines)


def plot(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Draw the training loss by epoch, and every run's accuracy."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(DATA), 2, figsize=(11, 4.2 * len(DATA)), layout="constrained")
    colours = {name: f"C{place}" for place, name in enumerate(NAMES)}
    for (left, right), (data, title) in zip(axes, DATA.items(), strict=True):
        here = {
            name.partition("/")[2]: found for name, found in runs.items() if name.startswith(data)
        }
        for place, (name, found) in enumerate(here.items()):
            for run in found:
                log = run["log"]
                label = name if run is found[0] else None
                epochs, losses = [x["epoch"] for x in log], [x["loss"] for x in log]
                left.plot(epochs, losses, colours[name], lw=1, label=label)
            values = scores(found)
            right.plot(values, [place] * len(values), "o", color=colours[name], alpha=0.7)
        left.set(xlabel="epoch", ylabel="training loss (mixed images, smoothed labels)")
        left.legend(fontsize=8)
        left.grid(alpha=0.3)
        right.set_yticks(range(len(here)), list(here))
        right.invert_yaxis()
        right.set(xlabel="test top-1 %, averaged weights, one point per seed")
        right.grid(alpha=0.3)
        used = cards([run for found in here.values() for run in found])
        left.set_title(f"{title}, {used}", loc="left")
    figure.savefig(HERE / "small_images.png", dpi=120)


def report() -> None:
    """Write small_images.md and its plot."""
    runs = load()
    plot(runs)
    (HERE / "small_images.md").write_text(page(runs))


def page(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page's text."""
    records = [run for found in runs.values() for run in found]
    devices = sorted({f"{run['device']}, JAX {run['versions']['jax']}" for run in records})
    commits = sorted({f"{run['started'][0][:10]}, commit {run['commit'][:7]}" for run in records})
    parts = [
        "# CIFAR-10 and Tiny-ImageNet\n",
        "Generated by `benchmarks/small_images.py report` from recorded runs; do not edit. Epochs are fixed, and the\n"
        "averaged weights are evaluated once, after the last epoch. CIFAR-10 is a JPEG copy (quality 75), so\n"
        "accuracies are a little below published ones. Tiny-ImageNet has a tenth of its training images\n"
        "(50 per class).\n",
        table(runs),
        "\nSeveral runs shared a GPU (up to seven on the H100), so minutes are longer than those of a run alone\n"
        "(below), and cannot be compared between cards.\n",
        "![Training loss by epoch; test accuracy of every run](small_images.png)\n",
        "## The paper's claims at this size\n",
        comparisons(runs),
        "\nPoints of top-1 % by which a claim holds; negative: the opposite holds.\n",
        (HERE / "small_images_notes.md").read_text(),
        f"{'; '.join(devices)}; {'; '.join(commits)}. Every record has\n"
        "its command, versions and log: `results/*/small_images/`.\n",
    ]
    return "\n".join(parts)


def main() -> None:
    """Collect or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="keep finished runs")
    collecting.add_argument("folders", nargs="+", type=Path)
    collecting.add_argument("--commit", required=True, help="commit of the code that ran")
    commands.add_parser("report", help="write small_images.md")
    options = parser.parse_args()
    if options.command == "report":
        report()
    else:
        for folder in options.folders:
            collect(folder, options.commit)


if __name__ == "__main__":
    main()

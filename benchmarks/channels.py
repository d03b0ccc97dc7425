"""Train the channel models on CIFAR-10 spread over 8 channels, on all GPUs of a host, and write channels.md.

    python benchmarks/channels.py prepare --data build/cifar10_channels
    python benchmarks/channels.py run --data build/cifar10_channels --runs build/channel_runs
    python benchmarks/channels.py report --runs build/channel_runs --commit HASH

The stand-in: a 32 x 32 image becomes 8 channels of the same size. Two signals of the image, its luma Y = (R + 2 G + B)
/ 4 and its opponent colour C = (R - G) / 2 + 128, are cut into blocks of 4 x 4 pixels. The block in row r and column c
goes to the channel of its signal, r mod 2 and c mod 2; elsewhere a channel is 0. So every channel shows a quarter of
the blocks of one signal (as a stain shows one compartment of a cell), no two channels overlap in a signal, and all 8
together are the image without its blue-yellow axis. It can show whether models use and miss channels as the paper says.
It can't show the paper's accuracies, nor anything about cells.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from jobs import RESULTS, Job, card, cards, circumstances, one_of_each, run

HERE = Path(__file__).resolve().parent
TOPIC = "channels"
NAMES = tuple(f"{signal}{row}{column}" for signal in "YC" for row in "01" for column in "01")
BLOCK = 4
NO_AUTOTUNING = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
"""XLA times variants of a program's products while it compiles. Sampling channels takes 8 programs for training and 5
for evaluation, so compiling took most of a run's time, and runs side by side disturbed each other's timings. Untimed
products must be cuBLAS's: Triton's have tiles of 16 x 8 then, and a step takes several times as long."""
SUBSETS = 6
"""Number of random subsets of 2, 4 and 6 channels that a model is evaluated on, besides all 8 and each one alone."""
MAIN = ("vit", "vim", "channelvit", "channelvim", "fastchannelvim")

CHANNEL_VIM = {"pooling": "none", "class_token": "middle"}
SORTED, UNSORTED, OFF = "sorted", "unsorted", "none"
ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    # name: (family, options of the model, channel sampling)
    "vit": ("vit", {}, OFF),
    "vim": ("vim", {}, OFF),
    "channelvit": ("channelvit", {}, UNSORTED),
    "channelvim": ("channel", CHANNEL_VIM, SORTED),
    "channelvim_unsorted": ("channel", CHANNEL_VIM, UNSORTED),
    "channelvim_spatial": ("channel", CHANNEL_VIM | {"scan_order": "spatial"}, SORTED),
    "channelvim_spatial_unsorted": ("channel", CHANNEL_VIM | {"scan_order": "spatial"}, UNSORTED),
    "fastchannelvim": ("channel", {}, SORTED),
    "fastchannelvim_unsorted": ("channel", {}, UNSORTED),
    "fastchannelvim_all_channels": ("channel", {}, OFF),
    "fastchannelvim_spatial": ("channel", {"scan_order": "spatial"}, SORTED),
    "fastchannelvim_max": ("channel", {"pooling": "max"}, SORTED),
    "fastchannelvim_attention": ("channel", {"pooling": "attention"}, SORTED),
    "fastchannelvim_two_axes": ("channel", {"pool_axes": "two_axes"}, SORTED),
    "fastchannelvim_two_axes_max": ("channel", {"pool_axes": "two_axes", "pooling": "max"}, SORTED),
}
PAPER = {  # JUMP-CP, model Small, patch 16, top-1 %: Tables 3 and 19 to 21
    "vit": 58.9, "vim": 61.0, "channelvit": 68.6, "channelvim": 73.5, "fastchannelvim": 73.6,
    "channelvim_unsorted": 69.4, "channelvim_spatial": 65.9, "channelvim_spatial_unsorted": 67.9,
    "fastchannelvim_max": 72.9, "fastchannelvim_attention": 73.1, "fastchannelvim_two_axes": 74.3,
    "fastchannelvim_two_axes_max": 73.5,
}  # fmt: skip


class Spread:
    """Read a source of RGB images as 8 complementary channels; see the module."""

    def __init__(self, source: Any):
        self.source, self.class_names = source, source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        from fastvim_jax.data import decode_image

        record = self.source[index]
        image = decode_image(record.image, channels=3, name=record.name)
        return dataclasses.replace(record, image=spread(np.asarray(image)))


def spread(rgb: np.ndarray) -> np.ndarray:
    """Turn uint8 `h w 3` into the stand-in's uint8 `h w 8`, channels in the order of NAMES."""
    red, green, blue = (rgb[..., i].astype(np.int32) for i in range(3))
    signals = ((red + 2 * green + blue) // 4, (red - green) // 2 + 128)
    row, column = (np.arange(n) // BLOCK % 2 for n in rgb.shape[:2])
    parts = [
        np.where((row[:, None] == r) & (column[None] == c), signal, 0)
        for signal in signals
        for r in (0, 1)
        for c in (0, 1)
    ]
    return np.stack(parts, axis=-1).astype(np.uint8)


def prepare(data: Path, workers: int) -> None:
    """Write the stand-in's shards and their statistics."""
    from fastvim_jax.data import open_source
    from fastvim_jax.data.multichannel import read_channels
    from fastvim_jax.data.prepare.shards import prepare as write
    from fastvim_jax.data.statistics import count_statistics, write_statistics

    for split in ("train", "test"):
        source = Spread(open_source("packed_npz", split, path="$FASTVIM_DATA_DIR/cifar10"))
        done = write(source, data, split, workers=workers)
        print(f"{split}: {done.records} records, {done.bytes / 1e6:.0f} MB", flush=True)
    records = open_source("array_record", "train", path=str(data))
    images = (read_channels(records[i].image, str(i)).pixels for i in range(0, len(records), 10))
    write_statistics(data, count_statistics(images, NAMES))


def config_of(row: str, seed: int, options: argparse.Namespace) -> Any:
    """Return the config of one row: 8 blocks of width 192 (attention: 4), patches of 4 pixels, the cell recipe."""
    from fastvim_jax.data import CellsData
    from fastvim_jax.models import VisionMambaConfig, ViTConfig
    from fastvim_jax.models.channel_mamba import ChannelMambaConfig
    from fastvim_jax.models.channel_vit import ChannelViTConfig
    from fastvim_jax.training import OptimizerConfig, TrainConfig

    family, changes, sampling = ROWS[row]
    shared: dict[str, Any] = {
        "image_size": 32, "patch_size": 4, "channels": 8, "num_classes": 10, "embed_dim": 192,
        "drop_path": 0.05, "dtype": "bfloat16",
    }  # fmt: skip
    attention = {"depth": 4, "num_heads": 3}  # With its MLP, a block is as large as two of Mamba's.
    mamba = {
        "depth": 8,
        "activations": "compute",
        "remat": "block",
    }  # without remat: 40 GB at 8 channels
    model: Any = {
        "vit": lambda: ViTConfig(**shared, **attention),
        "vim": lambda: VisionMambaConfig(**shared, **mamba, **CHANNEL_VIM),
        "channelvit": lambda: ChannelViTConfig(**shared, **attention),
        "channel": lambda: ChannelMambaConfig(**shared, **mamba, **changes),
    }[family]()
    cells = CellsData(
        path=str(options.data), train_split=f"train[:{options.images}]",
        eval_split=f"test[:{options.test_images}]", channels=8, channel_names=NAMES, image_size=32, batch_size=256,
        eval_batch_size=min(500, options.test_images), workers=options.workers,
        channel_sampling=sampling, flip=0.0, defocus=0.0,
        dropout=0.5, dropout_size=8,
    )  # fmt: skip
    optimizer = OptimizerConfig(
        learning_rate=2e-3, learning_rate_scaling="none", warmup_epochs=1.0, warmup_start=0.0,
        final_learning_rate=1e-6, weight_decay=0.04, weight_decay_end=0.4, decay_groups="cell",
    )  # fmt: skip
    return TrainConfig(
        model=model, data=cells, optimizer=optimizer, epochs=options.epochs, seed=seed, ema_decay=None,
        label_smoothing=0.0, evaluate_every_epochs=0, checkpoint_every_steps=10**6,
    )  # fmt: skip


def subsets() -> list[tuple[str, ...]]:
    """List the subsets of channels that models are evaluated on, the same ones for every model."""
    rng = np.random.default_rng(0)
    chosen: list[tuple[str, ...]] = [NAMES]
    for size in (6, 4, 2):
        picks = {tuple(sorted(rng.choice(8, size, replace=False))) for _ in range(SUBSETS)}
        chosen += [tuple(NAMES[i] for i in pick) for pick in sorted(picks)]
    return chosen + [(name,) for name in NAMES]


def train_one(row: str, seed: int, options: argparse.Namespace) -> None:
    """Train one row, evaluate it on every subset, and write the scores to the run's folder."""
    from fastvim_jax.inference.channel_scores import score_subsets
    from fastvim_jax.training import train

    folder = options.runs / f"{row}_s{seed}"
    started = time.perf_counter()
    result = train(config_of(row, seed, options), folder, progress=False)
    trained = time.perf_counter() - started
    # A run that is stopped now keeps what it has: the score of all channels.
    whole = {"channels": NAMES, "count": options.test_images, "top1": result.metrics["raw_top1"]}
    record = {
        "row": row, "seed": seed, "epochs": options.epochs, "images": options.images,
        "train_seconds": round(trained, 1), "top1": whole["top1"], "subsets": [whole],
    }  # fmt: skip
    (folder / "channels.json").write_text(json.dumps(record, indent=1))
    scores = score_subsets(folder, subsets())
    record["subsets"] = [{"channels": s.channels, "count": s.count, "top1": s.top1} for s in scores]
    (folder / "channels.json").write_text(json.dumps(record, indent=1))
    print(f"{row} seed {seed}: {100 * record['top1']:.2f} % in {trained:.0f} s", flush=True)


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """List the runs: the main rows with all seeds, then the other rows with one seed."""
    pairs = [(row, seed) for row in MAIN for seed in range(options.seeds)]
    pairs += [(row, 0) for row in ROWS if row not in MAIN]
    return [
        Job(
            f"{row}_s{seed}",
            (
                str(Path(__file__).resolve()), "one", row, str(seed), "--data", str(options.data), "--runs", "{runs}",
                "--epochs", str(options.epochs), "--images", str(options.images),
                "--test-images", str(options.test_images), "--workers", str(options.workers),
            ),
            like=f"{row}_s0" if seed else "",
            environment=(("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {NO_AUTOTUNING}".strip()),),
        )
        for row, seed in pairs
        if not options.only or row in options.only
    ]  # fmt: skip


def collect(runs: Path, commit: str) -> None:
    """Write the scores of finished runs to `results`, with the machine on which they ran."""
    for file in sorted(runs.glob("*/channels.json")):
        record = json.loads(file.read_text())
        start = json.loads((file.parent / "environment.json").read_text())["starts"][0]
        record |= {"device": start["device"]["kind"], "versions": start["versions"]}
        record |= {"started": start["started"], "commit": commit}
        text = json.dumps(record, indent=1).replace("\n    ", " ").replace("\n   ", " ")
        records = RESULTS / card(record["device"]) / TOPIC
        records.mkdir(parents=True, exist_ok=True)
        (records / f"{record['row']}_s{record['seed']}.json").write_text(text + "\n")


def report() -> None:
    """Write channels.md and its plot from the kept records."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in one_of_each(RESULTS.glob(f"*/{TOPIC}/*.json")):
        record = json.loads(file.read_text())
        found.setdefault(record["row"], []).append(record)
    rows = {name: found[name] for name in ROWS if name in found}
    sizes = (8, 6, 4, 2, 1)
    lines = [
        "| model | channels in training | all 8 | 6 | 4 | 2 | 1 | seconds | card | paper, JUMP-CP |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|--:|",
    ]
    for name, records in rows.items():
        cells = [_by_size(records, size) for size in sizes]
        sampling = {"none": "all", "sorted": "sampled, sorted", "unsorted": "sampled, unsorted"}
        seconds = np.mean([r["train_seconds"] for r in records])
        lines.append(
            f"| {name} | {sampling[ROWS[name][2]]} | {' | '.join(cells)} | {seconds:.0f} | {cards(records)} | "
            f"{PAPER.get(name, '')} |"
        )
    single = ["| model | " + " | ".join(NAMES) + " |", "|---|" + "--:|" * len(NAMES)]
    for name, records in rows.items():
        if any(len(each["channels"]) == 1 for record in records for each in record["subsets"]):
            values = [_mean(records, lambda c, n=n: c == [n]) for n in NAMES]
            single.append(f"| {name} | " + " | ".join(f"{v:.1f}" for v in values) + " |")
    first = next(iter(rows.values()))[0]
    seeds = max(len(r) for r in rows.values())
    parts = [
        "# Channel models on CIFAR-10 spread over 8 channels\n",
        "Generated by `benchmarks/channels.py report` from recorded runs; do not edit.\n",
        (__doc__ or "").split("The stand-in:")[1].strip() + "\n",
        f"8 blocks of width 192 (ViT and ChannelViT: 4), patches of 4, {first['epochs']} epochs of the first "
        f"{first['images']:,} training images, top-1 % of the test\n"
        f"images: mean ± standard deviation over {seeds} seeds where a row has several, else one seed. Columns: all 8\n"
        "channels, and the mean over random subsets of 6, 4 and 2 channels (the same for all rows) and over all\n"
        "single ones (–: stopped before). Models without channel embeddings see missing channels at their mean.\n",
        "\n".join(lines) + "\n",
        *_said(rows),
        "## One channel alone\n",
        "\n".join(single) + "\n",
        "![Accuracy by number of channels](channels.png)\n",
        f"{circumstances([record for records in rows.values() for record in records])}. "
        "`python benchmarks/channels.py prepare`, `run`, `report`, as in the file's head.\n",
    ]
    (HERE / "channels.md").write_text("\n".join(parts))
    _plot(rows, sizes)


CHANCE = 12.0
"""Percent below which a model of 10 classes counts as not having learnt."""


def _said(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Say what the rows show, as a list of paragraphs."""
    size = lambda name, n: _mean(rows[name], lambda channels: len(channels) == n)  # noqa: E731
    said = []
    if {"fastchannelvim", "fastchannelvim_all_channels"} <= rows.keys():
        sampled, whole = (
            f"from {size(name, 8):.1f} to {size(name, 4):.1f} %"
            for name in ("fastchannelvim", "fastchannelvim_all_channels")
        )
        said.append(
            f"- With half of the channels missing, FastChannelVim trained with sampling goes {sampled}, trained on all "
            f"channels {whole} (seeds: {len(rows['fastchannelvim'])} and {len(rows['fastchannelvim_all_channels'])})."
        )
    if {"fastchannelvim", "fastchannelvim_spatial"} <= rows.keys():
        first, spatial = (size(name, 8) for name in ("fastchannelvim", "fastchannelvim_spatial"))
        said.append(
            f"- Scan order: channel-first {first:.1f} %, spatial-first {spatial:.1f} % (seeds: "
            f"{len(rows['fastchannelvim'])} and {len(rows['fastchannelvim_spatial'])}). The paper has ChannelVim the "
            f"other way round ({PAPER['channelvim']} and {PAPER['channelvim_spatial']} %)."
        )
    if stuck := [name for name in rows if size(name, 8) < CHANCE]:
        said.append(
            f"- Near chance, for they hardly began to learn in so few steps: {', '.join(stuck)}. A step with sampling "
            "sees 4.5 channels on average, so such rows are behind rows of as many epochs on all channels, and the "
            "order of the rows is that of models at the beginning of their training."
        )
    if missing := [name for name in ROWS if name not in rows]:
        said.append(f"- Not recorded: {', '.join(missing)}.")
    return ["\n".join(said) + "\n"] if said else []


def _mean(records: list[dict[str, Any]], wanted: Any) -> float:
    return 100 * float(
        np.mean([s["top1"] for r in records for s in r["subsets"] if wanted(s["channels"])])
    )


def _by_size(records: list[dict[str, Any]], size: int) -> str:
    has = lambda record: any(len(each["channels"]) == size for each in record["subsets"])  # noqa: E731
    values = [_mean([record], lambda c: len(c) == size) for record in records if has(record)]
    if not values:
        return "–"
    spread_of = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread_of}"


def _plot(rows: dict[str, list[dict[str, Any]]], sizes: tuple[int, ...]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in (*MAIN, "fastchannelvim_unsorted", "fastchannelvim_all_channels"):
        if name in rows:
            values = [_mean(rows[name], lambda c, s=s: len(c) == s) for s in sizes]
            axes.plot(sizes, values, "o-", label=name)
    axes.set(xlabel="channels in evaluation", ylabel="top-1 %", title="Mean over subsets")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(HERE / "channels.png", dpi=120)


def main() -> int:
    """Prepare, run or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="write the stand-in's shards")
    running = commands.add_parser("run", help="train all rows")
    one = commands.add_parser("one", help="train one row")
    reporting = commands.add_parser("report", help="write channels.md")
    one.add_argument("row", choices=ROWS)
    one.add_argument("seed", type=int)
    for each in (preparing, running, one):
        each.add_argument("--data", type=Path, required=True, help="folder of the shards")
        each.add_argument("--workers", type=int, default=12)
    for each in (running, one, reporting):
        each.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    for each in (running, one):
        each.add_argument("--epochs", type=int, default=8)
        each.add_argument("--images", type=int, default=50000, help="training images")
        each.add_argument("--test-images", type=int, default=10000)
    running.add_argument("--devices", default="0,1,2,3", help="GPU numbers")
    running.add_argument(
        "--share", type=float, default=1.0, help="part of a GPU per run; 0.25: four at a time"
    )
    running.add_argument("--seeds", type=int, default=3, help="seeds of the five main rows")
    running.add_argument("--only", nargs="*", choices=ROWS)
    running.add_argument("--seconds", type=float, default=3600.0, help="then runs are stopped")
    reporting.add_argument("--commit", required=True, help="commit of the code that ran")
    options = parser.parse_args()
    if options.command == "prepare":
        prepare(options.data, options.workers)
    elif options.command == "one":
        train_one(options.row, options.seed, options)
    elif options.command == "run":
        devices = options.devices.split(",")
        run(jobs_of(options), options.runs, devices, options.seconds, options.share)
    else:
        collect(options.runs, options.commit)
        report()
    return 0


if __name__ == "__main__":
    sys.exit(main())

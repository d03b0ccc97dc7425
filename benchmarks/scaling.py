"""Write the tables of docs/scaling.md from recorded measurements: `python benchmarks/scaling.py`.

Measured: images per second of a step of 128 images on one H100 (`results/h100/train_*.json`), images per second that a
core decodes (`results/cpu/data_*.json`), bytes that devices send (`results/cpu/collectives*.json`), checkpoints
(`results/cpu/checkpoint.json`), steps on several GPUs (`results/h200/scaling/*.json`, and of four `scaling_four`).
Assumed: the bandwidths below.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "scaling.md"
MARKS = "<!-- generated: begin{} -->", "<!-- generated: end{} -->"

IMAGES, EVALUATED, EPOCHS = 1_281_167, 50_000, 300
BATCH = 128  # images per GPU
HOST = 8  # GPUs per host
IN_HOST, BETWEEN_HOSTS = 300e9, 50e9
"""Assumed bandwidth of a reduction, bytes per second and GPU: NVLink within a host, 400 Gbit/s between hosts."""
GPUS = (1, 8, 64, 256)
RECORD_BYTES = {"pixels": 267_900, "jpeg": 38_200}
"""Mean size of a record of the 41 photographs that `feed.py` prepares."""


def load(name: str) -> Any:
    """Read a record."""
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def step_rate(name: str) -> float:
    """Return the images per second of the recorded step of 128 images."""
    return next(r["images_per_s"] for r in load(f"h100/{name}")["rows"] if r["batch"] == BATCH)


def core_rate(name: str) -> float:
    """Return the images per second that a core prepares. The device augments, and it crops images of pixel shards."""
    rows = load(f"cpu/data_{name}")["rows"]
    return next(r["per_core"] for r in rows if r["what"] == "whole" and r["with"] != "pillow")


def reduced_bytes(name: str) -> float:
    """Return the bytes that data-parallel training reduces in a step."""
    rows = load(f"cpu/{name}")["rows"]
    return sum(r["bytes"] for r in rows if r["fsdp"] == 1 and r["kind"] == "all-reduce")


def checkpoint_times(name: str) -> str:
    """Return the seconds that a checkpoint of a model holds up the loop, and the seconds until it is written."""
    row = next(r for r in load("cpu/checkpoint")["rows"] if r["model"] == name)
    return f"{row['held_ms'] / 1e3:.1f} / {row['written_ms'] / 1e3:.1f}"


def epoch_table(model: str, rate: float, sent: float, checkpoint: str) -> list[str]:
    """Return the lines of a table with the cost of an epoch by number of GPUs.

    Args:
        model: name of the model.
        rate: images per second of one GPU.
        sent: bytes that are reduced per step.
        checkpoint: seconds of one checkpoint, see `checkpoint_times`.
    """
    lines = [
        f"**{model}**, {rate:,.0f} images/s per GPU, {sent / 1e6:.1f} MB reduced per step:", "",
        "| GPUs | batch | step, ms | steps of an epoch, s | reduction, s | share if not overlapped | cores, pixels | "
        "cores, JPEG | reading, GB/s: pixels / JPEG | checkpoint, s | 300 epochs, h |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    pixels, jpeg = core_rate("pixels"), core_rate("jpeg")
    for gpus in GPUS:
        steps = IMAGES // (BATCH * gpus)
        step = BATCH / rate
        link = IN_HOST if gpus <= HOST else BETWEEN_HOSTS
        reduction = 2 * (gpus - 1) / gpus * sent / link
        total = rate * gpus
        hours = EPOCHS * steps * (step + reduction) / 3600
        read = " / ".join(f"{total * size / 1e9:,.1f}" for size in RECORD_BYTES.values())
        lines.append(
            f"| {gpus} | {BATCH * gpus:,} | {1e3 * step:.1f} | {steps * step:.1f} | {steps * reduction:.1f} | "
            f"{reduction / step:.0%} | {total / pixels:,.0f} | {total / jpeg:,.0f} | {read} | {checkpoint} | "
            f"{hours:.2f} |"
        )
    return [*lines, ""]


def tables() -> str:
    """Return all tables as Markdown."""
    lines: list[str] = []
    tiny, small = step_rate("train_tiny"), step_rate("train_small")
    sent = reduced_bytes("collectives")
    lines += epoch_table("FastVim-T", tiny, sent, checkpoint_times("fastvim_tiny_patch16_224"))
    # Nearly all reduced bytes are float32 gradients, so they are proportional to the number of parameters.
    lines += epoch_table(
        "FastVim-S",
        small,
        sent * 25_832_680 / 7_166_056,
        checkpoint_times("fastvim_small_patch16_224"),
    )
    needed = EPOCHS * IMAGES / 86400
    pixels, jpeg = core_rate("pixels"), core_rate("jpeg")
    images, hours = EPOCHS * IMAGES, EPOCHS * IMAGES / tiny / 3600
    lines += [
        f"A day for FastVim-T: {EPOCHS} epochs are {images / 1e6:,.0f} million images, so {needed:,.0f} images/s; one "
        f"H100 takes {tiny:,.0f}, so its steps are {hours:.1f} h. Cores for {needed:,.0f} images/s: "
        f"{needed / pixels:.1f} from shards of pixels, {needed / jpeg:.1f} from JPEG shards; to keep the H100 busy "
        f"{tiny / pixels:.1f} and {tiny / jpeg:.1f}.",
        "",
    ]
    lines += [
        "| experiment | mesh | collective | in a step | MB on a device |",
        "|---|---|---|--:|--:|",
    ]
    for name in ("collectives", "collectives_base"):
        record = load(f"cpu/{name}")
        lines += [
            f"| {record['experiment']} | data {r['data']}, fsdp {r['fsdp']} | {r['kind']} | {r['count']} | "
            f"{r['bytes'] / 1e6:.1f} |"
            for r in record["rows"]
        ]
    return "\n".join(lines) + "\n"


def reduction_table() -> str:
    """Return the table of loss curves with gradients summed in float32 and in bfloat16."""
    rows = load("cpu/reduction")["rows"]
    shown = [step for i, step in enumerate(rows[0]["step"]) if i % 5 == 4]
    lines = [
        f"| seed, sums | {' | '.join(f'step {step}' for step in shown)} | test loss | test top-1, % |",
        "|---|" + "--:|" * (len(shown) + 2),
    ]
    for row in rows:
        losses = [f"{row['loss'][row['step'].index(step)]:.4f}" for step in shown]
        lines.append(
            f"| {row['seed']}, {row['reduction']} | {' | '.join(losses)} | {row['eval_loss']:.4f} | "
            f"{100 * row['eval_top1']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def several_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of steps on one and on several GPUs, from the rows of `several_gpus.py`.

    A step is compared with that of the same model and batch on one GPU, on the first GPU of the host.
    """
    lines = [
        "| model, blocks | batch per GPU | mesh | ms | images/s per GPU | of one GPU's | computing, ms "
        "| only reducing, ms | idle, ms | clock, MHz | state on a GPU, MB | peak on a GPU, GB |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    # Without the other GPUs of the host, which ran the first GPU's program once more.
    timed = [row for row in rows if "ms" in row and "after" not in row]
    kinds = list(dict.fromkeys(map(_kind, timed)))
    for row in sorted(timed, key=lambda row: (kinds.index(_kind(row)), row["mesh"] != "one")):
        alone = [r for r in timed if r["mesh"] == "one" and _kind(r) == _kind(row)]
        held = row["state_bytes_in_use"]
        share, state = "–", f"{held / 1e6:,.0f}"
        if row["mesh"] != "one" and alone:
            share = f"**{alone[0]['ms'] / row['ms']:.3f}**"
            state += f" ({held / alone[0]['state_bytes_in_use']:.2f})"
        parts = [_mean_part(row, name) for name in ("computing", "only_collectives", "idle")]
        lines.append(
            f"| {_model_name(row['model'])}, {row['blocks']}{_remat(row)} | {row['batch']} | {row['mesh']} "
            f"| {row['ms']:.2f} | {row['images_per_s_of_a_device']:,.0f} | {share} | {' | '.join(parts)} | "
            f"{_clocks(row)} | {state} | "
            f"{max(row['peak_bytes_in_use']) / 1e9:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _kind(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a step has in common with the steps that it is compared with."""
    return tuple(row[name] for name in ("model", "batch", "blocks", "remat"))


def _model_name(model: str) -> str:
    return "FastVim-" + model.split("_")[1][0].upper()


def _remat(row: dict[str, Any]) -> str:
    return "" if row["remat"] == "none" else f", remat {row['remat']}"


def _mean_part(row: dict[str, Any], name: str) -> str:
    """Write the mean over GPUs of a part of the step's time, or – where no profile was made."""
    found = [each[name] for each in row.get("overlap", {}).values()]
    return f"{statistics.fmean(found):.2f}" if found else "–"


def _clocks(row: dict[str, Any]) -> str:
    """Write the mean clock of each of the row's GPUs while it was timed, or – where none was recorded."""
    seen = row.get("times_clocks", [])
    means = [
        statistics.fmean(each[gpu]["mhz"] for each in seen)
        for gpu in row.get("gpus", "").split(",")
        if seen and all(gpu in each for each in seen)
    ]
    return ", ".join(f"{mean:,.0f}" for mean in means) or "–"


def several_rows(folder: str) -> list[dict[str, Any]]:
    """Return the rows of all records of `several_gpus.py` in this folder of `results/h200`."""
    files = sorted((HERE / "results" / "h200" / folder).glob("*.json"))
    records = [json.loads(file.read_text()) for file in files]
    return [
        row for record in records if record["bench"] == "several_gpus" for row in record["rows"]
    ]


def updated(page: str) -> str:
    """Return the page with its tables as the records are now.

    Raises:
        ValueError: the page has no place for a table.
    """
    parts = {"": tables(), " reduction": reduction_table()}
    for name, folder in ((" two", "scaling"), (" several", "scaling_four")):
        if rows := several_rows(folder):
            parts[name] = several_table(rows)
    for name, table in parts.items():
        begin, end = (mark.format(name) for mark in MARKS)
        before, found, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise ValueError(f"{PAGE.name} has no lines {begin} and {end}")
        page = f"{before}{begin}\n{table}{end}{after}"
    return page


def main() -> None:
    """Put the tables into the page."""
    PAGE.write_text(updated(PAGE.read_text()))


if __name__ == "__main__":
    main()

"""Write the tables and the plot of models of benchmarks/README.md, each from the rows of one card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from targets import (
    BATCHES,
    PAPER,
    PEER,
    PIXELS,
    REQUIRED_ON,
    Row,
    clock_images_per_s,
    device_images_per_s,
    find,
    half_mode,
    number,
    way,
)

from pallas_kernels.selective_scan import bench
from pallas_kernels.selective_scan.arg_specs import ScanSpec


def table(header: list[str], rows: list[list[str]]) -> str:
    """Write a table in Markdown."""
    if not rows:
        return "Not measured.\n"
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _spread(r: Row, digits: int = 4) -> str:
    return f"{r['fastest']:.{digits}f}–{r['slowest']:.{digits}f}"


def _milliseconds(r: Row) -> str:
    return f"{r['median']:.4f}" if r["median"] < 1 else f"{r['median']:.2f}"


def _floor(r: Row, *names: str) -> str:
    """Return the largest of some lower bounds, or "–": records of a card with unknown peak rates have no bounds."""
    return f"{max(r[name] for name in names):.3f}" if names[0] in r else "–"


# Columns of the scan's table after the shape: heading, the row that it reads, and its text.
_KERNEL = {"dtype": "float32", "implementation": "pallas"}
_XLA = {"dtype": "float32", "implementation": "xla_associative"}
_TRITON = {"dtype": "float32", "implementation": "triton"}
_LOOP = {"dtype": "float32", "implementation": "xla_sequential"}
SCAN_COLUMNS: tuple[tuple[str, Row, Callable[[Row], str]], ...] = (
    ("Pallas f32, ms", _KERNEL, lambda r: f"**{_milliseconds(r)}**"),
    ("spread", _KERNEL, lambda r: _spread(r)),
    ("warm", _KERNEL, lambda r: f"{r['warm']:.4f}" if r["warm"] else "–"),
    ("floor", _KERNEL, lambda r: _floor(r, "floor_memory_ms", "floor_exponentials_ms")),
    ("GB/s", _KERNEL, lambda r: f"{r['GB_per_s']:.0f}"),
    ("GFLOP/s", _KERNEL, lambda r: f"{r['GFLOP_per_s']:.0f}" if "GFLOP_per_s" in r else "–"),
    ("temporary, MB", _KERNEL, lambda r: f"{r['temporary_bytes'] / 1e6:.0f}"),
    ("compile, s", _KERNEL, lambda r: f"{r['compile_seconds']:.1f}"),
    ("error", _KERNEL, lambda r: f"{r['error']:.0e}"),
    ("Pallas bf16", _KERNEL | {"dtype": "bfloat16"}, _milliseconds),
    ("Triton f32", _TRITON, _milliseconds),
    ("associative (XLA)", _XLA, _milliseconds),
    ("step by step (XLA)", _LOOP, _milliseconds),
)


def scan_table(rows: list[Row]) -> str:
    """Tabulate the times of kernel, XLA and peer by shape."""
    body = []
    for shape in _shapes(rows):
        for gradient in (False, True):
            line = ["×".join(map(str, shape)), way(gradient)]
            for _, wanted, text in SCAN_COLUMNS:
                found = find(rows, shape=list(shape), gradient=gradient, **wanted)
                line.append(text(found[0]) if found else "–")
            here = shape in PEER and rows[0]["card"] == REQUIRED_ON
            line.append(f"{PEER[shape][gradient]:.3f}" if here else "–")
            body.append(line)
    headings = [heading for heading, _, _ in SCAN_COLUMNS]
    return table(["batch×length×channels", "", *headings, "mamba CUDA, eager"], body)


def _shapes(rows: list[Row]) -> list[tuple[int, int, int]]:
    return sorted({tuple(r["shape"]) for r in rows}, key=lambda s: (s[1], -s[0]))


def steps_table(rows: list[Row]) -> str:
    """Tabulate how many steps of a scan run one after the other, by length."""
    body = [
        ["×".join(map(str, s["shape"])), *(str(s[k]) for k in list(s)[1:])]
        for s in bench.steps([ScanSpec(*shape, D=False) for shape in _shapes(rows)])
    ]
    header = ["step by step", "ideal parallel scan", "associative (XLA, in runs)", "Pallas kernel"]
    return table(["batch×length×channels", *header], body)


def pair_table(rows: list[Row]) -> str:
    """Tabulate a mixer's two directions, one after the other and in one launch."""
    body = []
    for shape in _shapes(rows):
        for dtype in ("float32", "bfloat16"):
            for gradient in (False, True):
                found = [
                    find(rows, shape=list(shape), dtype=dtype, gradient=gradient, scans=scans)
                    for scans in ("one by one", "at once")
                ]
                times = [f"{f[0]['median']:.4f}" if f else "–" for f in found]
                body.append(["×".join(map(str, shape)), dtype, way(gradient), *times])
    return table(["batch×length×channels", "", "", "one by one, ms", "at once, ms"], body)


def core_table(rows: list[Row]) -> str:
    """Tabulate the mixer core by resolution."""
    rows = sorted(rows, key=lambda r: (r["dtype"] != "float32", r["pixels"], r["gradient"]))
    return table(
        ["pixels", "precision", "", "ms", "spread", "floor", "temporary, MB", "error", "longest kernels, ms"],
        [
            [
                str(r["pixels"]),
                r["dtype"],
                way(r["gradient"]),
                f"**{r['median']:.3f}**",
                _spread(r, 3),
                _floor(r, "floor_memory_ms"),
                f"{r['temporary_bytes'] / 1e6:.0f}",
                f"{r['error']:.0e}",
                ", ".join(
                    f"{name.removesuffix('_mosaic_gpu_kernel')[:40]} {value:.3f}"
                    for name, value in list(r["kernels"].items())[:4]
                ),
            ]
            for r in rows
        ],
    )  # fmt: skip


def stage_table(rows: list[Row]) -> str:
    """Tabulate the stages of Table 23: our times, and the paper's in brackets."""
    body = []
    for model, stage in PAPER:
        line = [model, stage]
        for pixels, paper in zip(PIXELS, PAPER[model, stage], strict=True):
            found = find(rows, model=model, part=stage, pixels=pixels, gradient=False)
            line.append(f"**{found[0]['median']:.3f}** ({paper})" if found else f"– ({paper})")
        body.append(line)
    for model in ("fastvim", "vim"):
        line = [model, "total, forward + backward"]
        for pixels in PIXELS:
            found = find(rows, model=model, part="total", pixels=pixels, gradient=True)
            line.append(f"**{found[0]['median']:.3f}**" if found else "–")
        body.append(line)
    return (
        table(["", "stage", *(f"{p} px, ms" for p in PIXELS)], body) if rows else "Not measured.\n"
    )


def model_table(rows: list[Row]) -> str:
    """Tabulate models or training steps: images per second, times, memory, compilation, error."""
    order = {"bf16": 0, "tf32": 1, "f32": 2}
    rows = sorted(rows, key=lambda r: (r["model"], order[r["precision"]], r["pixels"], -r["batch"]))
    optional = lambda r, key, digits: f"{r[key]:.{digits}f}" if key in r else "–"  # noqa: E731
    error = lambda r: r.get("error", r.get("gradient_error"))  # noqa: E731
    return table(
        ["model", "pixels", "batch", "precision", "blocks", "images/s, device", "device, ms", "images/s, clock",
         "clock, ms", "spread", "one call and wait, ms", "peak, MB", "trace + compile, s", "error"],
        [
            [
                r["model"].split("_patch")[0],
                str(r["pixels"]),
                str(r["batch"]),
                _mode(r),
                r["blocks"],
                f"**{device_images_per_s(r):,.0f}**" if "device_ms" in r else "–",
                optional(r, "device_ms", 3) + _device_spread(r),
                number(clock_images_per_s(r)),
                *_clock(r),
                f"{r['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in r else "–",
                f"{r['trace_seconds'] + r['compile_seconds']:.0f}" if "trace_seconds" in r else "–",
                f"{error(r):.0e}" if error(r) is not None else "–",
            ]
            for r in rows
        ],
    )  # fmt: skip


def _clock(r: Row) -> list[str]:
    """Return the cells of wall-clock times: a step's, their spread, one call's. Other programs make them useless."""
    if not r.get("quiet", True):
        return ["–"] * 3
    call = f"{r['latency_ms']:.2f}{_same_weights(r)}" if "latency_ms" in r else "–"
    return [f"{r['ms']:.2f}", f"{r['fastest_ms']:.2f}–{r['slowest_ms']:.2f}", call]


def _same_weights(r: Row) -> str:
    return ", same weights" if "latency_ms" in r and "rotated" not in r else ""


def _device_spread(r: Row) -> str:
    if "device_fastest_ms" not in r:
        return ""
    return f" ({r['device_fastest_ms']:.3f}–{r['device_slowest_ms']:.3f})"


def plot_models(rows: list[Row], name: str, file: Path) -> bool:
    """Draw images per second of the card `name` over the resolution. Return whether there was anything to draw."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for model, precision in sorted({(r["model"], r["precision"]) for r in rows}):
        here = [
            r for r in find(rows, model=model, precision=precision)
            if r["batch"] == BATCHES.get(r["pixels"])
        ]  # fmt: skip
        best = {
            r["pixels"]: max(device_images_per_s(x) for x in find(here, pixels=r["pixels"]))
            for r in here
        }
        if len(best) > 1:
            label = f"{model.split('_patch')[0]}, {precision}"
            axis.loglog(sorted(best), [best[p] for p in sorted(best)], "o-", label=label)
    drawn = bool(axis.lines)
    if drawn:
        title = f"Forward passes, one {name.upper()}"
        axis.set(xlabel="pixels per side", ylabel="images per second", title=title)
        axis.set_xticks(PIXELS, [str(p) for p in PIXELS])
        axis.set_xticks([], minor=True)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
        figure.tight_layout()
        figure.savefig(file, dpi=120)
    plt.close(figure)
    return drawn


def _mode(row: Row) -> str:
    """Return a row's precision and, for bf16, its mode."""
    return row["precision"] + (f", {half_mode(row)}" if row["precision"] == "bf16" else "")


def recipe_section(rows: list[Row]) -> str:
    """Write the rows of `fastvim bench train --recipe`, if there are any."""
    if not rows:
        return ""
    about = (
        "The same with the recipe's step, which adds uint8 images, flip, RandAugment, erasing and mixing on the "
        "device, drop path, and averaged weights.\n"
    )
    return f"{about}\n{model_table(rows)}"


def fallback_table(rows: list[Row]) -> str:
    """Tabulate what falls back, its time per token and block, and that of the nearest one that runs fused."""

    def side(row: Row, place: int) -> str:
        options = row["fused" if place else "options"]
        said = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"{row['pixels'][place]} px" + (f", {said}" if said else "")

    body = [
        [r["title"], r["model"], side(r, 0), f"{r['ns']:.2f}", side(r, 1), f"{r['fused_ns']:.2f}",
         f"**{r['cost']:.1f} ×**", "" if r.get("quiet", True) else "yes"]
        for r in rows
    ]  # fmt: skip
    header = ["what falls back", "model", "as", "ns", "fused", "ns", "cost", "beside compilers"]
    return table(header, body)


def largest_table(rows: list[Row]) -> str:
    """Tabulate the batches that were tried to find the largest that fits."""
    body = [
        [
            r["model"].split("_patch")[0],
            ", ".join([_mode(r), r["blocks"]]),
            str(t["batch"]),
            f"{t['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in t else "",
            # Older records do not say which of the smaller batches ran.
            "ran" if t.get("fits", t["batch"] == r["largest_batch"]) else "too large",
            f"{t['trace_seconds']:.0f} + {t['compile_seconds']:.0f}" if "peak_bytes" in t else "",
        ]
        for r in rows
        for t in r["tried"]
    ]
    header = ["model", "policy", "batch", "memory, GB", "", "trace + compile, s"]
    return "Largest batch:\n\n" + table(header, body) if body else ""

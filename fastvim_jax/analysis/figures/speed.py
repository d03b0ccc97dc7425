"""Draw recorded measurements: images per second of whole models, and times of the stages of the state-space part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastvim_jax.analysis.figures import Inputs
from fastvim_jax.analysis.figures.style import (
    FAMILIES,
    INK,
    PIXELS,
    dress,
    family_of,
    log_pixels,
    new_figure,
    title_of,
)
from fastvim_jax.errors import UserError
from fastvim_jax.json_text import parse_json

Row = Mapping[str, Any]

STAGES = {
    "scan": "#1f6fb4",
    "projection": "#e07b39",
    "pool": "#2a7f62",
    "repeat": "#8e5ea2",
    "skip": "#8a94a6",
}
_DASHES = {"bf16": "-", "tf32": "--", "f32": ":"}


def read_rows(folder: Path | None, bench: str) -> list[Row]:
    """Read the rows of one benchmark from all records of a folder, oldest first.

    Rows that failed, were skipped or gave a wrong result are left out. Each row gets the record's `device`.

    Args:
        folder: holds the JSON files that `fastvim bench ... --json` wrote.
        bench: "model", "mixer", "train" or "scan".

    Raises:
        UserError: the folder has no such record.
    """
    found: list[tuple[str, list[Row]]] = []
    for file in sorted(folder.glob("*.json")) if folder else []:
        try:
            record = parse_json(file.read_text())
            if isinstance(record, dict) and record.get("bench") == bench:
                about = record["circumstances"]
                rows: list[Row] = [
                    {**row, "device": about["device"]}
                    for row in record["rows"]
                    if "failed" not in row and "skipped" not in row and row.get("correct", True)
                ]
                found.append((str(about["date"]), rows))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is no record of a benchmark: {error}.") from error
    in_order = [row for _, each in sorted(found, key=lambda pair: pair[0]) for row in each]
    if not in_order:
        raise UserError(
            f"{folder or 'This installation'} holds no record of `fastvim bench {bench}`. Measure with "
            f"`fastvim bench {bench} --json FOLDER/{bench}.json`, and give --records FOLDER."
        )
    return in_order


def images_per_second(row: Row) -> float:
    """Return images per second of device time; of wall-clock time where only that was recorded."""
    return 1e3 * row["batch"] / row["device_ms"] if "device_ms" in row else row["images_per_s"]


def throughput_lines(rows: Iterable[Row]) -> dict[tuple[str, str], dict[int, float]]:
    """Return the highest images per second by (model, precision) and resolution.

    Several rows of one resolution differ in the batch, or in whether the blocks are written out.
    """
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        line = lines.setdefault((row["model"], row["precision"]), {})
        line[row["pixels"]] = max(line.get(row["pixels"], 0.0), images_per_second(row))
    return {key: dict(sorted(line.items())) for key, line in lines.items()}


def draw_throughput(inputs: Inputs) -> Figure:
    """Draw images per second against resolution, and against model size at 224 pixels."""
    rows = read_rows(inputs.records, "model")
    lines = throughput_lines(rows)
    figure = new_figure(11, 4.4, f"Classification, {_devices(rows)}")
    panels: Any = figure.subplots(1, 2, width_ratios=(1.25, 1))
    left, right = panels
    for (model, precision), line in sorted(lines.items()):
        if len(line) > 1:
            left.plot(
                list(line), list(line.values()), color=FAMILIES[family_of(model)], marker="o",
                markersize=4, linestyle=_DASHES.get(precision, "-."),
                label=f"{title_of(model)}, {precision}",
            )  # fmt: skip
    log_pixels(left, sorted({p for line in lines.values() for p in line}))
    dress(left, title="By resolution", x="height and width in pixels", y="images/s")
    if left.lines:
        left.legend(frameon=False, fontsize=9)
    bars = {
        f"{title_of(model)}\n{precision}": (line[PIXELS[0]], FAMILIES[family_of(model)])
        for (model, precision), line in sorted(lines.items(), key=lambda x: -x[1].get(224, 0))
        if PIXELS[0] in line
    }
    drawn = right.barh(
        list(bars), [v for v, _ in bars.values()], color=[c for _, c in bars.values()]
    )
    right.bar_label(drawn, fmt="{:,.0f}", fontsize=8.5, padding=3, color=INK)
    right.invert_yaxis()
    right.margins(x=0.17)
    dress(right, title=f"By size, {PIXELS[0]} pixels", x="images/s")
    right.xaxis.set_major_formatter("{x:,.0f}")
    right.grid(visible=False)
    right.tick_params(labelsize=8)
    return figure


def stage_times(rows: Iterable[Row]) -> dict[int, dict[str, dict[str, float]]]:
    """Return milliseconds of each forward stage by resolution, model and stage; "total" is all in one program."""
    times: dict[int, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row.get("part") in (*STAGES, "total") and not row["gradient"]:
            of_model = times.setdefault(row["pixels"], {}).setdefault(row["model"], {})
            of_model[row["part"]] = row["median"]
    return dict(sorted(times.items()))


def draw_stages(inputs: Inputs) -> Figure:
    """Draw the stages of the state-space part as stacked bars, one panel per resolution."""
    rows = [r for r in read_rows(inputs.records, "mixer") if r.get("part") in (*STAGES, "total")]
    times = stage_times(rows)
    if not times:
        raise UserError(
            f"{inputs.records} holds no stages. Measure them with `fastvim bench mixer --parts stages --json FILE`."
        )
    batches = "/".join(str(batch) for batch in sorted({row["batch"] for row in rows}))
    figure = new_figure(
        2.6 * len(times) + 1.6,
        4,
        f"State-space part of one Tiny block, batch {batches}, {_devices(rows)}",
    )
    panels: Any = figure.subplots(1, len(times), squeeze=False)[0]
    for axes, (pixels, models) in zip(panels, times.items(), strict=True):
        for place, model in enumerate(models := {m: models[m] for m in sorted(models)[::-1]}):
            stages, bottom = models[model], 0.0
            for stage, colour in STAGES.items():
                if stage in stages:
                    axes.bar(place, stages[stage], bottom=bottom, color=colour, width=0.62)
                    bottom += stages[stage]
            if "total" in stages:
                axes.hlines(stages["total"], place - 0.4, place + 0.4, color=INK, linewidth=2)
        axes.set_xticks(
            range(len(models)), [{"vim": "Vim", "fastvim": "FastVim"}.get(m, m) for m in models]
        )
        dress(axes, title=f"{pixels} px", y="ms" if axes is panels[0] else "")
    handles = [_patch(colour) for colour in STAGES.values()] + [_line()]
    figure.legend(
        handles,
        [*STAGES, "all in one program"],
        loc="outside right center",
        frameon=False,
        fontsize=9,
    )
    return figure


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)


def _line() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=INK, linewidth=2)


def _devices(rows: Sequence[Row]) -> str:
    return ", ".join(sorted({str(row["device"]) for row in rows}))

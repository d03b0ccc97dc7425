"""List the speeds required of the kernels and models on one H100, beside what others measured on H100s.

Our results are not here: `Target.row` looks them up in the recorded rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
REQUIRED_ON = "h100"
"""The card for which values are required, and on which others measured the numbers below."""
# Milliseconds of the mamba CUDA kernel called eagerly on the same kind of GPU (PyTorch 2.11), float32.
PEER = {
    (128, 14, 384): (0.201, 0.653),
    (128, 196, 384): (0.357, 1.458),
    (32, 1024, 384): (0.409, 1.481),
    (8, 4096, 384): (0.431, 1.506),
    (2, 16384, 384): (0.465, 1.651),
}
# Table 23 of the paper, an H100: milliseconds of both directions of one Tiny block, batch 128, float32.
PAPER = {
    ("vim", "scan"): (0.79, 3.20, 14.52, 58.20),
    ("vim", "projection"): (0.17, 0.44, 1.80, 6.90),
    ("vim", "total"): (0.96, 3.64, 16.32, 65.10),
    ("fastvim", "scan"): (0.44, 0.41, 0.42, 0.30),
    ("fastvim", "projection"): (0.07, 0.08, 0.11, 0.20),
    ("fastvim", "pool"): (0.10, 0.80, 1.70, 3.46),
    ("fastvim", "repeat"): (0.06, 0.26, 1.00, 3.90),
    ("fastvim", "skip"): (0.17, 0.78, 3.10, 12.2),
    ("fastvim", "total"): (0.84, 2.33, 6.33, 20.06),
}
PIXELS = (224, 512, 1024, 2048)
BATCHES = {224: 128, 512: 32, 1024: 8, 2048: 2}
TINY, SMALL, BASE, VIM = (
    "fastvim_tiny_patch16_224", "fastvim_small_patch16_224", "fastvim_base_patch16_224",
    "vim_tiny_patch16_224",
)  # fmt: skip
TITLES = {TINY: "FastVim-T", SMALL: "FastVim-S", BASE: "FastVim-B", VIM: "Vim-T"}


def find(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Return the rows that have all of these values."""
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def right(row: Row) -> bool:
    """Return whether the run that recorded this row found its result correct, or did not check it."""
    return row.get("correct", True)


@dataclass(frozen=True)
class Target:
    """Describe one requirement of the page.

    Attributes:
        what: the name of the measurement, for the page.
        unit: its unit.
        match: values that a recorded row must have.
        value: takes the number from such a row; None if the row does not have it. The best row counts.
        required: the bound that must be reached; None if there is none.
        aim: the bound that is aimed at; None if there is none.
        others: numbers that others reach, a text for the page.
        more_is_better: whether a larger number is better.
        clock: takes the same number in wall-clock time, if `value` is from device time.
        over_deit: required ratio and aimed-at ratio to DeiT in the same run. They replace `required` and `aim`.
    """

    what: str
    unit: str
    match: Row
    value: Callable[[Row], float | None]
    required: float | None
    aim: float | None
    others: str = "–"
    more_is_better: bool = False
    clock: Callable[[Row], float | None] | None = None
    over_deit: tuple[float, float] | None = None

    def best(self, rows: list[Row]) -> tuple[float, Row] | None:
        """Return the best value and its row, or None if no correct row has the value."""
        found = [
            (v, r)
            for r in find(rows, **self.match)
            if right(r) and (v := self.value(r)) is not None
        ]
        choose = max if self.more_is_better else min
        return choose(found, key=lambda pair: pair[0]) if found else None

    def row(self, rows: list[Row], ratio: float | None = None) -> list[str]:
        """Return the cells of this requirement's line on the page.

        Args:
            rows: the recorded rows of one card.
            ratio: what the best row reached over DeiT in the same run, if DeiT was recorded there.
        """
        best = self.best(rows)
        required, aim = (number(x) for x in (self.required, self.aim))
        if self.over_deit is not None:
            required, aim = (f"{x:g} × DeiT" for x in self.over_deit)
        line = [self.what, self.unit, self.others, required, aim]
        if best is None:
            wrong = any(not right(r) for r in find(rows, **self.match))
            return [*line, "wrong result" if wrong else "not measured", "", "", ""]
        seen, row = best
        clock = number(None if self.clock is None else self.clock(row))
        line[0] = self.what.replace(" bf16", f" bf16 ({half_mode(row)})")
        return [*line, f"**{number(seen)}**", clock, self._met(seen, ratio), f"`{row['from']}`"]

    def _met(self, seen: float, ratio: float | None) -> str:
        """Say which bound is reached."""
        if self.over_deit is not None:
            if ratio is None:
                return "DeiT not measured"
            required, aim = self.over_deit
            return "aim" if ratio >= aim else "yes" if ratio >= required else "no"

        def reaches(bound: float | None) -> bool:
            return bound is not None and (seen >= bound if self.more_is_better else seen <= bound)

        met = "aim" if reaches(self.aim) else "yes" if reaches(self.required) else "no"
        return "short of the aim" if self.required is None and met == "no" else met


def number(x: float | None) -> str:
    """Write a number with four digits or more, and None as a dash."""
    return "–" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.4g}"


def clock_images_per_s(row: Row) -> float | None:
    """Return images per second of wall-clock time, or None if other programs used the machine or its GPU."""
    return row["images_per_s"] if row.get("quiet", True) else None


def half_mode(row: Row) -> str:
    """Return the mode of a bf16 row: "fast", or its option `activations`; the page's legend explains them."""
    return (row.get("activations") or "wide") if row.get("residual_in_fp32", True) else "fast"


def device_images_per_s(row: Row) -> float:
    """Return images per second of device time, or of wall-clock time if no device time was recorded."""
    return 1e3 * row["batch"] / row["device_ms"] if "device_ms" in row else row["images_per_s"]


def _compile(row: Row) -> float:
    return row["trace_seconds"] + row["compile_seconds"]


def _compile_of_the_first_batch(row: Row) -> float:
    return _compile(row["tried"][0])


def way(gradient: bool) -> str:
    """Return "forward" or "forward + backward"."""
    return "forward + backward" if gradient else "forward"


SCANS = ((128, 14, 384), (128, 196, 384), (32, 1024, 384), (2, 16384, 384))


def targets() -> list[Target]:
    """Return all requirements, in the order of the page."""
    return [*_scans(), *_cores(), *_forward_passes(), *_training()]


def _scans() -> Iterator[Target]:
    for gradient, required, aims in (
        (False, (0.010, 0.085, 0.12, 0.19), (0.007, 0.06, 0.08, 0.14)),
        (True, (0.05, 0.42, 0.42, 0.55), (0.025, 0.25, 0.28, 0.38)),
    ):
        for shape, least, aim in zip(SCANS, required, aims, strict=True):
            match = {"bench": "scan", "shape": list(shape), "dtype": "float32", "gradient": gradient,
                     "implementation": "pallas"}  # fmt: skip
            what = f"scan f32 {way(gradient)} {'×'.join(map(str, shape))}"
            others = f"mamba {PEER[shape][gradient]}"
            yield Target(what, "ms", match, lambda r: r["median"], least, aim, others)


def _cores() -> Iterator[Target]:
    for dtype, gradient, authors, required, aims in (
        ("float32", False, (0.85, 2.3, 6.3, 20.3), (0.13, 0.50, 1.8, 7), (0.067, 0.35, 1.4, 5.6)),
        ("float32", True, (2.5, 6.9, 20, 69), (0.45, 1.7, 6, 24), (0.25, 1.2, 4.8, 19)),
        ("bfloat16", False, (None,) * 4, (None,) * 4, (0.0335, 0.175, 0.7, 2.8)),
    ):
        for pixels, part, least, aim in zip(PIXELS, authors, required, aims, strict=True):
            match = {"bench": "mixer", "part": "core", "pixels": pixels, "dtype": dtype,
                     "gradient": gradient, "batch": 128, "width": 192}  # fmt: skip
            what = f"FastVim-T mixer core, batch 128, {dtype} {way(gradient)} {pixels} px"
            others = "–" if part is None else f"authors > {part}"
            yield Target(what, "ms", match, lambda r: r["median"], least, aim, others)


# Precision and dtype of the activations between matrix products; see the page's legend.
_COMPUTE = {"precision": "bf16", "activations": "compute"}


def _forward_passes() -> Iterator[Target]:
    def of(name, precision, pixels, authors, required=None, aim=None, deit=None, over_deit=None):
        title = TITLES[name]
        match = {"bench": "model", "model": name, "precision": precision, "pixels": pixels,
                 "batch": BATCHES[pixels]}  # fmt: skip
        match |= _COMPUTE if precision == "bf16" else {}
        what = f"{title} forward {precision} {pixels} px, batch {BATCHES[pixels]}"
        others = f"authors {authors:,}" + (f", DeiT-{title[-1]} {deit:,}" if deit else "")
        return Target(
            what, "images/s", match, device_images_per_s, required, aim, others, True, clock_images_per_s,
            over_deit,
        )  # fmt: skip

    yield of(TINY, "bf16", 224, 4202, deit=53217, over_deit=(1.15, 1.6))
    yield of(TINY, "bf16", 512, 1020, deit=8253, over_deit=(1.5, 2))
    yield of(TINY, "bf16", 1024, 293, deit=1372, over_deit=(2.5, 3.5))
    yield of(TINY, "bf16", 2048, 79, deit=134, over_deit=(6, 8))
    yield of(TINY, "f32", 224, 3563, 14000, 16000)
    yield of(TINY, "f32", 512, 784, 2300, 3000)
    yield of(TINY, "f32", 1024, 216, 580, 750)
    yield of(TINY, "f32", 2048, 56, 145, 190)
    yield of(SMALL, "bf16", 224, 2062, deit=25440, over_deit=(1.1, 1.3))
    yield of(BASE, "bf16", 224, 1032, deit=9954, over_deit=(1.05, 1.2))
    yield of(VIM, "bf16", 224, 3780, 15000, 22000)
    yield of(VIM, "bf16", 2048, 52, 190, 220)
    match = {"bench": "model", "model": TINY, "pixels": 224, "batch": 1} | _COMPUTE
    what = "FastVim-T forward bf16 224 px, batch 1, by the clock"
    yield Target(what, "ms", match, lambda r: r["ms"], 0.45, 0.3)


def _training() -> Iterator[Target]:
    train = {"bench": "train"} | _COMPUTE
    for name, over_deit, authors in ((TINY, (1.1, 1.5), 946), (SMALL, (1.1, 1.3), 625)):
        match = train | {"kind": "time", "model": name, "batch": 128}
        what = f"{TITLES[name]} training step bf16 224 px, batch 128"
        yield Target(
            what, "images/s", match, device_images_per_s, None, None, f"authors {authors}", True,
            clock_images_per_s, over_deit,
        )  # fmt: skip
    largest = train | {"kind": "largest", "model": BASE, "remat": "none"}
    what = "FastVim-B largest training batch, 224 px, bf16, no remat"
    yield Target(
        what, "images", largest, lambda r: r["largest_batch"], 1024, 1536, more_is_better=True
    )
    what = "FastVim-B training step, trace + compile, no cache, blocks scanned"
    yield Target(what, "s", largest | {"blocks": "scan"}, _compile_of_the_first_batch, 60, 30)
    match = train | {"kind": "compile", "model": BASE, "blocks": "unroll"}
    yield Target("the same, blocks written out", "s", match, _compile, 60, 30)

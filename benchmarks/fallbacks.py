"""Measure what it costs that some models do not run as fused kernels: forward passes of 4 blocks, fast mode.

    python benchmarks/fallbacks.py --json benchmarks/results/CARD/family/fallbacks.json

Each row of CASES runs step by step in XLA, with the scan as a kernel. Beside it stands the nearest model or size that
runs fused. Both have about 25,000 tokens in a batch, and the cost is the quotient of their times per token. `--only`
measures a part of the rows, so that several programs can share the work (and $FASTVIM_BENCH_LOCK).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import masked_speed

from fastvim_jax.bench.model import cases as model_cases
from fastvim_jax.bench.record import show
from fastvim_jax.layers.masking import kept_count
from fastvim_jax.models import model_config
from pallas_kernels import timing

DEPTH = 4
TOKENS = 25_088
"""Tokens in a batch: 128 images of 224 pixels."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Describe a model that falls back, and one that runs fused.

    Attributes:
        title: what falls back, for the page.
        model: name of both models.
        pixels: side of the images of the one that falls back, and of the fused one.
        options: fields of the config of the one that falls back.
        fused: fields of the config of the fused one.
    """

    title: str
    model: str
    pixels: tuple[int, int] = (224, 224)
    options: tuple[tuple[str, Any], ...] = ()
    fused: tuple[tuple[str, Any], ...] = ()


TINY = "fastvim_tiny_patch16_224"
CASES = (
    *(
        Comparison("short lines", f"fastvim_{size}_patch16_224", (32, 48))
        for size in ("tiny", "small", "base", "large")
    ),
    *(
        Comparison("short lines", f"mae_fastvim_{size}_patch16_224", (48, 64))
        for size in ("tiny", "small", "base", "large")
    ),
    Comparison("short lines", "mae_fastvim_huge_patch14_224", (42, 56)),
    Comparison("class token beside pooling", TINY, options=(("class_token", "middle"),)),
    Comparison("attention pooling", TINY, options=(("pooling", "attention"),)),
    Comparison("conv_width below 2", TINY, options=(("conv_width", 0),)),
    Comparison("inner width below 64", TINY, options=(("embed_dim", 24),), fused=(("embed_dim", 32),)),
)  # fmt: skip


def measurement(
    name: str, pixels: int, options: dict[str, Any], wanted: int
) -> tuple[timing.Case, int]:
    """Return the measurement of a model's forward pass, and its batch's tokens (of masked models, those kept).

    The batch has at most `wanted` tokens, and at least 8 images.
    """
    config = model_config(name, image_size=pixels)
    rows, columns = config.grid
    tokens = rows * columns
    if name.startswith("mae_"):
        tokens = kept_count(tokens, config.mask_ratio)
        batch = max(8, wanted // tokens // 8 * 8)
        case = masked_speed.encoder_case(name, batch, depth=DEPTH, image_size=pixels, **options)
        return case, batch * tokens
    batch = max(8, wanted // tokens // 8 * 8)
    ((_, case),) = model_cases([(name, pixels, batch, "bf16")], depth=DEPTH, **options)
    return case, batch * tokens


def compare(comparison: Comparison, wanted: int) -> Iterator[timing.Row | None]:
    """Compile both models, then time both."""
    sides = zip(comparison.pixels, (comparison.options, comparison.fused), strict=True)
    pairs = [
        measurement(comparison.model, pixels, dict(options), wanted) for pixels, options in sides
    ]
    for case, _ in pairs:
        next(case)
    yield None
    found = [(next(case), tokens) for case, tokens in pairs]
    each = [1e6 * row.get("device_ms", row["ms"]) / DEPTH / tokens for row, tokens in found]
    yield {
        "ns": each[0], "fused_ns": each[1], "cost": each[0] / each[1],
        "correct": all(row.get("correct", True) for row, _ in found),
        "rows": [row for row, _ in found],
    }  # fmt: skip


def main() -> None:
    """Measure the chosen rows, print them and write them to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", type=int, default=range(len(CASES)))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="fewer tokens, for a trial")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    cases = [
        (
            {"title": each.title, "model": each.model, "pixels": list(each.pixels),
             "options": dict(each.options), "fused": dict(each.fused)},
            compare(each, chosen.tokens),
        )
        for each in (CASES[i] for i in chosen.only)
    ]  # fmt: skip
    columns: Any = (
        ("what", 27, lambda row: row["title"]),
        ("model", 30, lambda row: row["model"]),
        ("ns a token and block", 20, lambda row: f"{row['ns']:.2f}" if "ns" in row else ""),
        ("fused", 8, lambda row: f"{row['fused_ns']:.2f}" if "ns" in row else ""),
        ("cost", 5, lambda row: f"{row['cost']:.2f}" if "ns" in row else ""),
        ("", 0, lambda row: row.get("failed", "")),
    )
    show("fallbacks", timing.run(cases), columns, command=" ".join(sys.argv), file=chosen.json)


if __name__ == "__main__":
    main()

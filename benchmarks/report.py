"""Writes benchmarks/README.md and its plot from the recorded results: `python benchmarks/report.py`."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "h100"

# Milliseconds of the mamba CUDA kernel called eagerly on the same kind of GPU (PyTorch 2.11), float32.
PEER = {
    (128, 14, 384): (0.201, 0.653),
    (128, 196, 384): (0.357, 1.458),
    (32, 1024, 384): (0.409, 1.481),
    (8, 4096, 384): (0.431, 1.506),
    (2, 16384, 384): (0.465, 1.651),
}


def load(name: str) -> tuple[dict, list[dict]]:
    """Circumstances and rows of one recorded run."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    return record["circumstances"], record["rows"]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def made_by(name: str) -> str:
    """Where the numbers of a section come from."""
    c, _ = load(name)
    return (
        f"`{c['command']}` — {c['device']}, JAX {c['jax']}, flax {c['flax']}, commit "
        f"{c['commit'][:7]}, {c['date']}. Data: `results/h100/{name}.json`.\n"
    )


def scan_section() -> str:
    """The scan: kernel, XLA and peer."""
    _, rows = load("scan")
    found = {(tuple(r["shape"]), r["dtype"], r["gradient"], r["implementation"]): r for r in rows}
    body = []
    for shape, peer in PEER.items():
        for gradient in (False, True):
            f32 = found[shape, "float32", gradient, "pallas"]
            xla = found[shape, "float32", gradient, "xla_associative"]
            bf16 = found[shape, "bfloat16", gradient, "pallas"]
            floor = max(f32["floor_memory_ms"], f32["floor_exponentials_ms"])
            body.append(
                [
                    "×".join(map(str, shape)),
                    "forward + backward" if gradient else "forward",
                    f"**{f32['median']:.4f}**",
                    f"{f32['fastest']:.4f}–{f32['slowest']:.4f}",
                    f"{bf16['median']:.4f}",
                    f"{xla['median']:.3f}",
                    f"{peer[gradient]:.3f}",
                    f"{floor:.3f}",
                    f"{f32['temporary_bytes'] / 1e6:.0f}",
                    f"{f32['error']:.1e}",
                ]
            )
    return table(
        ["batch×length×channels", "", "Pallas f32, ms", "spread", "Pallas bf16, ms",
         "associative scan (XLA) f32, ms", "mamba CUDA eager, ms", "floor, ms", "temporary, MB",
         "error against XLA"],
        body,
    )  # fmt: skip


def mixer_section() -> str:
    """The mixer core by resolution."""
    rows = load("mixer_float32")[1] + load("mixer_bfloat16")[1]
    rows.sort(key=lambda r: (r["dtype"] != "float32", r["pixels"], r["gradient"]))
    return table(
        ["pixels", "precision", "", "ms", "spread", "temporary, MB", "longest kernels, ms"],
        [
            [
                str(r["pixels"]),
                r["dtype"],
                "forward + backward" if r["gradient"] else "forward",
                f"**{r['median']:.3f}**",
                f"{r['fastest']:.3f}–{r['slowest']:.3f}",
                f"{r['temporary_bytes'] / 1e6:.0f}",
                ", ".join(
                    f"{name.removesuffix('_mosaic_gpu_kernel')} {value:.3f}"
                    for name, value in list(r["kernels"].items())[:5]
                ),
            ]
            for r in rows
        ],
    )


def model_rows(name: str) -> str:
    """Images a second."""
    _, rows = load(name)
    rows.sort(key=lambda r: (r["model"] != "fastvim_tiny_patch16_224", r.get("pixels", 224)))
    return table(
        ["model", "pixels", "batch", "policy", "images/s", "ms", "spread"],
        [
            [
                r["model"],
                str(r.get("pixels", 224)),
                str(r["batch"]),
                f"{r['dtype']}, activations {r.get('activations', 'wide')}, {r.get('blocks', 'scan')}",
                f"**{r['images_per_s']:.0f}**",
                f"{r['ms']:.2f}",
                f"{r['fastest_ms']:.2f}–{r['slowest_ms']:.2f}",
            ]
            for r in rows
        ],
    )


def plot() -> None:
    """Scan time over length, all of about the same number of elements but the first."""
    _, rows = load("scan")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, gradient in zip(axes, (False, True), strict=True):
        for implementation, label in (
            ("pallas", "Pallas"),
            ("xla_associative", "associative scan, XLA"),
        ):
            chosen = [
                r for r in rows
                if r["implementation"] == implementation and r["dtype"] == "float32" and r["gradient"] == gradient
            ]  # fmt: skip
            axis.loglog(
                [r["shape"][1] for r in chosen], [r["median"] for r in chosen], "o-", label=label
            )
        axis.loglog(
            [shape[1] for shape in PEER],
            [p[gradient] for p in PEER.values()],
            "s--",
            label="mamba CUDA, eager",
        )
        axis.set(
            title="forward + backward" if gradient else "forward",
            xlabel="length (batch 128, 128, 32, 8, 2; 384 channels)",
        )
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend()
    figure.suptitle("Selective scan, float32, 16 states, one H100")
    figure.tight_layout()
    figure.savefig(HERE / "scan.png", dpi=120)


def main() -> None:
    """Write page and plot."""
    plot()
    parts = [
        "# Measured on one H100\n",
        "Generated by `benchmarks/report.py` from recorded runs; do not edit. What was tried on the way is in\n"
        "[NOTES.md](NOTES.md).\n",
        "## Selective scan\n",
        "Device time with inputs read cold; softplus and step bias inside, 16 states. The peer's times are\n"
        "eager calls of its kernel on another machine of the same kind. Floor: the larger of memory traffic\n"
        "at 3.0 TB/s and exponentials at 16 a clock and processor.\n",
        scan_section(),
        "\n![scan](scan.png)\n",
        made_by("scan"),
        "## Core of a FastVim-T mixer, batch 128\n",
        "From in_proj's output to out_proj's input: convolutions, pooling, projections, scans, skip, LayerNorm,\n"
        "gate; device time, kernels' durations summed.\n",
        mixer_section(),
        "\n" + made_by("mixer_float32"),
        made_by("mixer_bfloat16"),
        "## Models, forward\n",
        "By the clock over queued steps; other programs were being compiled on the same machine.\n",
        model_rows("model"),
        "\n" + made_by("model"),
        "## Training steps: forward, backward, AdamW\n",
        model_rows("train"),
        "\n" + made_by("train"),
    ]
    (HERE / "README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()

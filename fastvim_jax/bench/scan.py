"""The scan's benchmark as `fastvim bench scan` shows it: its shapes, the steps each way needs, and the plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from fastvim_jax.bench.record import Row
from fastvim_jax.errors import UserError
from pallas_kernels.selective_scan import bench
from pallas_kernels.selective_scan.arg_specs import ScanSpec, of_length

LABELS = {
    "pallas": "Pallas kernel",
    "triton": "Triton kernel",
    "xla_associative": "associative scan, XLA",
    "xla_sequential": "step by step, XLA",
    "mamba_ssm": "mamba CUDA kernel, eager",
}


def default_specs(channels: int | None, states: int) -> list[ScanSpec]:
    """Return the shapes measured where no lengths are asked for."""
    return [
        dataclasses.replace(spec, channels=channels or spec.channels, states=states)
        for spec in bench.default_specs()
    ]


def specs(
    lengths: Sequence[int], batches: Sequence[int], channels: int | None, states: int
) -> list[ScanSpec]:
    """Return the shapes of these lengths.

    Raises:
        UserError: not one batch for each length.
    """
    if batches and len(batches) != len(lengths):
        raise UserError(f"{len(batches)} batches for {len(lengths)} lengths: give one for each.")
    gpu = jax.default_backend() == "gpu"
    channels = channels or (384 if gpu else 64)
    if not batches:
        return [of_length(length, 28672 if gpu else 1024, channels, states) for length in lengths]
    pairs = zip(batches, lengths, strict=True)
    return [ScanSpec(batch, length, channels, states, D=False) for batch, length in pairs]


def print_steps(specs: Sequence[ScanSpec]) -> None:
    """Print how many steps depend on one another in each way to scan."""
    print("\nSteps one after another, forward:")
    print(f"{'batch x length x channels':<26}  {'loop':>6}  {'ideal parallel scan':>19}  "
          f"{'xla_associative':>15}  {'pallas':>6}")  # fmt: skip
    for row in bench.steps(specs):
        shape = "x".join(map(str, row["shape"]))
        print(f"{shape:<26}  {row['sequential']:>6}  {row['parallel']:>19}  "
              f"{row['xla_associative']:>15}  {row['pallas'] or '-':>6}")  # fmt: skip


def plot(rows: Sequence[Row], file: Path, *, title: str = "Selective scan, float32") -> None:
    """Plot nanoseconds per step and sequence over the length, one line per implementation, both axes logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    measured = [r for r in rows if "median" in r and r["dtype"] == "float32"]
    for axis, gradient in zip(axes, (False, True), strict=True):
        for implementation, label in LABELS.items():
            times: dict[int, float] = {}
            for r in measured:
                if r["implementation"] == implementation and r["gradient"] == gradient:
                    batch, length, _ = r["shape"]
                    per_step = 1e6 * r["median"] / (batch * length)
                    times[length] = min(per_step, times.get(length, per_step))
            if times:
                axis.loglog(sorted(times), [times[x] for x in sorted(times)], "o-", label=label)
        axis.set(title="forward + backward" if gradient else "forward", xlabel="length")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("ns a step and sequence")
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    lines = {line.get_label(): line for axis in axes for line in axis.lines}
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=max(1, len(lines)))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)

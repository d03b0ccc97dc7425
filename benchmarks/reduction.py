"""Train on four simulated devices with gradients summed in float32 and in bfloat16, and record the loss curves.

    python benchmarks/reduction.py --json benchmarks/results/cpu/reduction.json

A FastVim of two blocks learns the digits of scikit-learn from scratch. Runs of one seed differ in nothing but
`mesh.reduction`. Those of different seeds show how far runs differ anyway.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

DEVICES, EPOCHS, SEEDS = 4, 20, (0, 1)
REDUCTIONS = ("float32", "bfloat16")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
)


def config() -> Any:
    """Return the run, without seed and reduction."""
    from fastvim_jax.data import ClassificationData
    from fastvim_jax.models import VisionMambaConfig
    from fastvim_jax.training import OptimizerConfig, TrainConfig

    return TrainConfig(
        model=VisionMambaConfig(
            image_size=8, patch_size=2, channels=1, num_classes=10, embed_dim=32, depth=2, state_size=8, drop_path=0.1,
        ),
        data=ClassificationData(
            source="digits", image_size=8, channels=1, batch_size=128, eval_batch_size=180, crop="pad_shift", pad=1,
            flip=0.0, eval_crop=1.0, mean=(0.3,), std=(0.4,),
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, learning_rate_scaling="none", warmup_epochs=2.0
        ),
        epochs=EPOCHS, ema_decay=None, log_every_steps=11, evaluate_every_epochs=0,
    )  # fmt: skip


def run(reduction: str, seed: int) -> dict[str, Any]:
    """Train once and return the curve."""
    from fastvim_jax.distributed import MeshConfig
    from fastvim_jax.training import read_metrics, train

    mesh = MeshConfig(data=DEVICES, reduction=reduction)  # type: ignore[arg-type]
    chosen = dataclasses.replace(config(), mesh=mesh, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        result = train(chosen, Path(folder) / "run", progress=False)
        lines = read_metrics(Path(folder) / "run", "train")
    return {
        "reduction": reduction,
        "seed": seed,
        "step": [line["step"] for line in lines],
        "loss": [line["loss"] for line in lines],
        "grad_norm": [line["grad_norm"] for line in lines],
        "eval_loss": result.metrics["raw_loss"],
        "eval_top1": result.metrics["raw_top1"],
    }


def main() -> None:
    """Train all runs and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    file = parser.parse_args().json
    import jax

    from pallas_kernels import timing

    assert jax.device_count() == DEVICES
    record = timing.circumstances(f"python benchmarks/reduction.py --json {file}")
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        for reduction in REDUCTIONS:
            rows.append(run(reduction, seed))
            print({k: v for k, v in rows[-1].items() if not isinstance(v, list)}, flush=True)
            file.write_text(
                json.dumps(record | {"devices": DEVICES, "rows": rows}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()

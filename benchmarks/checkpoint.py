"""Time the checkpoints of a training on this machine's disk: how long the loop waits, and how long writing takes.

    python benchmarks/checkpoint.py --folder /tmp --json benchmarks/results/cpu/checkpoint.json

A checkpoint holds weights, both moments of AdamW and the average of the weights. The state lies on this machine's
default device; from a GPU it is copied to the host first. Every file is flushed to the disk and gets a checksum, as in
a training. The first checkpoint is left out, since it is read back once.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SAVES = 4
MODELS = ("fastvim_tiny_patch16_224", "fastvim_small_patch16_224")


def state_of(model: Any) -> Any:
    """Build a state of a training of `model` with random numbers everywhere, because zeros would be compressed."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from fastvim_jax.training import OptimizerConfig
    from fastvim_jax.training.optimizer import make_optimizer
    from fastvim_jax.training.steps import init_state

    params = nnx.state(model)
    rate = make_optimizer(OptimizerConfig(), params, learning_rate=lambda step: 1e-3, total_steps=1)
    leaves, structure = jax.tree.flatten(init_state(params, rate, ema=True))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        jax.random.normal(key, leaf.shape, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]  # fmt: skip
    return jax.tree.unflatten(structure, drawn)


def measure(state: Any, folder: Path, saves: int = SAVES) -> dict[str, Any]:
    """Save a state several times; return the size in bytes and the median times in milliseconds.

    Args:
        state: the state of a training at step 0.
        folder: folder on the disk to measure; the checkpoints in it are deleted.
        saves: number of saves to take the medians of.
    """
    from fastvim_jax.training.checkpoints import Checkpoints

    held, written = [], []
    with (
        tempfile.TemporaryDirectory(dir=folder) as run,
        Checkpoints(Path(run) / "checkpoints", keep=1) as store,
    ):
        for step in range(saves + 1):
            start = time.perf_counter()
            store.save(dataclasses.replace(state, step=state.step + step), {})
            held.append(time.perf_counter() - start)
            store.wait()
            written.append(time.perf_counter() - start)
        newest = Path(run) / "checkpoints" / str(saves)
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    held_ms, written_ms = (1e3 * statistics.median(times[1:]) for times in (held, written))
    return {"bytes": size, "held_ms": held_ms, "written_ms": written_ms, "saves": saves}


def main() -> None:
    """Measure the models and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from fastvim_jax import create_model
    from fastvim_jax.bench.record import show

    def rows() -> Iterator[dict[str, Any]]:
        for name in options.models:
            state = state_of(create_model(name, rngs=0))
            yield {"model": name, **measure(state, options.folder)}

    columns = (
        ("model", 28, lambda r: r["model"]),
        ("MB", 6, lambda r: f"{r['bytes'] / 1e6:.0f}"),
        ("loop waits, ms", 14, lambda r: f"{r['held_ms']:.0f}"),
        ("written after, ms", 17, lambda r: f"{r['written_ms']:.0f}"),
    )
    show(
        "checkpoint", rows(), columns, command="python benchmarks/checkpoint.py", file=options.json
    )


if __name__ == "__main__":
    main()

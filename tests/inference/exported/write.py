"""Export a small classifier under the JAX at hand: `python -m tests.inference.exported.write`."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.data.device_transforms import make_preprocess
from fastvim_jax.inference.export import export_classifier
from fastvim_jax.models import build_model
from fastvim_jax.training import Run
from tests.training.tiny import tiny_config, tiny_model

FOLDER = Path(__file__).parent


def write(file: Path) -> None:
    """Write the program; and, beside it in the same file, `images` and the live model's `logits`."""
    config = tiny_config(model=tiny_model(depth=2))  # Pools along both axes.
    run = Run(
        build_model(config.model, rngs=nnx.Rngs(0)), config, tuple(map(str, range(10))), 7, "raw"
    )
    export_classifier(run, file)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    logits = np.asarray(run.model(make_preprocess(config.data)(jnp.asarray(images))))  # type: ignore[operator]
    with np.load(file) as entries:
        kept = dict(entries)
    np.savez_compressed(file, **kept, images=images, logits=logits)


if __name__ == "__main__":
    write(FOLDER / f"jax_{jax.__version__}.npz")

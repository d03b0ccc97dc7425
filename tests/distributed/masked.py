"""Run as a program: masked pre-training on one device, and on four that share batches and parameters.

python tests/distributed/masked.py FOLDER
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax

from fastvim_jax.distributed import MeshConfig
from fastvim_jax.models import MaskedAutoencoderConfig
from fastvim_jax.training import train
from fastvim_jax.training.masked.config import PRETRAINING, PretrainConfig
from tests.training.tiny import tiny_config, tiny_model


def whole_runs(folder: Path) -> None:
    """Train the same run on a mesh of one device, and on one of 2 x 2 in two parts of a batch."""
    encoder = tiny_model(
        patch_size=2, drop_path=0.0, num_classes=0, dtype="float64", param_dtype="float64"
    )
    optimizer = dataclasses.replace(
        PRETRAINING, learning_rate=4e-3, learning_rate_scaling="none", warmup_epochs=0.5
    )
    for name, mesh, accumulate in (
        ("one", MeshConfig(data=1), 1),
        ("four", MeshConfig(data=2, fsdp=2), 2),
    ):
        config = PretrainConfig(
            model=MaskedAutoencoderConfig(encoder=encoder, decoder_dim=8, decoder_depth=1),
            data=tiny_config().data, optimizer=optimizer, epochs=1, pictures=0, log_every_steps=1,
            mesh=mesh, accumulate=accumulate,
        )  # fmt: skip
        train(config, folder / name, progress=False)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    whole_runs(Path(sys.argv[1]))

"""Run as a program: a run with channel sampling on a mesh of one device and on one of two.

python tests/distributed/channels.py FOLDER
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from fastvim_jax.data import CellsData
from fastvim_jax.data.prepare.shards import prepare
from fastvim_jax.data.records import Record
from fastvim_jax.distributed import MeshConfig
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.training import OptimizerConfig, TrainConfig, train


class Noise:
    """32 images of 2 channels, each class brighter than the one before."""

    class_names = ("dark", "bright")

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Record:
        pixels = np.random.default_rng(index).integers(0, 120 + 100 * (index % 2), (8, 8, 2))
        return Record(pixels.astype(np.uint8), index % 2, f"noise {index}")


def config(folder: Path) -> TrainConfig:
    """Write images, and return the config of a run with them."""
    prepare(Noise(), folder / "shards", "train")
    data = CellsData(
        path=str(folder / "shards"), eval_split="train", channels=2, channel_names=("a", "b"),
        image_size=8, batch_size=8, channel_sampling="sorted", mean=(0.3,) * 2, std=(0.3,) * 2,
    )  # fmt: skip
    model = ChannelMambaConfig(
        image_size=8, patch_size=4, channels=2, num_classes=2, embed_dim=8, depth=2, state_size=2,
        drop_path=0.1, dtype="float64", param_dtype="float64",
    )  # fmt: skip
    return TrainConfig(
        model=model, data=data, optimizer=OptimizerConfig(warmup_epochs=0.5), epochs=2,
        ema_decay=None, log_every_steps=1,
    )  # fmt: skip


def whole_runs(folder: Path) -> None:
    """Train the same run on a mesh of one device and on one of two."""
    made = config(folder)
    for devices in (1, 2):
        on = dataclasses.replace(made, mesh=MeshConfig(data=devices))
        train(on, folder / f"run{devices}", progress=False)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    whole_runs(Path(sys.argv[1]))

"""Run as a program: write the training step's program of every task, before XLA compiles it.

    python tests/distributed/programs.py FOLDER NAME ...

A name says model and mesh: `fastvim-2x2`, `fastvim-scan-accumulate-2x2`, `detection-4x1`. NAME.mlir is written. Prints
the order that the mesh's axes have in a set of this process.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any, Never

import jax
import numpy as np
from flax import nnx

import tests.training.detection.tiny as detection
import tests.training.segmentation.tiny as segmentation
from fastvim_jax.distributed import MeshConfig, sharding
from fastvim_jax.models import MaskedAutoencoderConfig, ViTConfig, build_model
from fastvim_jax.models.saving import save_pretrained
from fastvim_jax.training import train
from fastvim_jax.training.masked.config import PRETRAINING, PretrainConfig, ProbeConfig
from fastvim_jax.training.steps import TrainStep
from tests.distributed import channels
from tests.training.tiny import tiny_config, tiny_model

sharding.SMALLEST = 8  # So that nearly everything of a tiny model is spread.


def config_of(name: str, folder: Path) -> Any:
    """Return the config of a run, and write its data if it needs any."""
    model, *options, mesh = name.split("-")
    common: dict[str, Any] = {"mesh": MeshConfig(*map(int, mesh.split("x")))}
    if "accumulate" in options:
        common["accumulate"] = 2
    how = {
        "blocks": "scan" if "scan" in options else "unroll",
        "remat": "block" if "remat" in options else "none",
    }
    if model == "fastvim":
        return tiny_config(model=tiny_model(depth=2, **how), **common)
    if model == "vit":
        vit = ViTConfig(
            image_size=8, patch_size=4, channels=1, num_classes=10, embed_dim=8, depth=1, num_heads=2, drop_path=0.3,
            **how,
        )  # fmt: skip
        return tiny_config(model=vit, **common)
    if model == "masked":
        encoder = tiny_model(patch_size=2, drop_path=0.0, num_classes=0, **how)
        return PretrainConfig(
            model=MaskedAutoencoderConfig(encoder=encoder, decoder_dim=8, decoder_depth=1),
            data=tiny_config().data, optimizer=PRETRAINING, epochs=1, pictures=0, **common,
        )  # fmt: skip
    if model == "probe":
        backbone = tiny_model(drop_path=0.0, **how)
        save_pretrained(build_model(backbone, rngs=nnx.Rngs(0)), folder / "saved")
        return ProbeConfig(
            model=backbone,
            data=tiny_config().data,
            init=str(folder / "saved"),
            cache_gigabytes=0.0,
            **common,
        )
    if model == "channels":
        return dataclasses.replace(channels.config(folder), **common)
    module: Any = {"segmentation": segmentation, "detection": detection}[model]
    module.draw_scenes(folder / "scenes", np.random.default_rng(0))
    made = module.tiny_config(folder / "scenes", **common)
    return dataclasses.replace(made, data=dataclasses.replace(made.data, batch_size=4))


def write(folder: Path, name: str) -> None:
    """Begin a run, and write its step instead of the first update."""

    def stop(step: TrainStep, state: Any, batch: Any, **options: bool) -> Never:
        lowered = step.func.lower(state, batch, **step.keywords, **options)
        (folder / f"{name}.mlir").write_text(lowered.as_text())
        raise KeyboardInterrupt

    TrainStep.__call__ = stop  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as run:
        try:
            train(config_of(name, Path(run)), Path(run, "run"), progress=False)
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)  # which some of the configs want
    for each in sys.argv[2:]:
        write(Path(sys.argv[1]), each)
    print(*{"data", "fsdp"})

"""FastChannelVim trains with channel sampling on cell images, resumes exactly, and is evaluated on subsets."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.data import CellsData
from fastvim_jax.data.cells import draw_channels
from fastvim_jax.data.multichannel import find_channel_files, read_channel_files, to_uint8
from fastvim_jax.data.prepare.shards import prepare
from fastvim_jax.data.records import Record
from fastvim_jax.models import VisionMambaConfig
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channels import channel_inputs, spread_channels
from fastvim_jax.training import OptimizerConfig, TrainConfig, loop, train
from fastvim_jax.training.classification.run_scores import score_run
from fastvim_jax.training.run_folder import load_run
from tests.support import data_dir

NAMES = ("DAPI", "GFP")  # each number of channels that a step draws is a program to compile
PATTERN = "nf1_schwann/{plate}_{well}_s{site}/ch{}_{channel}.png"


class Crops:
    """24 crops of each of two fields of real cells, whose class is the field; random fields where there are none."""

    class_names = ("first", "second")

    def __init__(self, rng: np.random.Generator):
        if data_dir() is None:
            fields = [rng.integers(0, 120 + 60 * i, (64, 64, 2)).astype(np.uint8) for i in (0, 1)]
        else:
            found = find_channel_files(data_dir() / "cell_painting", PATTERN, NAMES)
            fields = [
                to_uint8(read_channel_files(f).pixels, "percentile")
                for f in list(found.values())[:2]
            ]
        self.images = []
        for number in range(48):
            field = fields[number % 2]
            top, left = (int(rng.integers(0, n - 12)) for n in field.shape[:2])
            self.images.append(np.ascontiguousarray(field[top : top + 12, left : left + 12]))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return Record(self.images[index], index % 2, f"crop {index}")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("cells")
    prepare(Crops(np.random.default_rng()), folder, "train")
    data = CellsData(
        path=str(folder), eval_split="train", channels=2, channel_names=NAMES,
        image_size=8, batch_size=16, eval_batch_size=24, channel_sampling="unsorted",
        mean=(0.3,) * 2, std=(0.3,) * 2,
    )  # fmt: skip
    model = ChannelMambaConfig(
        image_size=8, patch_size=4, channels=2, num_classes=2, embed_dim=8, depth=1, state_size=2,
        drop_path=0.1, pooling="max", blocks="unroll",
    )  # fmt: skip
    optimizer = OptimizerConfig(
        learning_rate=1e-2, learning_rate_scaling="none", warmup_epochs=0.5, weight_decay=0.04,
        weight_decay_end=0.4, decay_groups="cell",
    )  # fmt: skip
    return TrainConfig(
        model=model, data=data, optimizer=optimizer, epochs=2, ema_decay=None, label_smoothing=0.0,
        checkpoint_every_steps=4, log_every_steps=3,
    )  # fmt: skip


def test_a_stopped_run_goes_on_with_the_same_channels_and_ends_in_the_same_bits(
    config: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "measures_norms", lambda due: due)  # as on a GPU
    monkeypatch.setattr(CellsData, "notes", ("A note on the settings.",))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train(config, whole)
    assert result.step == 6 and result.metrics["count"] == 48
    counts = [len(draw_channels(config.seed, step, 2, "unsorted")) for step in range(6)]
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "A note on the settings." in shown
    said = re.findall(r"Step (\d) compiles [^.]* image 16x8x8x(\d)", shown)
    first = [(str(counts.index(n) + 1), str(n)) for n in dict.fromkeys(counts)]
    assert said == first[1:] and len(first) == 2
    assert shown.count("compiles the program") == 1  # one for each number of channels
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "6")
    train(config, stopped, progress=False)
    one, other = (load_run(run, weights="raw").model for run in (whole, stopped))
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (one, other)), strict=True):
        assert np.array_equal(a, b)

    chosen = dataclasses.replace(config.data, eval_channels=("GFP",))
    subset = score_run(whole, chosen)
    assert subset.scores["raw"]["count"] == 48
    every = score_run(whole, config.data)
    assert every.scores["raw"]["loss"] != subset.scores["raw"]["loss"]


def test_a_model_without_channel_ids_sees_missing_channels_at_their_mean(
    rng: np.random.Generator,
) -> None:
    images = jax.numpy.asarray(rng.standard_normal((2, 3, 3, 2)), jax.numpy.float32)
    ids = np.array([[3, 1], [0, 2]])
    spread = np.asarray(spread_channels(images, ids, 4))
    for i in (0, 1):
        assert np.allclose(spread[i][..., ids[i]], images[i], atol=1e-6)
        assert not np.delete(spread[i], ids[i], axis=-1).any()

    class Model:
        config = VisionMambaConfig(channels=4)

    assert channel_inputs(Model(), images, {"channel_ids": ids})["images"].shape == (2, 3, 3, 4)
    assert channel_inputs(Model(), jax.numpy.asarray(spread), {}).keys() == {"images"}

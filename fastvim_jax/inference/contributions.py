"""Compute what each channel contributes to a model's answer for one image, as numbers and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from fastvim_jax.data.cells_config import CellsData
from fastvim_jax.data.cells_device import make_preprocess
from fastvim_jax.models.channels import channel_inputs


@dataclasses.dataclass(frozen=True)
class Contribution:
    """Dependence of one class's probability on one channel.

    Attributes:
        channel: its name.
        without: the class's probability when all channels but this one are seen (all, if it is the only one).
        alone: the probability when this channel alone is seen.
    """

    channel: str
    without: float
    alone: float


def channel_contributions(
    model: nnx.Module, data: CellsData, image: UInt8[np.ndarray, "h w c"], label: int | None = None
) -> tuple[int, float, list[Contribution]]:
    """Classify an image with all channels, without each, and with each alone; three programs are compiled.

    Args:
        model: a trained classifier.
        data: the data it was trained on.
        image: uint8, cut to the model's input size, with all of the data's channels.
        label: the class to follow; None: the most probable one with all channels.

    Returns:
        The class, its probability with all channels, and what each channel contributes.
    """
    graphdef, params = nnx.split(model)
    preprocess = make_preprocess(data)

    @jax.jit
    def classify(params: Any, images: jax.Array, ids: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graphdef, params)
        inputs = channel_inputs(model, preprocess(images, ids), {"channel_ids": ids})
        logits = model(**inputs)
        return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))

    def probabilities(subsets: Sequence[Sequence[int]]) -> np.ndarray:
        ids = np.asarray(subsets, np.int32)
        images = np.stack([image[..., subset] for subset in ids])
        return np.asarray(classify(params, images, ids))

    every = list(range(data.channels))
    whole = probabilities([every])[0]
    chosen = int(whole.argmax()) if label is None else label
    alone = probabilities([[i] for i in every])[:, chosen]
    if data.channels > 1:
        without = probabilities([[j for j in every if j != i] for i in every])[:, chosen]
    else:
        without = whole[[chosen]]
    found = [
        Contribution(name, float(w), float(a))
        for name, w, a in zip(data.names, without, alone, strict=True)
    ]
    return chosen, float(whole[chosen]), found


def draw_contributions(
    image: UInt8[np.ndarray, "h w c"],
    title: str,
    probability: float,
    contributions: Sequence[Contribution],
    picture: Path | str,
) -> None:
    """Draw every channel of the image above the probabilities without it and with it alone."""
    import matplotlib.pyplot as plt

    count = len(contributions)
    figure, axes = plt.subplots(
        2,
        count,
        figsize=(1.9 * count + 0.6, 4.2),
        layout="constrained",
        squeeze=False,
        sharey="row",
    )
    for i, one in enumerate(contributions):
        axes[0, i].imshow(image[..., i], cmap="gray")
        axes[0, i].set_title(one.channel, fontsize=9)
        axes[0, i].set_axis_off()
        axes[1, i].bar(["without", "alone"], [one.without, one.alone], color=["C0", "C1"])
        axes[1, i].axhline(probability, color="black", lw=1)
        axes[1, i].set_ylim(0, 1)
        axes[1, i].tick_params(labelsize=8)
    axes[1, 0].set_ylabel("probability")
    figure.suptitle(f"{title}: {probability:.2f} with all channels (line)")
    figure.savefig(picture, dpi=120)
    plt.close(figure)

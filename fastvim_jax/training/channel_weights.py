"""Match channels by name between a model's weights and the data that it gets."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fastvim_jax.data.multichannel import spelled_as
from fastvim_jax.errors import UserError
from fastvim_jax.training.weights_source import Source

EMBEDDING = "patch_embed.channel_embed"
"""Embedding of each channel, `channels d`, of a model that reads any subset of channels."""
KERNEL = "patch_embed.proj.kernel"
"""Patch kernel `p q channels d` of a model that reads all channels at once."""


def match_channels(source: Source, data: Any) -> tuple[Source, tuple[str, ...]]:
    """Put the weights of each channel at the place where the data have it, and say what was done.

    Otherwise a run on DNA and ER would start with the embeddings of the source's first two channels, whatever they are.
    A channel that the source lacks begins with the mean of the source's embeddings, or with a kernel of zeros.

    Args:
        source: the weights. Nothing changes unless the source names its channels.
        data: the run's data. Nothing changes unless they name their channels.

    Returns:
        The source for the data's channels, and notes.

    Raises:
        UserError: several channels of the source have the name of one channel here, but for capitals.
    """
    here = tuple(getattr(data, "channel_names", ()) or ())
    there = spelled_as(getattr(source.data, "channel_names", ()) or (), here)
    name = EMBEDDING if EMBEDDING in source.arrays else KERNEL
    axis = 0 if name == EMBEDDING else -2
    array = source.arrays.get(name)
    if not here or not there or here == there or array is None or array.shape[axis] != len(there):
        return source, ()
    known = [channel for channel in here if channel in there]
    if not known:
        return source, (
            f"the channels are {', '.join(there)} there, {', '.join(here)} here: weights are taken in this order",
        )
    if twice := [channel for channel in known if there.count(channel) > 1]:
        raise UserError(
            f"several channels of the weights are called {twice[0]}, but for capitals "
            f"({', '.join(source.data.channel_names)}): which of them it is cannot be told."
        )
    missing = array.mean(axis=0) if name == EMBEDDING else np.zeros_like(array[:, :, 0])
    parts = [
        np.take(array, there.index(channel), axis=axis) if channel in there else missing
        for channel in here
    ]
    arrays = {**source.arrays, name: np.stack(parts, axis=axis).astype(array.dtype)}
    notes = [f"weights of the channels {', '.join(known)} are found by name"]
    if new := [channel for channel in here if channel not in there]:
        start = "the mean of the source's embeddings" if name == EMBEDDING else "0"
        notes.append(f"weights of {', '.join(new)}, which the source lacks, begin at {start}")
    return dataclasses.replace(source, arrays=arrays), tuple(notes)


def require_places(own: Any, data: Any) -> None:
    """Raise UserError if a channel of the model is named at another place: it would be taken for another channel.

    Other names at the same places are what other data call the channels.

    Args:
        own: what the model was trained on, perhaps with `channel_names`.
        data: the data that it is to see, perhaps with `channel_names`.
    """
    if any(there != here for there, here in common_places(own, data)):
        raise UserError(
            f"data.channel_names is {', '.join(data.channel_names)}, but the model's channels are "
            f"{', '.join(own.channel_names)}, in this order: name all of them so. Some of them are evaluated with "
            "data.eval_channels (--data.eval-channels)."
        )


def common_places(own: Any, data: Any) -> list[tuple[int, int]]:
    """Return where two data sets have each channel that both name: its place in the first, and in the second."""
    names = tuple(getattr(data, "channel_names", ()) or ())
    there = spelled_as(getattr(own, "channel_names", ()) or (), names)
    return [(there.index(name), place) for place, name in enumerate(names) if name in there]

"""Match channels by name between the weights that a run starts from and its data."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fastvim_jax.data.multichannel import spelled_as
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

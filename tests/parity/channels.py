"""The channels that a fixture of a channel model keeps and names."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.parity.golden import Golden

CHANNEL_KINDS = (
    "FastChannelVim", "FastChannelVim2DCompress", "ChannelVim", "ChannelViT", "HCSChannelViT"
)  # fmt: skip


def channels_of(golden: Golden, images: Any) -> tuple[Any, np.ndarray | None]:
    """Return images `b h w k` of the channels that the step keeps, and their ids `b k`; None: the first k.

    A fixture of channel sampling has its draw in `hcs_channels`: positions among the channels of the input. The ids of
    the input's channels are `channels` or `input_channel_order`; ChannelViT itself reads the first row for all samples.
    """
    ids = golden.inputs.get("channels", golden.inputs.get("input_channel_order"))
    if ids is not None and golden.kind == "ChannelViT":
        ids = ids[:1]
    kept = golden.meta.get("hcs_channels")
    if kept is not None:
        images = images[..., np.asarray(kept)]
        ids = np.asarray(kept)[None] if ids is None else ids[:, np.asarray(kept)]
    return images, None if ids is None else np.asarray(ids, np.int32)

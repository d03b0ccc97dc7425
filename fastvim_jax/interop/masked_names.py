"""Masked autoencoders under the authors' PyTorch names: an encoder named as a classifier, and a decoder."""

from __future__ import annotations

import re

import numpy as np

from fastvim_jax.errors import UserError
from fastvim_jax.interop.torch_names import (
    LINEAR,
    SAME,
    VISION_MAMBA,
    VISION_TRANSFORMER,
    Layout,
    NameTable,
)
from fastvim_jax.layers.pos_embed import sincos_pos_embed
from fastvim_jax.models.mae import MaskedAutoencoder
from fastvim_jax.models.vision_mamba import VisionMamba
from fastvim_jax.models.vit import VisionTransformer


def masked_autoencoder_names(
    encoder: list[tuple[str, str, Layout]],
) -> list[tuple[str, str, Layout]]:
    """Return the names of a masked autoencoder whose encoder has the names `encoder` in a classifier."""
    blocks = [
        entry for entry in encoder if "{i}" in entry[0] and not entry[0].startswith("outnorm")
    ]
    decoder = [
        (re.sub(r"^(layers|blocks)", "decoder_blocks", theirs), f"decoder.{ours}", layout)
        for theirs, ours, layout in blocks
    ]
    return [
        *((theirs, f"encoder.{ours}", layout) for theirs, ours, layout in encoder),
        *decoder,
        ("mask_token", "decoder.mask_token", SAME),
        ("decoder_embed.weight", "decoder.embed.kernel", LINEAR),
        ("decoder_embed.bias", "decoder.embed.bias", SAME),
        ("decoder_norm.weight", "decoder.norm.scale", SAME),
        ("decoder_norm.bias", "decoder.norm.bias", SAME),
        ("decoder_pred.weight", "decoder.pixels.kernel", LINEAR),
        ("decoder_pred.bias", "decoder.pixels.bias", SAME),
    ]


MASKED_TABLES = {
    VisionMamba: NameTable(tuple(masked_autoencoder_names(VISION_MAMBA))),
    VisionTransformer: NameTable(tuple(masked_autoencoder_names(VISION_TRANSFORMER))),
}
"""Names of masked autoencoders by the class of their encoder."""


def without_tables(
    model: MaskedAutoencoder, arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Drop the fixed position tables, which are computed here; raise if they are not the sin-cos tables."""
    config = model.config
    for name, width in (
        ("pos_embed", config.encoder.embed_dim),
        ("decoder_pos_embed", config.decoder_dim),
    ):
        table = sincos_pos_embed(width, config.grid)
        if model.encoder.class_token is not None:
            table = np.insert(table, 0, 0.0, axis=0)
        given = arrays.get(name)
        if given is not None and (
            given.shape != (1, *table.shape) or np.abs(given[0] - table).max() > 1e-4
        ):
            raise UserError(
                f"{name} {given.shape} is not the fixed sin-cos table (1, {table.shape[0]}, {table.shape[1]}) of this "
                "model: is it a masked autoencoder's, of this image and patch size?"
            )
    return {k: v for k, v in arrays.items() if k not in ("pos_embed", "decoder_pos_embed")}

"""Map the authors' PyTorch names of masked autoencoders to ours. The encoder's names are those of a classifier."""

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
from fastvim_jax.models.mae import MaskedAutoencoder, fixed_table
from fastvim_jax.models.vision_mamba import VisionMamba
from fastvim_jax.models.vit import VisionTransformer


def masked_autoencoder_names(
    encoder: list[tuple[str, str, Layout]],
) -> list[tuple[str, str, Layout]]:
    """Return the table of a masked autoencoder, given the table `encoder` of a classifier like its encoder."""
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


def fixed_tables(model: MaskedAutoencoder) -> dict[str, np.ndarray]:
    """Return the position tables `1 l d`, which the authors store among the weights and this library computes.

    If there is a class token, its row is the first and is zero.
    """
    config = model.config
    widths = {"pos_embed": config.encoder.embed_dim, "decoder_pos_embed": config.decoder_dim}
    tables = {
        name: fixed_table(config.encoder, width, config.grid) for name, width in widths.items()
    }
    if model.encoder.class_token is not None:
        tables = {name: np.insert(table, 0, 0.0, axis=0) for name, table in tables.items()}
    return {name: table[None].astype(np.float32) for name, table in tables.items()}


def without_tables(
    model: MaskedAutoencoder, arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return `arrays` without the fixed position tables.

    Raises:
        UserError: a table is not the sin-cos table of this model.
    """
    tables = fixed_tables(model)
    for name, table in tables.items():
        given = arrays.get(name)
        if given is not None and (given.shape != table.shape or np.abs(given - table).max() > 1e-4):
            raise UserError(
                f"{name} {given.shape} is not the fixed sin-cos table {table.shape} of this "
                "model: is it a masked autoencoder's, of this image and patch size?"
            )
    return {k: v for k, v in arrays.items() if k not in tables}

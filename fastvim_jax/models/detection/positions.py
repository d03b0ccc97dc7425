"""Crop a backbone's position table to an image that is padded less than the images it was trained on."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx


def crop_positions(backbone: Any, size: tuple[int, int]) -> None:
    """Give a backbone the part of its position table that images of `size` cover, at the top left.

    Otherwise the backbone resamples the table, and a patch gets another position than in a larger padded image. The
    backbone is changed in place: merge it anew for each size. A larger `size` changes nothing.

    Args:
        backbone: a FastVim, Vim, ViT or ChannelVim.
        size: height and width of the padded images, multiples of the patch.
    """
    config = backbone.config
    whole, patch = config.grid, config.patch
    part = (size[0] // patch[0], size[1] // patch[1])
    if part == whole or part[0] > whole[0] or part[1] > whole[1]:
        return
    backbone.config = dataclasses.replace(config, image_size=tuple(size))
    if backbone.pos_embed is None:
        return
    if getattr(config, "token_order", "row") == "column":
        whole, part = whole[::-1], part[::-1]
    table = backbone.pos_embed[...]
    class_row = table.shape[1] - whole[0] * whole[1]  # 1 if the table has a row for the class token
    source = _class_index(config, whole) if class_row else 0
    target = _class_index(config, part) if class_row else 0
    patches = jnp.concatenate([table[:, :source], table[:, source + class_row :]], axis=1)
    patches = patches.reshape(1, *whole, -1)[:, : part[0], : part[1]].reshape(
        1, part[0] * part[1], -1
    )
    token = table[:, source : source + class_row]
    backbone.pos_embed = nnx.Param(
        jnp.concatenate([patches[:, :target], token, patches[:, target:]], axis=1)
    )


def _class_index(config: Any, grid: tuple[int, int]) -> int:
    """Return the class token's place in the table: in the middle or at the head; a ViT's is at the head."""
    return grid[0] * grid[1] // 2 if getattr(config, "class_token", "head") == "middle" else 0

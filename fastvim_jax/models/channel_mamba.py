"""ChannelVim and FastChannelVim: one token per patch and channel, scanned by the mixers of Vim and FastVim.

tokens[r, c, k] = patch[r, c] of channel k + embedding of channel k + position[r, c]

Tokens lie channel-first (row, column, channel: the channel changes fastest) or spatial-first (channel, row, column).
Any subset of the channels is a valid input; `channel_ids` says which channels it holds.

Source: FastVim, sections 3.3 and 4.4, Tables 3 and 19 to 21.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastvim_jax.distributed.sharding import with_auto_axes
from fastvim_jax.errors import UserError
from fastvim_jax.layers.channel_embed import ChannelIds, ChannelPatchEmbed, strided_grid
from fastvim_jax.layers.channel_pooling import ChannelPoolAxes, ScanOrder, channel_poolings
from fastvim_jax.layers.pooling import Pooling
from fastvim_jax.layers.pos_embed import add_table, resize_pos_embed
from fastvim_jax.models.config import Classes, Pixels, PoolingMethod, VisionMambaConfig, Width
from fastvim_jax.models.vision_mamba import VisionMamba
from fastvim_jax.typing import Images, Tokens

ChannelGrid = tuple[int, int, int]
"""Rows, columns and channels of tokens."""


@dataclass(frozen=True, kw_only=True)
class ChannelMambaConfig(VisionMambaConfig):
    """A ChannelVim (pooling="none") or FastChannelVim with its head; see `VisionMambaConfig` for the other fields.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    channels: Width = 8
    """Channels that have an embedding; an image may hold any subset of them."""
    num_classes: Classes = 161
    """Classes of the head; 0 for none (the model then returns its pooled features)."""
    pooling: PoolingMethod = "mean"
    """What the scan reads of each line of tokens: mean, max or attention (FastChannelVim, Table 20), or every token,
    none (ChannelVim)."""
    pool_axes: ChannelPoolAxes = "alternate"  # type: ignore[assignment]  # One choice more.
    """Pool over columns in even blocks and over rows in odd ones; always over columns, or rows; or over two axes in a
    cycle of three blocks: columns and channels, rows and channels, rows and columns (Table 21)."""
    scan_order: ScanOrder = "channel"
    """channel: tokens go row, column, channel; spatial: channel, row, column (Table 19)."""
    stride: Pixels | None = None
    """Pixels between the beginnings of neighbouring patches; None: patch_size. Less makes patches overlap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride is not None:
            step = (self.stride, self.stride) if isinstance(self.stride, int) else self.stride
            object.__setattr__(self, "stride", None if step == self.patch else step)
        if self.pool_axes == "two_axes" and self.scan_order == "spatial":
            raise UserError(
                "pool_axes='two_axes' pools axes that are next to each other in channel-first order only: set "
                "scan_order='channel'."
            )
        if self.pooling != "none" and self.class_token != "none":
            raise UserError(
                f"class_token={self.class_token!r} with pooling={self.pooling!r}: FastChannelVim has no class token; "
                "set class_token='none'."
            )

    @property
    def step(self) -> tuple[int, int]:
        """Height and width of the stride."""
        assert not isinstance(self.stride, int), "normalised on construction"
        return self.stride or self.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        size = self.image_size
        return strided_grid((size, size) if isinstance(size, int) else size, self.patch, self.step)


class ChannelMamba(VisionMamba):
    """The FastChannelVim / ChannelVim family. Build it through `fastvim_jax.create_model`."""

    config: ChannelMambaConfig

    def make_patch_embed(self, rngs: nnx.Rngs) -> ChannelPatchEmbed:
        """Build patch and channel embedding."""
        config = self.config
        return ChannelPatchEmbed(
            config.patch,
            config.step,
            config.channels,
            config.embed_dim,
            precision=config.precision,
            rngs=rngs,
        )

    @property
    def positions(self) -> int:
        """Rows of the position table: one a patch; channels share it and the class token has none."""
        return self.config.grid[0] * self.config.grid[1]

    @with_auto_axes
    def __call__(
        self,
        images: Images,
        *,
        channel_ids: ChannelIds | None = None,
        key: jax.Array | None = None,
        drop_path_keep: Float[Array, "depth b"] | None = None,
    ):
        """Classify images.

        Args:
            images: `b h w k`, normalised, any float dtype; any size of at least one patch, any k up to the model's
                channels. One program is compiled for each k.
            channel_ids: which channels these are, `1 k` or `b k`; None: the first k.
            key: PRNG key of this step's drop path (training), or None (evaluation).
            drop_path_keep: 0/1 masks `depth b` to use instead of drawing them from `key`.

        Returns:
            Logits `b classes` (`b l classes` for head_pool="all") in float32 or wider; pooled features `b d` if
            num_classes is 0; or with `out_indices` the tuple of dense features `b rows columns d`, each the mean over
            the channels, normed.

        Raises:
            UserError: more channels than the model has, ids that do not fit, or an image smaller than a patch.
        """
        key, drop_path_keep = self._drop_path(key, drop_path_keep)
        blocks = self.config.out_indices
        return self._answer(
            *self._run(images, blocks, key, drop_path_keep, channel_ids=channel_ids)
        )

    def _poolings(self, grid: ChannelGrid) -> tuple[Pooling, ...]:  # type: ignore[override]
        config = self.config
        return channel_poolings(
            grid[:2],
            grid[2],
            scan_order=config.scan_order,
            pool_axes=config.pool_axes,
            method=config.pooling,
            scale=config.pool_scale,
            class_token=config.class_token != "none",
        )

    def _embed(  # type: ignore[override]
        self, images: Images, channel_ids: ChannelIds | None = None
    ) -> tuple[Tokens, ChannelGrid]:
        config = self.config
        wide = config.precision.wide
        patches = self.patch_embed(images, channel_ids).astype(wide)
        if config.token_order == "column":
            patches = patches.swapaxes(1, 2)
        batch, rows, columns, count, width = patches.shape
        spatial = config.scan_order == "spatial"
        if spatial:
            patches = patches.transpose(0, 3, 1, 2, 4)
        tokens = patches.reshape(batch, -1, width)
        if self.pos_embed is not None:
            built_for = config.grid[::-1] if config.token_order == "column" else config.grid
            table = resize_pos_embed(self.pos_embed[...], built_for, (rows, columns)).astype(wide)
            # Every channel of a patch has the patch's position.
            repeated = (
                jnp.tile(table, (1, count, 1)) if spatial else jnp.repeat(table, count, axis=1)
            )
            tokens = add_table(tokens, repeated)
        if self.class_token is not None:
            index = 0 if config.class_token == "head" else tokens.shape[1] // 2
            token = jnp.broadcast_to(self.class_token[...].astype(wide), (batch, 1, width))
            tokens = jnp.concatenate([tokens[:, :index], token, tokens[:, index:]], axis=1)
        return tokens, (rows, columns, count)

    def _as_image(self, tokens: Tokens, grid: Any, norm: Any = None) -> Array:
        config = self.config
        if config.class_token != "none":
            index = 0 if config.class_token == "head" else (tokens.shape[1] - 1) // 2
            tokens = jnp.delete(tokens, index, axis=1, assume_unique_indices=True)
        image = mean_over_channels(tokens, grid[:2], channel_first=config.scan_order == "spatial")
        image = image if norm is None else norm(image)
        return image.swapaxes(1, 2) if config.token_order == "column" else image


def mean_over_channels(
    tokens: Tokens, grid: tuple[int, int], *, channel_first: bool
) -> Float[Array, "b rows columns d"]:
    """Average the tokens of each patch of `grid` (rows, columns).

    Args:
        tokens: `b l d`, without class token.
        grid: rows and columns of patches.
        channel_first: tokens go channel, row, column, instead of row, column, channel.

    Raises:
        UserError: the tokens are no whole number of channels of this grid.
    """
    batch, length, width = tokens.shape
    rows, columns = grid
    if length % (rows * columns):
        raise UserError(
            f"{length} tokens are no whole number of channels of {rows} x {columns} patches."
        )
    shape = (-1, rows, columns) if channel_first else (rows, columns, -1)
    image = tokens.reshape(batch, *shape, width)
    return jnp.mean(image, axis=1 if channel_first else 3)

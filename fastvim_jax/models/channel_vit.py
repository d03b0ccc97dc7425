"""ChannelViT: attention over one token per patch and channel, the baseline of Tables 3 and 22.

tokens[k, r, c] = patch[r, c] of channel k + embedding of channel k + position[r, c],   class token first

Source: Bao et al., Channel Vision Transformers: An Image Is Worth 1 x 16 x 16 Words (2024).
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
from fastvim_jax.layers.pooling import NoPooling, Pooling
from fastvim_jax.layers.pos_embed import add_table, resize_pos_embed
from fastvim_jax.models.channel_mamba import ChannelGrid, mean_over_channels
from fastvim_jax.models.config import Classes, ViTConfig, Width
from fastvim_jax.models.vit import VisionTransformer
from fastvim_jax.typing import Images, Tokens

STRETCH = 0.1
"""Patches that the released model adds to both sides of a grid, rows and columns, when it resamples its positions."""


@dataclass(frozen=True, kw_only=True)
class ChannelViTConfig(ViTConfig):
    """A ChannelViT with its head; see `ViTConfig` for the other fields.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    channels: Width = 8
    """Channels that have an embedding; an image may hold any subset of them."""
    num_classes: Classes = 161
    """Classes of the head; 0 for none (the model then returns its pooled features)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = {"pooling": "none", "conv_width": 0, "head_pool": "token"}
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"{name}={getattr(self, name)!r}: ChannelViT is plain attention whose class token is classified; "
                    f"leave {name} at {value!r}."
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        size = self.image_size
        pair = (size, size) if isinstance(size, int) else size
        return strided_grid(pair, self.patch, self.patch)


class ChannelViT(VisionTransformer):
    """The ChannelViT family. Build it through `fastvim_jax.create_model`."""

    config: ChannelViTConfig

    def make_patch_embed(self, rngs: nnx.Rngs) -> ChannelPatchEmbed:
        """Build patch and channel embedding; the position table and the class token are those of a ViT."""
        config = self.config
        return ChannelPatchEmbed(
            config.patch,
            config.patch,
            config.channels,
            config.embed_dim,
            precision=config.precision,
            rngs=rngs,
        )

    @with_auto_axes
    def __call__(
        self,
        images: Images,
        *,
        channel_ids: ChannelIds | None = None,
        key: jax.Array | None = None,
        drop_path_keep: Float[Array, "depth 2 b"] | None = None,
    ):
        """Classify images `b h w k`; arguments and results as `ChannelMamba.__call__`.

        `drop_path_keep` has one mask for the attention and one for the MLP of each block.
        """
        key, drop_path_keep = self._drop_path(key, drop_path_keep)
        blocks = self.config.out_indices
        return self._answer(
            *self._run(images, blocks, key, drop_path_keep, channel_ids=channel_ids)
        )

    def _poolings(self, grid: ChannelGrid) -> tuple[Pooling, ...]:  # type: ignore[override]
        return (NoPooling(grid[0] * grid[1] * grid[2] + 1),)

    def _embed(  # type: ignore[override]
        self, images: Images, channel_ids: ChannelIds | None = None
    ) -> tuple[Tokens, ChannelGrid]:
        config = self.config
        wide = config.precision.wide
        patches = self.patch_embed(images, channel_ids).astype(wide)
        batch, rows, columns, count, width = patches.shape
        tokens = patches.transpose(0, 3, 1, 2, 4).reshape(batch, -1, width)
        token = jnp.broadcast_to(self.class_token[...].astype(wide), (batch, 1, width))
        table = self.pos_embed[...]
        # Only in this case the released model uses its table as it is. Otherwise it resamples and stretches the table,
        # and the released weights were trained with that.
        native = (
            count == 1 and images.shape[1] == images.shape[2] and (rows, columns) == config.grid
        )
        positions = resize_pos_embed(
            table[:, 1:], config.grid, (rows, columns), stretch=0.0 if native else STRETCH
        )
        if not native and (rows, columns) == config.grid:
            # Resampling to a grid of the same size has the gradient of a copy in PyTorch, and so in the released model.
            positions = table[:, 1:] + jax.lax.stop_gradient(positions - table[:, 1:])
        repeated = jnp.concatenate([table[:, :1], jnp.tile(positions, (1, count, 1))], axis=1)
        tokens = jnp.concatenate([token, tokens], axis=1)
        return add_table(tokens, repeated.astype(wide)), (rows, columns, count)

    def _as_image(self, tokens: Tokens, grid: Any, norm: Any = None) -> Array:
        image = mean_over_channels(tokens[:, 1:], grid[:2], channel_first=True)
        return image if norm is None else norm(image)

"""FastVim and Vim: patch embedding, a stack of bidirectional scan mixers, a head. There is no MLP.

residual = patches + position embedding                 (float32, as is everything that adds to it)
residual = residual + drop_path(mixer(norm(residual)))  for every block
logits   = head(pool(norm(residual)))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float

from fastvim_jax.distributed.sharding import with_auto_axes
from fastvim_jax.layers.drop_path import draw_masks, keep_factors
from fastvim_jax.layers.head import make_head
from fastvim_jax.layers.mixer import Mixer, prepare_blocks
from fastvim_jax.layers.norms import keeping_input, make_norm
from fastvim_jax.layers.patch_embed import PatchEmbed
from fastvim_jax.layers.pooling import GridPooling, NoPooling, Pooling, largest
from fastvim_jax.layers.pos_embed import add_table, resize_pos_embed, resize_with_class_row
from fastvim_jax.models.config import VisionMambaConfig
from fastvim_jax.models.stack import broadcast_keep, run_blocks, stack_blocks
from fastvim_jax.typing import Images, Keep, Tokens


class Block(nnx.Module):
    """Input norm, mixer and residual sum of one block."""

    def __init__(self, config: VisionMambaConfig, *, rngs: nnx.Rngs):
        p = config.precision
        self.norm = make_norm(
            config.norm, config.embed_dim, eps=config.norm_eps, precision=p, rngs=rngs
        )
        self.mixer = Mixer(config.mixer, rngs=rngs)

    def __call__(
        self, residual: Tokens, pooling: Pooling, keep: Keep | None
    ) -> tuple[Tokens, Tokens]:
        """Return the new residual stream and the mixer's own output, both `b l d`."""
        hidden = self.mixer(keeping_input(self.norm, residual), pooling)
        update = hidden.astype(residual.dtype)
        if keep is not None:
            update = update * broadcast_keep(keep, update)
        return residual + update, hidden


class VisionMamba(nnx.Module):
    """The FastVim / Vim family. Build it through `fastvim_jax.create_model`.

    All parameters are `nnx.Param`; those of the blocks (`blocks...`) carry a leading `depth` axis.
    """

    def __init__(self, config: VisionMambaConfig, *, rngs: nnx.Rngs):
        p, d = config.precision, config.embed_dim
        self.config = config
        self.patch_embed = self.make_patch_embed(rngs)
        small = normal(0.02)
        self.class_token = (
            nnx.data(None)
            if config.class_token == "none"
            else nnx.Param(small(rngs.params(), (1, 1, d), p.params))
        )
        self.pos_embed = (
            nnx.Param(small(rngs.params(), (1, self.positions, d), p.params))
            if config.pos_embed
            else nnx.data(None)
        )
        self.blocks = stack_blocks(
            lambda block_rngs: Block(config, rngs=block_rngs), config.depth, rngs
        )
        dense_features = bool(config.out_indices)
        self.out_norms = nnx.List(
            make_norm("layer", d, eps=1e-5, precision=p, rngs=rngs) for _ in config.out_indices
        )
        self.norm = (
            nnx.data(None)
            if dense_features
            else make_norm(config.norm, d, eps=config.norm_eps, precision=p, rngs=rngs)
        )
        self.head = (
            make_head(
                d, config.num_classes, kernel_init=normal(config.head_std), precision=p, rngs=rngs
            )
            if config.num_classes and not dense_features
            else nnx.data(None)
        )

    def make_patch_embed(self, rngs: nnx.Rngs) -> Any:
        """Build the patch embedding."""
        config = self.config
        return PatchEmbed(
            config.patch, config.channels, config.embed_dim, precision=config.precision, rngs=rngs
        )

    @property
    def positions(self) -> int:
        """Rows of the position table: one a patch, and one for the class token if there is one."""
        return self.config.grid[0] * self.config.grid[1] + (self.config.class_token != "none")

    @with_auto_axes
    def __call__(
        self,
        images: Images,
        *,
        key: jax.Array | None = None,
        drop_path_keep: Float[Array, "depth b"] | None = None,
    ):
        """Classify images, or extract dense features where `out_indices` are set.

        Args:
            images: `b h w c`, normalised, any float dtype; any size of at least one patch.
            key: PRNG key of this step's drop path (training), or None (evaluation).
            drop_path_keep: 0/1 masks `depth b` to use instead of drawing them from `key`.

        Returns:
            Logits `b classes` (`b l classes` for head_pool="all") in float32 or wider; pooled features `b d` if
            num_classes is 0; or the tuple of dense features `b rows columns d`.

        Raises:
            UserError: wrong channel count, or an image smaller than a patch.
        """
        tokens, grid = self.embed(images)
        residual, outputs = self.encode(
            tokens,
            self.poolings(grid),
            key=key,
            drop_path_keep=drop_path_keep,
            taps=self.config.out_indices,
        )
        if self.config.out_indices:
            return self._dense_features([outputs[i][1] for i in self.config.out_indices], grid)
        return self.classify(residual)

    def classify(self, residual: Tokens) -> Array:
        """Map the last residual stream to logits, or to pooled features if there is no head."""
        features = self._pool(self.norm(residual))
        if self.head is None:
            return features
        logits = self.head(features)
        return largest(logits, axis=1) if self._reads_all("max") else logits

    @with_auto_axes
    def features(self, images: Images) -> Array:
        """Return what the head reads: `b d` after the final norm (`b l d` for head_pool "max" and "all")."""
        tokens, grid = self.embed(images)
        residual, _ = self.encode(tokens, self.poolings(grid))
        return self._pool(self.norm(residual))

    @with_auto_axes
    def intermediates(self, images: Images) -> list[tuple[Tokens, Tokens]]:
        """(residual stream before the block, the block's mixer output) of every block, in stored token order."""
        tokens, grid = self.embed(images)
        _, outputs = self.encode(tokens, self.poolings(grid), taps=range(self.config.depth))
        return [outputs[i] for i in range(self.config.depth)]

    def draw_drop_path(self, key: jax.Array, batch: int) -> Float[Array, "depth b"] | None:
        """Draw the masks that a call with this key draws for `batch` images; None if the model drops nothing."""
        return draw_masks(key, self.config.drop_path, (self.config.depth, batch))

    def poolings(self, grid: tuple[int, int]) -> tuple[Pooling, ...]:
        """Return one period of the stack's poolings over a stored `grid`."""
        config = self.config
        if config.pooling == "none":
            return (NoPooling(grid[0] * grid[1] + (self.class_token is not None)),)
        orders = {"alternate": (False, True), "columns": (False,), "rows": (True,)}
        return tuple(
            GridPooling(
                *grid,
                transposed=transposed,
                method=config.pooling,
                scale=config.pool_scale,
                class_index=self._class_index(grid),
            )
            for transposed in orders[config.pool_axes]
        )

    def encode(
        self,
        tokens: Tokens,
        poolings: Sequence[Pooling],
        *,
        key: jax.Array | None = None,
        drop_path_keep: Float[Array, "depth b"] | None = None,
        taps: Sequence[int] = (),
    ) -> tuple[Tokens, dict[int, tuple[Tokens, Tokens]]]:
        """Run all blocks over tokens `b l d`, as `embed` makes them or any others.

        Args:
            tokens: float32 or wider, in stored order.
            poolings: one period of the stack's poolings, for example `self.poolings(grid)`.
            key, drop_path_keep: as for a call of the model.
            taps: blocks whose (residual before, own output) are returned.

        Returns:
            The residual stream before the final norm, and the tapped pairs by block index.
        """
        config = self.config
        keep = keep_factors(
            key, drop_path_keep, config.drop_path, (config.depth, tokens.shape[0]), tokens.dtype
        )
        return run_blocks(
            prepare_blocks(self.blocks, poolings),
            tokens,
            poolings,
            depth=config.depth,
            keep=keep,
            mode=config.blocks,
            remat=config.remat,
            taps=taps,
        )

    def embed(self, images: Images) -> tuple[Tokens, tuple[int, int]]:
        """Make tokens `b l d`, with class token and position embedding, and the stored grid; float32 or wider."""
        wide = self.config.precision.wide
        patches = self.patch_embed(images)
        if self.config.token_order == "column":
            patches = patches.swapaxes(1, 2)
        grid = (patches.shape[1], patches.shape[2])
        tokens = patches.reshape(patches.shape[0], -1, patches.shape[-1]).astype(wide)
        index = self._class_index(grid)
        if index is not None:
            token = jnp.broadcast_to(
                self.class_token[...].astype(wide), (tokens.shape[0], 1, tokens.shape[2])
            )
            tokens = jnp.concatenate([tokens[:, :index], token, tokens[:, index:]], axis=1)
        if self.pos_embed is not None:
            tokens = add_table(tokens, self._position_table(grid).astype(wide))
        return tokens, grid

    def _position_table(self, grid: tuple[int, int]) -> Float[Array, "1 l d"]:
        built_for = self.config.grid
        if self.config.token_order == "column":
            built_for = built_for[::-1]
        table = self.pos_embed[...]
        source, target = self._class_index(built_for), self._class_index(grid)
        if source is None or target is None:
            return resize_pos_embed(table, built_for, grid)
        return resize_with_class_row(table, built_for, grid, source, target)

    def _class_index(self, grid: tuple[int, int]) -> int | None:
        return {"none": None, "middle": grid[0] * grid[1] // 2, "head": 0}[self.config.class_token]

    def _reads_all(self, *head_pools: str) -> bool:
        return self.class_token is None and self.config.head_pool in head_pools

    def _pool(self, tokens: Tokens) -> Array:
        if self.class_token is not None:
            grid_tokens = tokens.shape[1] - 1
            return tokens[:, 0 if self.config.class_token == "head" else grid_tokens // 2]
        if self._reads_all("max", "all"):
            return tokens
        return tokens[:, -1] if self.config.head_pool == "last" else jnp.mean(tokens, axis=1)

    def _dense_features(self, hidden: list[Tokens], grid: tuple[int, int]) -> tuple[Array, ...]:
        index = self._class_index(grid)
        features = []
        for norm, tokens in zip(self.out_norms, hidden, strict=True):
            if index is not None:
                tokens = jnp.delete(tokens, index, axis=1, assume_unique_indices=True)
            image = norm(tokens).reshape(tokens.shape[0], *grid, -1)
            features.append(image.swapaxes(1, 2) if self.config.token_order == "column" else image)
        return tuple(features)

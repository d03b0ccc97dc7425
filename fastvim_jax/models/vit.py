"""Vision Transformer (the DeiT architecture), the paper's baseline, and its pooled ablations (Table 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import truncated_normal
from jaxtyping import Array, Float

from fastvim_jax.distributed.sharding import with_auto_axes
from fastvim_jax.layers.attention import Attention, Mlp
from fastvim_jax.layers.drop_path import draw_masks, keep_factors
from fastvim_jax.layers.head import make_head
from fastvim_jax.layers.norms import keeping_input, make_norm
from fastvim_jax.layers.patch_embed import PatchEmbed
from fastvim_jax.layers.pooling import GridPooling, NoPooling, Pooling
from fastvim_jax.layers.pos_embed import add_table, resize_with_class_row
from fastvim_jax.models.config import ViTConfig
from fastvim_jax.models.stack import broadcast_keep, run_blocks, stack_blocks
from fastvim_jax.typing import Images, Tokens


class ViTBlock(nnx.Module):
    """Pre-norm attention and MLP, each with its own drop path."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        p, d = config.precision, config.embed_dim
        self.dtype = p.compute
        norm: dict[str, Any] = {"eps": config.norm_eps, "precision": p, "rngs": rngs}
        self.norm1 = make_norm("layer", d, **norm)
        self.attn = Attention(
            d,
            config.num_heads,
            qkv_bias=config.qkv_bias,
            conv_width=config.conv_width,
            precision=p,
            rngs=rngs,
        )
        self.norm2 = make_norm("layer", d, **norm)
        self.mlp = Mlp(d, int(d * config.mlp_ratio), precision=p, rngs=rngs)

    def __call__(
        self, residual: Tokens, pooling: Pooling, keep: Float[Array, "2 b"] | None
    ) -> tuple[Tokens, Tokens]:
        """Return the new residual stream twice (it is also what dense features read), `b l d`."""
        for branch, update in enumerate(
            (
                lambda x: self.attn(keeping_input(self.norm1, x).astype(self.dtype), pooling),
                lambda x: self.mlp(keeping_input(self.norm2, x).astype(self.dtype)),
            )
        ):
            y = update(residual).astype(residual.dtype)
            residual = residual + (y if keep is None else y * broadcast_keep(keep[branch], y))
        return residual, residual


class VisionTransformer(nnx.Module):
    """ViT / DeiT with the class token first. Build it through `fastvim_jax.create_model`."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        p, d = config.precision, config.embed_dim
        self.config = config
        self.patch_embed = self.make_patch_embed(rngs)
        small = truncated_normal(0.02)
        self.class_token = nnx.Param(small(rngs.params(), (1, 1, d), p.params))
        tokens = config.grid[0] * config.grid[1] + 1
        self.pos_embed = nnx.Param(small(rngs.params(), (1, tokens, d), p.params))
        self.blocks = stack_blocks(
            lambda block_rngs: ViTBlock(config, rngs=block_rngs), config.depth, rngs
        )
        self.out_norms = nnx.List(self._norm(rngs) for _ in config.out_indices)
        classify = not config.out_indices
        # With mean pooling the norm follows the pooling, under a name of its own as in the reference.
        self.norm = self._norm(rngs) if classify and config.head_pool == "token" else nnx.data(None)
        self.fc_norm = (
            self._norm(rngs) if classify and config.head_pool == "mean" else nnx.data(None)
        )
        self.head = (
            make_head(
                d,
                config.num_classes,
                kernel_init=truncated_normal(config.head_std),
                precision=p,
                rngs=rngs,
            )
            if config.num_classes and classify
            else nnx.data(None)
        )

    def make_patch_embed(self, rngs: nnx.Rngs) -> Any:
        """Build the patch embedding."""
        config = self.config
        return PatchEmbed(
            config.patch, config.channels, config.embed_dim, precision=config.precision, rngs=rngs
        )

    @with_auto_axes
    def __call__(
        self,
        images: Images,
        *,
        key: jax.Array | None = None,
        drop_path_keep: Float[Array, "depth 2 b"] | None = None,
    ):
        """Classify images `b h w c`; arguments and results as `VisionMamba.__call__`.

        `drop_path_keep` has one mask for the attention and one for the MLP of each block.
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
            return tuple(
                norm(outputs[i][1][:, 1:]).reshape(images.shape[0], *grid, -1)
                for norm, i in zip(self.out_norms, self.config.out_indices, strict=True)
            )
        return self.classify(residual)

    def classify(self, residual: Tokens) -> Array:
        """Map the last residual stream to logits, or to pooled features if there is no head."""
        features = self._pool(residual)
        return features if self.head is None else self.head(features)

    @with_auto_axes
    def features(self, images: Images) -> Float[Array, "b d"]:
        """Return what the head reads."""
        tokens, grid = self.embed(images)
        residual, _ = self.encode(tokens, self.poolings(grid))
        return self._pool(residual)

    @with_auto_axes
    def intermediates(self, images: Images) -> list[tuple[Tokens, Tokens]]:
        """(residual stream before the block, after the block) of every block."""
        tokens, grid = self.embed(images)
        _, outputs = self.encode(tokens, self.poolings(grid), taps=range(self.config.depth))
        return [outputs[i] for i in range(self.config.depth)]

    def draw_drop_path(self, key: jax.Array, batch: int) -> Float[Array, "depth 2 b"] | None:
        """Draw the masks that a call with this key draws for `batch` images; None if the model drops nothing."""
        return draw_masks(key, self.config.drop_path, (self.config.depth, 2, batch))

    def poolings(self, grid: tuple[int, int]) -> tuple[Pooling, ...]:
        """Return one period of the stack's poolings over `grid`; the class token, first, is never pooled."""
        if self.config.pooling == "none":
            return (NoPooling(grid[0] * grid[1] + 1),)
        orders = {"alternate": (False, True), "columns": (False,), "rows": (True,)}
        return tuple(
            GridPooling(*grid, transposed=transposed, class_index=0)
            for transposed in orders[self.config.pool_axes]
        )

    def _norm(self, rngs: nnx.Rngs):
        config = self.config
        return make_norm(
            "layer", config.embed_dim, eps=config.norm_eps, precision=config.precision, rngs=rngs
        )

    def embed(self, images: Images) -> tuple[Tokens, tuple[int, int]]:
        """Make tokens `b l d`, the class token first, with position embedding, and the grid; float32 or wider."""
        config = self.config
        wide = config.precision.wide
        patches = self.patch_embed(images)
        grid = (patches.shape[1], patches.shape[2])
        tokens = patches.reshape(patches.shape[0], -1, patches.shape[-1]).astype(wide)
        token = jnp.broadcast_to(
            self.class_token[...].astype(wide), (tokens.shape[0], 1, tokens.shape[2])
        )
        table = resize_with_class_row(self.pos_embed[...], config.grid, grid, 0, 0)
        return add_table(jnp.concatenate([token, tokens], axis=1), table.astype(wide)), grid

    def encode(
        self,
        tokens: Tokens,
        poolings: Sequence[Pooling],
        *,
        key: jax.Array | None = None,
        drop_path_keep: Float[Array, "depth 2 b"] | None = None,
        taps: Sequence[int] = (),
    ) -> tuple[Tokens, dict[int, tuple[Tokens, Tokens]]]:
        """Run all blocks over tokens `b l d`; arguments and results as `VisionMamba.encode`."""
        config = self.config
        keep = keep_factors(
            key, drop_path_keep, config.drop_path, (config.depth, 2, tokens.shape[0]), tokens.dtype
        )
        return run_blocks(
            self.blocks,
            tokens,
            poolings,
            depth=config.depth,
            keep=keep,
            mode=config.blocks,
            remat=config.remat,
            taps=taps,
        )

    def _pool(self, tokens: Tokens) -> Float[Array, "b d"]:
        if self.config.head_pool == "token":
            return self.norm(tokens)[:, 0]
        return self.fc_norm(jnp.mean(tokens[:, 1:], axis=1))

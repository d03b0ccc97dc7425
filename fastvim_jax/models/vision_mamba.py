"""Define FastVim and Vim: patch embedding, a stack of bidirectional scan mixers, a head. There is no MLP.

residual = patches + position embedding                 stored as `residual_in_fp32` says, also after every sum below
residual = residual + drop_path(mixer(norm(residual)))  for every block
logits   = head(pool(norm(residual)))

`VisionMamba` fills in the steps that `Backbone` calls, and `backbone` says what each step takes and returns. One GPU
kernel may compute the end of a block together with the norm of the next block (`JoinedBlock`), and one the patches with
the norm of the first block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float

from fastvim_jax.errors import UserError
from fastvim_jax.layers.fused_core import runs_joined
from fastvim_jax.layers.mixer import Mixer, prepare_blocks
from fastvim_jax.layers.norms import checkpointed_norm, make_norm
from fastvim_jax.layers.patch_embed import GridSize, PatchEmbed, check_images, grid_of
from fastvim_jax.layers.pooling import GridPooling, NoPooling, Pooling, max_by_argmax
from fastvim_jax.layers.pos_embed import add_table, resize_pos_embed, resize_with_class_row
from fastvim_jax.models.backbone import Backbone, Stream
from fastvim_jax.models.config import VisionMambaConfig
from fastvim_jax.models.rngs import RngsLike, as_rngs
from fastvim_jax.models.stack import run_blocks, stack_blocks
from fastvim_jax.typing import Images, Keep, Tokens
from pallas_kernels import gpu
from pallas_kernels.derivatives import differentiated_as
from pallas_kernels.mixer_core import Projection, Unprojected, add_to_residual
from pallas_kernels.patch_embed import embed_patches, embed_patches_unsupported
from pallas_kernels.sharding import cast_parameter, mark_varying


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
        hidden = self.mixer(checkpointed_norm(self.norm, residual), pooling)
        return add_to_residual(residual, hidden, keep), hidden


class JoinedBlock(nnx.Module):
    """A mixer joined to the norm of the *next* block, so that it maps normalised tokens to normalised tokens.

    Its parameters are the mixer's and the kernels of in_proj and out_proj transposed. The rows of in_proj's kernel are
    multiplied by the scale of the block's norm, so that the norm has none. Otherwise the scale's gradient would be one
    more sum over all tokens for every block.

    Args:
        blocks: stacked blocks from `stack_blocks`; they are copied.
        tokens: what the blocks will be applied to, for `cast_parameter`.
        keep_tokens: whether the gradient keeps the normalised tokens beside the residual stream. Computing them again
            takes about 1 % of a step. In a loop over blocks it takes no longer than writing them into a stack.
    """

    def __init__(self, blocks: Any, tokens: Tokens, *, keep_tokens: bool):
        copy = nnx.clone(blocks)
        self.keep_tokens = keep_tokens
        self.mixer, self.norm_eps = copy.mixer, copy.norm.epsilon
        compute = copy.mixer.config.precision.compute

        def transposed(kernel):
            return jnp.swapaxes(cast_parameter(kernel, compute, tokens), -1, -2)

        scaled = copy.mixer.in_proj.kernel[...] * copy.norm.scale[...][..., None]
        self.in_weight = nnx.Param(transposed(scaled))  # `depth 2e d`
        self.out_weight = nnx.Param(transposed(copy.mixer.out_proj.kernel[...]))  # `depth d e`
        del self.mixer.in_proj, self.mixer.out_proj
        # Inside a shard_map, sum the gradients of all blocks together over the devices. Otherwise JAX sums each block's
        # by themselves, and XLA writes every one of them by a kernel of its own before.
        nnx.update(self, mark_varying(nnx.state(self), tokens))

    def __call__(
        self, stream: tuple[Tokens, Tokens], pooling: Pooling, keep: Keep | None
    ) -> tuple[tuple[Tokens, Tokens], None]:
        """Map (residual stream, its normalised tokens) before the block to the same pair after it, all `b l d`."""
        residual, normed = stream
        unprojected = Unprojected(normed, self.in_weight[...])
        wide = self.mixer.config.precision.wide
        projection = Projection(self.out_weight[...], jnp.ones(residual.shape[-1], wide))
        eps = self.norm_eps
        stream = self.mixer.join(
            unprojected, residual, pooling, projection, eps, keep, self.keep_tokens
        )
        return stream, None


class VisionMamba(Backbone):
    """The FastVim / Vim family. Build it through `fastvim_jax.create_model`.

    All parameters are `nnx.Param`; those of the blocks (`blocks...`) carry a leading `depth` axis.
    """

    _head_init = staticmethod(normal)

    def __init__(self, config: VisionMambaConfig, *, rngs: RngsLike):
        rngs, p, d = as_rngs(rngs), config.precision, config.embed_dim
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
            self._make_head(config, rngs)
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

    def _poolings(self, grid: tuple[int, int]) -> tuple[Pooling, ...]:
        return grid_poolings(self.config, grid)

    def _prepared(self, poolings: Sequence[Pooling]) -> Any:
        return prepare_blocks(self.blocks, poolings)

    def _run_blocks(
        self,
        stream: Stream,
        poolings: Sequence[Pooling],
        output_blocks: Sequence[int],
        keep: jax.Array | None,
    ) -> tuple[Stream, dict[int, tuple[Tokens, Tokens]]]:
        config, tokens = self.config, stream.residual
        if not self._joins(tokens, poolings, output_blocks):
            return super()._run_blocks(stream, poolings, output_blocks, keep)
        normed = stream.normed
        if normed is None:
            normed = self._normalise_first()(tokens)
        last, outputs = run_blocks(
            JoinedBlock(self._prepared(poolings), tokens, keep_tokens=config.blocks == "unroll"),
            (tokens, normed),
            poolings,
            depth=config.depth,
            keep=keep,
            mode=config.blocks,
            remat="none",
        )
        return Stream(*last), outputs

    def _joins(
        self, tokens: Any, poolings: Sequence[Pooling], output_blocks: Sequence[int]
    ) -> bool:
        """Return whether blocks run joined. Their kernel returns no block's own output, and computes an RMSNorm."""
        config = self.config
        return (
            not output_blocks
            and config.remat == "none"
            and config.norm == "rms"
            and all(runs_joined(config.mixer, pooling, tokens) for pooling in poolings)
        )

    def _normalise_first(self) -> Callable[[Tokens], Tokens]:
        """Return the norm before the first joined block, without its scale. It holds no arrays."""
        graphdef, params = nnx.split(self.blocks.norm)
        of_one = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)  # noqa: E731
        shapes = jax.tree.map(of_one, params)
        compute = self.config.precision.compute

        def normalise(tokens: Tokens) -> Tokens:
            ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
            return checkpointed_norm(nnx.merge(graphdef, ones), tokens).astype(compute)

        return normalise

    def _start(
        self, images: Images, output_blocks: Sequence[int], **embed: Any
    ) -> tuple[Stream, Any]:
        grid = None if output_blocks or embed else self._grid_of_kernel(images)
        if grid is None:
            return super()._start(images, output_blocks, **embed)
        config = self.config
        p = config.precision
        graphdef, params = nnx.split(self.patch_embed)
        table = None if self.pos_embed is None else self._position_table(grid).astype(p.wide)
        normalise = self._normalise_first()

        def by_kernel(params, images, table):
            projection = nnx.merge(graphdef, params).proj
            start = projection.bias[...].astype(p.wide)
            start = start if table is None else start + table
            return embed_patches(
                images.astype(p.compute),
                projection.kernel[...],
                jnp.broadcast_to(start, (1, math.prod(grid), start.shape[-1])).reshape(*grid, -1),
                stream=p.residual,
                eps=config.norm_eps,
            )

        def step_by_step(params, images, table):
            tokens = jax.lax.collapse(nnx.merge(graphdef, params)(images), 1, 3).astype(p.wide)
            tokens = tokens if table is None else add_table(tokens, table)
            tokens = tokens.astype(p.residual)
            return tokens, normalise(tokens)

        both = differentiated_as(step_by_step, by_kernel, params, jnp.asarray(images), table)
        return Stream(*both), grid

    def _grid_of_kernel(self, images: Images) -> GridSize | None:
        """Return the grid of patches if one kernel embeds the images and applies the first block's norm, else None."""
        config, embed = self.config, self.patch_embed
        if (
            not isinstance(embed, PatchEmbed)
            or self.class_token is not None
            or config.token_order != "row"
            or gpu.kernels_missing() is not None
        ):
            return None
        images, p = check_images(images, embed.channels, embed.patch), config.precision
        batch, *size, _ = images.shape
        grid = grid_of((size[0], size[1]), embed.patch)
        tokens = jax.ShapeDtypeStruct((batch, math.prod(grid), config.embed_dim), p.residual)
        rounded = jax.ShapeDtypeStruct(images.shape, p.compute)
        whole = all(n % of == 0 for n, of in zip(size, embed.patch, strict=True))
        runs = (
            whole
            and self._joins(tokens, self._poolings(grid), ())
            and embed_patches_unsupported(rounded, embed.proj.kernel[...], stream=p.residual)
            is None
        )
        return grid if runs else None

    def _features(self, stream: Stream) -> Array:
        p = self.config.precision
        if (
            stream.normed is None
            or p.residual != p.compute
            or not self._classifies_every_token("mean")
        ):
            return super()._features(stream)
        graphdef, params = nnx.split(self.norm)

        def from_normed(params, residual, normed):
            del residual
            return jnp.mean(normed.astype(p.wide), axis=1) * nnx.merge(graphdef, params).scale[...]

        def from_residual(params, residual, normed):
            del normed
            return jnp.mean(nnx.merge(graphdef, params)(residual), axis=1)

        return differentiated_as(from_residual, from_normed, params, *stream)

    def _embed(self, images: Images) -> tuple[Tokens, GridSize]:
        wide = self.config.precision.wide
        patches = self.patch_embed(images)
        if self.config.token_order == "column":
            patches = patches.swapaxes(1, 2)
        grid = GridSize(patches.shape[1], patches.shape[2])
        tokens = jax.lax.collapse(patches, 1, 3).astype(wide)
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
        return _class_index(self.config, grid)

    def _classifies_every_token(self, *head_pools: str) -> bool:
        """Return whether the head reads every token, and `head_pool` is one of these."""
        return self.class_token is None and self.config.head_pool in head_pools

    def _pool(self, tokens: Tokens) -> Array:
        if self.class_token is not None:
            grid_tokens = tokens.shape[1] - 1
            return tokens[:, 0 if self.config.class_token == "head" else grid_tokens // 2]
        if self._classifies_every_token("max", "all"):
            return tokens
        return tokens[:, -1] if self.config.head_pool == "last" else jnp.mean(tokens, axis=1)

    def _classify(self, features: Array) -> Array:
        logits = self.head(features)
        return max_by_argmax(logits, axis=1) if self._classifies_every_token("max") else logits

    def _after_block(self, before: Tokens, output: Tokens) -> Tokens:
        return add_to_residual(before, output)

    def _as_image(self, tokens: Tokens, grid: GridSize, norm: Any = None) -> Array:
        index = self._class_index(grid)
        if index is not None:
            tokens = jnp.delete(tokens, index, axis=1, assume_unique_indices=True)
        tokens = tokens if norm is None else norm(tokens)
        image = tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])
        return image.swapaxes(1, 2) if self.config.token_order == "column" else image

    def _class_token_of(self, tokens: Tokens) -> Float[Array, "b 1 d"]:
        if self.class_token is None:
            raise UserError("return_prefix_tokens=True: this model has no class token.")
        return self._pool(tokens)[:, None]


def grid_poolings(config: VisionMambaConfig, grid: tuple[int, int]) -> tuple[Pooling, ...]:
    """List one period of a model's poolings over a stored `grid` of patches."""
    if config.pooling == "none":
        return (NoPooling(grid[0] * grid[1] + (config.class_token != "none")),)
    orders = {"alternate": (False, True), "columns": (False,), "rows": (True,)}
    return tuple(
        GridPooling(
            *grid,
            transposed=transposed,
            method=config.pooling,
            scale=config.pool_scale,
            class_index=_class_index(config, grid),
        )
        for transposed in orders[config.pool_axes]
    )


def _class_index(config: VisionMambaConfig, grid: tuple[int, int]) -> int | None:
    """Return the index of the class token among the tokens of a stored `grid`, or None without a class token."""
    return {"none": None, "middle": grid[0] * grid[1] // 2, "head": 0}[config.class_token]

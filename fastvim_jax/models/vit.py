"""Vision Transformer (the DeiT architecture), the paper's baseline, and its pooled ablations (Table 7)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float

from fastvim_jax.errors import UserError
from fastvim_jax.layers.attention import Attention, Mlp, pads_for_gradient
from fastvim_jax.layers.norms import checkpointed_norm, make_norm
from fastvim_jax.layers.patch_embed import GridSize, PatchEmbed
from fastvim_jax.layers.pooling import GridPooling, NoPooling, Pooling
from fastvim_jax.layers.pos_embed import add_table, resize_with_class_row
from fastvim_jax.models.backbone import Backbone, Stream
from fastvim_jax.models.config import ViTConfig
from fastvim_jax.models.rngs import RngsLike, as_rngs
from fastvim_jax.models.stack import run_blocks, stack_blocks
from fastvim_jax.typing import Images, Tokens
from pallas_kernels.derivatives import differentiated_as
from pallas_kernels.mixer_core import add_norm, add_norm_unsupported, add_to_residual, norm_stream
from pallas_kernels.sharding import mark_varying


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
                lambda x: self.attn(checkpointed_norm(self.norm1, x).astype(self.dtype), pooling),
                lambda x: self.mlp(checkpointed_norm(self.norm2, x).astype(self.dtype)),
            )
        ):
            factors = None if keep is None else keep[branch]
            residual = add_to_residual(residual, update(residual), factors)
        return residual, residual


class JoinedViTBlock(nnx.Module):
    """Attention and MLP, each joined to the norm behind it, so that it maps normalised tokens to normalised tokens.

    The norm behind the MLP is the next block's first. Behind the last block's nobody reads the result.

    Args:
        blocks: stacked blocks from `stack_blocks`; they are copied.
        tokens: what the blocks will be applied to.
    """

    def __init__(self, blocks: Any, tokens: Tokens):
        copy = nnx.clone(blocks)
        self.attn, self.mlp, self.middle_norm = copy.attn, copy.mlp, copy.norm2
        self.attn_bias = nnx.Param(copy.attn.bias())
        self.next_norm = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=0), copy.norm1)

        def vectors_marked(leaf: jax.Array) -> jax.Array:
            return mark_varying(leaf, tokens) if leaf.ndim == 2 else leaf

        # Inside a shard_map, sum the gradients of all blocks' biases and norms together over the devices, as
        # `JoinedBlock` does. Each matrix has its sum behind its product, in the dtype that this is computed in.
        nnx.update(self, jax.tree.map(vectors_marked, nnx.state(self)))

    def __call__(
        self,
        stream: tuple[Tokens, Tokens],
        pooling: Pooling,
        keep: Float[Array, "2 b"] | None,
    ) -> tuple[tuple[Tokens, Tokens], Tokens]:
        """Map (residual stream, its normalised tokens) to the same pair after the block; return the stream again."""
        residual, normed = stream
        branches = (
            (lambda x: self.attn.without_bias(x, pooling), self.attn_bias, self.middle_norm),
            (self.mlp.without_bias, self.mlp.fc2.bias, self.next_norm),
        )
        for branch, (update, bias, norm) in enumerate(branches):
            residual, normed = add_norm(
                update(normed),
                residual,
                norm.scale[...],
                norm.bias[...],
                bias[...],
                norm_eps=norm.epsilon,
                keep=None if keep is None else keep[branch],
            )
        return (residual, normed), residual


def run_vit_blocks(
    blocks: Any,
    tokens: Tokens,
    poolings: Sequence[Pooling],
    config: ViTConfig,
    *,
    depth: int,
    keep: Float[Array, "depth 2 b"] | None = None,
    output_blocks: Sequence[int] = (),
) -> tuple[Tokens, dict[int, tuple[Tokens, Tokens]]]:
    """Run stacked `ViTBlock`s over tokens `b l d` in the dtype of the residual stream, as `run_blocks` does.

    Where kernels can add to the stream and normalise it, they run joined.
    """
    static: dict[str, Any] = {
        "depth": depth,
        "mode": config.blocks,
        "remat": config.remat,
        "output_blocks": output_blocks,
    }
    if not _runs_joined(tokens, config):
        return run_blocks(blocks, tokens, poolings, keep=keep, **static)
    graphdef, params = nnx.split(blocks)

    def run(poolings: Sequence[Pooling], params: Any, tokens: Tokens, keep: Any) -> Any:
        blocks = nnx.merge(graphdef, params)
        return _run_joined(blocks, tokens, poolings, config, keep=keep, **static)

    def padded(params: Any, tokens: Tokens, keep: Any) -> Any:
        """Pad the tokens once, where the gradient of every block's attention would pad its arrays."""
        count = tokens.shape[1]
        tokens = jnp.pad(tokens, ((0, 0), (0, 1), (0, 0)))
        out = run([NoPooling(count + 1, padding=1)], params, tokens, keep)
        return jax.tree.map(lambda x: x[:, :count], out)

    plain = functools.partial(run, poolings)
    head = config.embed_dim // config.num_heads
    unpooled = all(isinstance(pooling, NoPooling) for pooling in poolings)
    if unpooled and pads_for_gradient(config.precision, tokens.shape[1], head):
        return differentiated_as(padded, plain, params, tokens, keep)
    return plain(params, tokens, keep)


def _run_joined(
    blocks: Any, tokens: Tokens, poolings: Sequence[Pooling], config: ViTConfig, **static: Any
) -> tuple[Tokens, dict[int, tuple[Tokens, Tokens]]]:
    first = blocks.norm1
    stream = norm_stream(
        tokens,
        first.scale[...][0],
        first.bias[...][0],
        dtype=config.precision.compute,
        norm_eps=first.epsilon,
    )
    (last, _), outputs = run_blocks(JoinedViTBlock(blocks, tokens), stream, poolings, **static)
    return last, {i: (before[0], output) for i, (before, output) in outputs.items()}


def _runs_joined(tokens: Tokens, config: ViTConfig) -> bool:
    p = config.precision
    if p.activations != "compute" or config.remat != "none":
        return False
    update = jax.ShapeDtypeStruct(tokens.shape, p.compute)
    return add_norm_unsupported(update, tokens, layer=True) is None


class VisionTransformer(Backbone):
    """ViT / DeiT with the class token first. Build it through `fastvim_jax.create_model`."""

    _mask_axes = (2,)  # attention and MLP
    _head_init = staticmethod(normal)

    def __init__(self, config: ViTConfig, *, rngs: RngsLike):
        rngs, p, d = as_rngs(rngs), config.precision, config.embed_dim
        self.config = config
        self.patch_embed = self.make_patch_embed(rngs)
        small = normal(0.02)
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
            self._make_head(config, rngs) if config.num_classes and classify else nnx.data(None)
        )

    def make_patch_embed(self, rngs: nnx.Rngs) -> Any:
        """Build the patch embedding."""
        config = self.config
        return PatchEmbed(
            config.patch, config.channels, config.embed_dim, precision=config.precision, rngs=rngs
        )

    def _poolings(self, grid: tuple[int, int]) -> tuple[Pooling, ...]:
        # The class token, first, is never pooled.
        if self.config.pooling == "none":
            return (NoPooling(grid[0] * grid[1] + 1),)
        orders = {"alternate": (False, True), "columns": (False,), "rows": (True,)}
        return tuple(
            GridPooling(*grid, transposed=transposed, class_index=0)
            for transposed in orders[self.config.pool_axes]
        )

    def _run_blocks(
        self,
        stream: Stream,
        poolings: Sequence[Pooling],
        output_blocks: Sequence[int],
        keep: jax.Array | None,
    ) -> tuple[Stream, dict[int, tuple[Tokens, Tokens]]]:
        residual, outputs = run_vit_blocks(
            self.blocks,
            stream.residual,
            poolings,
            self.config,
            depth=self.config.depth,
            keep=keep,
            output_blocks=output_blocks,
        )
        return Stream(residual), outputs

    def _norm(self, rngs: nnx.Rngs):
        config = self.config
        return make_norm(
            "layer", config.embed_dim, eps=config.norm_eps, precision=config.precision, rngs=rngs
        )

    def _embed(self, images: Images) -> tuple[Tokens, GridSize]:
        config = self.config
        wide = config.precision.wide
        patches = self.patch_embed(images)
        grid = GridSize(patches.shape[1], patches.shape[2])
        tokens = jax.lax.collapse(patches, 1, 3).astype(wide)
        token = jnp.broadcast_to(
            self.class_token[...].astype(wide), (tokens.shape[0], 1, tokens.shape[2])
        )
        table = resize_with_class_row(self.pos_embed[...], config.grid, grid, 0, 0)
        return add_table(jnp.concatenate([token, tokens], axis=1), table.astype(wide)), grid

    def _final_norm(self, residual: Tokens) -> Tokens:
        return residual if self.norm is None else self.norm(residual)

    def _features(self, stream: Stream) -> Float[Array, "b d"]:
        if self.config.head_pool == "token":
            # Normalise the class token alone, in the gradient as well.
            stream = Stream(stream.residual[:, :1])
        return super()._features(stream)

    def _pool(self, tokens: Tokens) -> Float[Array, "b d"]:
        if self.config.head_pool == "token":
            return tokens[:, 0]
        return self.fc_norm(jnp.mean(tokens[:, 1:], axis=1))

    def _after_block(self, before: Tokens, output: Tokens) -> Tokens:
        return output

    def _as_image(self, tokens: Tokens, grid: GridSize, norm: Any = None) -> Array:
        patches = tokens[:, 1:] if norm is None else norm(tokens[:, 1:])
        return patches.reshape(patches.shape[0], *grid, patches.shape[-1])

    def _class_token_of(self, tokens: Tokens) -> Float[Array, "b 1 d"]:
        return tokens[:, :1]

    def _check_head_pool(self, config: ViTConfig) -> None:
        if config.head_pool != self.config.head_pool:
            raise UserError(
                f"global_pool={config.head_pool!r}: this ViT's norm is that of head_pool="
                f"{self.config.head_pool!r}; build another model with head_pool={config.head_pool!r}."
            )

"""Masked autoencoders: an encoder that sees the kept patches only, and a small decoder that predicts the pixels.

tokens    = patches kept + fixed sin-cos table              (Vim: class token at k // 2; ViT: first)
latent    = norm(encoder blocks(tokens))                    FastVim's blocks pool a ragged grid (FastMaskVim)
sequence  = decoder embedding of latent, a mask token at every removed place, + fixed table
predicted = linear(norm(decoder blocks(sequence)))          one vector (p q c) for every patch

The encoder is a classifier's backbone without position embedding and head; fine-tuning takes its parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal, xavier_uniform, zeros
from jaxtyping import Array, Float, Int

from fastvim_jax.distributed.sharding import with_auto_axes
from fastvim_jax.errors import UserError
from fastvim_jax.layers import initializers as init
from fastvim_jax.layers.linear import linear
from fastvim_jax.layers.masking import Masking, kept_count, random_masking
from fastvim_jax.layers.mixer import prepare_blocks
from fastvim_jax.layers.norms import make_norm
from fastvim_jax.layers.patch_embed import check_images
from fastvim_jax.layers.pooling import NoPooling, Pooling
from fastvim_jax.layers.pos_embed import sincos_pos_embed
from fastvim_jax.layers.ragged_pooling import ragged_pooling
from fastvim_jax.models import saving
from fastvim_jax.models.config import VisionMambaConfig, ViTConfig
from fastvim_jax.models.mae_config import MaskedAutoencoderConfig
from fastvim_jax.models.parameters import named_parameters
from fastvim_jax.models.stack import run_blocks, stack_blocks
from fastvim_jax.models.vision_mamba import Block, VisionMamba
from fastvim_jax.models.vit import VisionTransformer, ViTBlock, run_vit_blocks
from fastvim_jax.precision import Precision
from fastvim_jax.typing import Images, Tokens
from pallas_kernels.moves import move_tokens


class Reconstruction(NamedTuple):
    """The outputs of a masked autoencoder for a batch. Letters: k kept patches, l all patches, v values of a patch.

    Attributes:
        predicted: The predicted pixels of all patches, `b l v` with v = rows · columns · channels of a patch; float32
            or wider, with activations="compute" in the model's dtype.
        latent: The encoder's output, `b k d` (`b k+1 d` with a class token); zeros at padded places.
        masking: Tells which patches the encoder saw.
    """

    predicted: Float[Array, "b l v"]
    latent: Float[Array, "b k d"]
    masking: Masking


class Decoder(nnx.Module):
    """Decode the whole grid, with a mask token at every removed place: blocks, then a projection to pixels."""

    def __init__(self, config: MaskedAutoencoderConfig, make_block: Any, *, rngs: nnx.Rngs):
        p, d = config.precision, config.decoder_dim
        dense: dict[str, Any] = {
            "kernel_init": xavier_uniform(),
            "bias_init": zeros,
            "dtype": p.compute,
            "param_dtype": p.params,
            "precision": p.lax,
            "rngs": rngs,
        }
        self.embed = nnx.Linear(config.encoder.embed_dim, d, **dense)
        self.mask_token = nnx.Param(normal(0.02)(rngs.params(), (1, 1, d), p.params))
        self.blocks = stack_blocks(make_block, config.decoder_depth, rngs)
        kind = getattr(config.encoder, "norm", "layer")
        self.norm = make_norm(kind, d, eps=config.encoder.norm_eps, precision=p, rngs=rngs)
        self.pixels = nnx.Linear(d, config.patch[0] * config.patch[1] * config.channels, **dense)


class MaskedAutoencoder(nnx.Module):
    """FastMaskVim, Vim and ViT autoencoders. Build one through `fastvim_jax.create_model`.

    Parameters are named `encoder...` (as in the classifier) and `decoder...`. Position tables are fixed: they are not
    parameters.
    """

    save_pretrained = saving.save_pretrained

    def __init__(self, config: MaskedAutoencoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder: VisionMamba | VisionTransformer
        self.encoder, make_block = _parts(config, rngs)
        self.decoder = Decoder(config, make_block, rngs=rngs)
        _initialise_as_autoencoder(self, config.precision, rngs)

    @with_auto_axes
    def __call__(
        self,
        images: Images,
        *,
        noise: Float[Array, "b l"] | None = None,
        masking: Masking | None = None,
    ) -> Reconstruction:
        """Mask images, encode the kept patches, and predict all patches.

        Args:
            images: `b h w c`, normalised, of any size that is a whole number of patches.
            noise: One number per patch, `b l`. The patches with the smallest numbers are kept (`random_masking`).
            masking: A mask from `masking_of`, instead of noise.

        Raises:
            UserError: neither noise nor masking, or both; a mask of another grid; a wrong channel count or image size;
                padding with a ViT.
        """
        grid = self._grid(images)
        if masking is not None and noise is not None:
            raise UserError("give a masked autoencoder noise= or masking=, not both.")
        if masking is None:
            if noise is None:
                raise UserError("a masked autoencoder needs noise= or masking= beside the images.")
            _check_mask(noise.shape, len(images), grid)
            kept = kept_count(grid[0] * grid[1], self.config.mask_ratio)
            masking = random_masking(noise, kept, by_position=not self._is_vit)
        _check_mask(masking.removed.shape, len(images), grid, masking.grid)
        latent = self._encode(images, masking, grid)
        return Reconstruction(self._decode(latent, masking, grid), latent, masking)

    @with_auto_axes
    def encode(self, images: Images, *, masking: Masking) -> Tokens:
        """Run the encoder over the kept patches: `b h w c` → latent `b k d`, class token included.

        Raises:
            UserError: see `__call__`.
        """
        grid = self._grid(images)
        _check_mask(masking.removed.shape, len(images), grid, masking.grid)
        return self._encode(images, masking, grid)

    def draw_noise(self, key: jax.Array, batch: int) -> Float[Array, "b l"]:
        """Draw the noise of `batch` images at the size that the model is built for."""
        rows, columns = self.config.grid
        return jax.random.uniform(key, (batch, rows * columns))

    @property
    def _is_vit(self) -> bool:
        return isinstance(self.config.encoder, ViTConfig)

    def _encode(self, images: Images, masking: Masking, grid: tuple[int, int]) -> Tokens:
        config, embed = self.config.encoder, self.encoder.patch_embed
        if self._is_vit and masking.counts is not None:
            raise UserError(
                "a ViT attends to padding: give masks that keep equally many patches of every image."
            )
        patches = jax.lax.collapse(embed.cut(images), 1, 3)
        # Embed only the kept patches, so that the encoder's cost is theirs alone.
        kept = jnp.take_along_axis(patches, masking.ids_keep[:, :, None], axis=1)
        tokens = embed.project(kept).astype(config.precision.wide)
        tokens = tokens + self._table(config.embed_dim, grid)[masking.ids_keep]
        index = self._class_index(masking)
        if index is not None:
            assert self.encoder.class_token is not None
            tokens = _insert(tokens, self.encoder.class_token[...], index)
        tokens, _ = self.encoder.encode(tokens, self._poolings(masking, grid))
        latent = self.encoder.norm(tokens)
        if masking.counts is None:
            return latent
        used = jnp.arange(latent.shape[1]) < masking.counts[:, None] + (index is not None)
        return jnp.where(used[:, :, None], latent, 0)

    def _decode(
        self, latent: Float[Array, "b k d"], masking: Masking, grid: tuple[int, int]
    ) -> Float[Array, "b l v"]:
        p, decoder = self.config.precision, self.decoder
        kept = linear(decoder.embed, latent, p).astype(p.wide)
        index = self._class_index(masking)
        class_token = None
        if index is not None:
            kept, class_token = _take_out(kept, index)
        place = jnp.minimum(masking.ids_restore, kept.shape[1] - 1)
        # The mask token overwrites removed places below, so `move_tokens` may ignore their gradient.
        tokens = move_tokens(kept, place, masking.ids_keep)
        mask_token = decoder.mask_token[...].astype(p.wide)
        tokens = jnp.where(masking.removed[:, :, None] > 0, mask_token, tokens)
        tokens = tokens + self._table(self.config.decoder_dim, grid)
        if class_token is not None:  # first in a ViT, else last
            parts = (class_token, tokens) if self._is_vit else (tokens, class_token)
            tokens = jnp.concatenate(parts, axis=1)
        poolings = (NoPooling(tokens.shape[1]),)
        tokens, depth = tokens.astype(p.residual), self.config.decoder_depth
        if isinstance(self.config.encoder, ViTConfig):
            config = _decoder_config(self.config, self.config.encoder)
            tokens, _ = run_vit_blocks(decoder.blocks, tokens, poolings, config, depth=depth)
        else:
            tokens, _ = run_blocks(
                prepare_blocks(decoder.blocks, poolings),
                tokens,
                poolings,
                depth=depth,
                keep=None,
                mode=self.config.encoder.blocks,
                remat=self.config.encoder.remat,
            )
        predicted = linear(decoder.pixels, decoder.norm(tokens), p)
        if class_token is None:
            return predicted
        return predicted[:, 1:] if self._is_vit else predicted[:, :-1]

    def _poolings(self, masking: Masking, grid: tuple[int, int]) -> tuple[Pooling, ...]:
        """Return one period of the encoder's poolings over the kept tokens."""
        config, ids = self.config.encoder, masking.ids_keep
        tokens = ids.shape[1] + (self._class_index(masking) is not None)
        if isinstance(config, ViTConfig) or (config.pooling == "none" and masking.counts is None):
            return (NoPooling(tokens),)
        if config.pooling == "none":
            places = jnp.broadcast_to(jnp.arange(tokens), (ids.shape[0], tokens))
            assert masking.counts is not None
            counts = jnp.asarray(masking.counts + (tokens - ids.shape[1]))
            return (ragged_pooling(places, (1, tokens), counts=counts, method="none"),)
        orders = {"alternate": (False, True), "columns": (False,), "rows": (True,)}
        return tuple(
            ragged_pooling(
                ids,
                grid,
                transposed=transposed,
                reversal=self.config.reversal,
                counts=masking.counts,
                method=config.pooling,
                divisor=self.config.divisor,
                scale=config.pool_scale,
            )
            for transposed in orders[config.pool_axes]
        )

    def _class_index(self, masking: Masking) -> int | Int[Array, " b"] | None:
        """Return the class token's place among the kept tokens."""
        if self.encoder.class_token is None:
            return None
        if self._is_vit or self.config.encoder.class_token == "head":  # type: ignore[union-attr]
            return 0
        if masking.counts is not None:
            return masking.counts // 2
        return masking.ids_keep.shape[1] // 2

    def _table(self, width: int, grid: tuple[int, int]) -> Float[Array, "l d"]:
        return jnp.asarray(
            fixed_table(self.config.encoder, width, grid), self.config.precision.wide
        )

    def _grid(self, images: Images) -> tuple[int, int]:
        images = check_images(images, self.config.channels, self.config.patch)
        (height, width), (p, q) = images.shape[1:3], self.config.patch
        if height % p or width % q:
            raise UserError(
                f"images of {height}x{width} pixels are not a whole number of {p}x{q} patches: resize or crop them."
            )
        return height // p, width // q


def _parts(
    config: MaskedAutoencoderConfig, rngs: nnx.Rngs
) -> tuple[VisionMamba | VisionTransformer, Callable[[nnx.Rngs], nnx.Module]]:
    """Build the encoder, and return it with the function that builds a block of the decoder."""
    encoder = config.encoder
    if isinstance(encoder, ViTConfig):
        transformer = VisionTransformer(encoder, rngs=rngs)
        transformer.pos_embed = nnx.data(None)  # type: ignore[arg-type]
        inner_vit = _decoder_config(config, encoder)
        return transformer, lambda rngs: ViTBlock(inner_vit, rngs=rngs)
    mamba = VisionMamba(dataclasses.replace(encoder, pos_embed=False), rngs=rngs)
    # Keep the encoder's depth, because the authors scale the decoder's out_proj by it, too.
    inner = dataclasses.replace(
        encoder, embed_dim=config.decoder_dim, pooling="none", pool_scale=1.0
    )
    return mamba, lambda rngs: Block(inner, rngs=rngs)


def _decoder_config(config: MaskedAutoencoderConfig, encoder: ViTConfig) -> ViTConfig:
    """Return the configuration of a ViT decoder's blocks."""
    heads = {"embed_dim": config.decoder_dim, "num_heads": config.decoder_heads}
    return dataclasses.replace(encoder, **heads)  # type: ignore[arg-type]


def fixed_table(
    encoder: VisionMambaConfig | ViTConfig, width: int, grid: tuple[int, int]
) -> np.ndarray:
    """Build the position table `l width` as the reference of this encoder does; see `sincos_pos_embed`."""
    is_vit = isinstance(encoder, ViTConfig)
    return sincos_pos_embed(width, grid, computed_in=np.float64 if is_vit else np.float32)


def backbone_parameters(model: MaskedAutoencoder) -> dict[str, Array]:
    """Return the encoder's parameters by the names of the classifier that fine-tuning trains.

    The fixed table becomes the initial value of the learned position embedding. The class token's row is zero.
    """
    config = model.config.encoder
    table = fixed_table(config, config.embed_dim, config.grid)
    if model.encoder.class_token is not None:
        middle = getattr(config, "class_token", "head") == "middle"
        table = np.insert(table, len(table) // 2 if middle else 0, 0.0, axis=0)
    named = named_parameters(nnx.state(model.encoder))
    return named | {"pos_embed": jnp.asarray(table[None], config.precision.params)}


def _check_mask(
    shape: tuple[int, ...],
    batch: int,
    grid: tuple[int, int],
    given: tuple[int, int] | None = None,
) -> None:
    if given is not None and given != grid:
        raise UserError(
            f"the mask is for {given[0]} x {given[1]} patches, but the images have {grid[0]} x {grid[1]} patches."
        )
    if len(shape) != 2:
        raise UserError(
            f"the noise has shape {tuple(shape)}: give one number per patch, images x patches "
            f"({batch}, {grid[0] * grid[1]})."
        )
    if tuple(shape) != (batch, grid[0] * grid[1]):
        raise UserError(
            f"the mask is for {shape[0]} images of {shape[1]} patches, but there are {batch} images of "
            f"{grid[0]} x {grid[1]} = {grid[0] * grid[1]} patches."
        )


def _insert(
    tokens: Tokens, token: Float[Array, "1 1 d"], index: int | Array
) -> Float[Array, "b k d"]:
    """Insert a token before place `index`: a number for all images, or an array with one number per image."""
    if isinstance(index, int):
        one = jnp.broadcast_to(token.astype(tokens.dtype), (len(tokens), 1, tokens.shape[2]))
        return jnp.concatenate([tokens[:, :index], one, tokens[:, index:]], axis=1)
    index = index[:, None]
    places = jnp.arange(tokens.shape[1] + 1)
    source = jnp.clip(places - (places > index), 0, tokens.shape[1] - 1)
    spread = jnp.take_along_axis(tokens, source[:, :, None], axis=1)
    here = (places == index)[:, :, None]
    return jnp.where(here, token.astype(tokens.dtype), spread)


def _take_out(
    tokens: Tokens, index: int | Array
) -> tuple[Float[Array, "b k d"], Float[Array, "b 1 d"]]:
    """Undo `_insert`: return the other tokens, and the inserted token."""
    if isinstance(index, int):
        rest = jnp.concatenate([tokens[:, :index], tokens[:, index + 1 :]], axis=1)
        return rest, tokens[:, index : index + 1]
    index = index[:, None]
    places = jnp.arange(tokens.shape[1] - 1)
    rest = jnp.take_along_axis(tokens, (places + (places >= index))[:, :, None], axis=1)
    return rest, jnp.take_along_axis(tokens, index[:, :, None], axis=1)


def _initialise_as_autoencoder(
    model: MaskedAutoencoder, precision: Precision, rngs: nnx.Rngs
) -> None:
    """Draw those parameters anew whose initial distribution differs from the classifier's."""
    projection = model.encoder.patch_embed.proj
    kernel = projection.kernel
    fan_in = kernel.shape[0] * kernel.shape[1] * kernel.shape[2]
    bound = math.sqrt(6 / (fan_in + kernel.shape[3]))
    kernel[...] = init.symmetric_uniform(bound)(rngs.params(), kernel.shape, precision.params)
    bias = projection.bias
    bias[...] = init.fan_in_uniform(fan_in)(rngs.params(), bias.shape, precision.params)
    if model.encoder.class_token is not None:
        token = model.encoder.class_token
        token[...] = normal(0.02)(rngs.params(), token.shape, precision.params)
    if isinstance(model.config.encoder, ViTConfig):
        stacks: tuple[Any, ...] = (model.encoder.blocks, model.decoder.blocks)
        for blocks in stacks:
            for layer in (blocks.attn.qkv, blocks.attn.proj, blocks.mlp.fc1, blocks.mlp.fc2):
                shape = layer.kernel.shape
                limit = init.symmetric_uniform(math.sqrt(6 / (shape[-2] + shape[-1])))
                layer.kernel[...] = limit(rngs.params(), shape, precision.params)

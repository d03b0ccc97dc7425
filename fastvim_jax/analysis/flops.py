"""Count multiply-adds, activations, scan steps and parameters of a model, from its config alone.

Counted, per image: one multiply-add per weight and token of every product — patch embedding, projections,
depthwise convolution, skip D · u, head — and per direction of a scan 9 · s · e · n, the usual count for the
discretisation and the recurrence over s steps of e channels with n states. Pooled models project to Δ, B, C
and scan only their s pooled tokens; everything else sees all l tokens. Attention adds 2 · s² · d. Norms,
activations, gates, pooling and residual sums are not counted.

Activations are counted as timm does: the entries of the results of all convolutions, linear layers and scans, and in
a ViT of the attention scores and the weighted values.

At 224 pixels the multiply-adds lie within 3 % of the paper's 1.17 / 4.43 / 17.23 (FastVim-T/S/B) and 1.8 / 5.9 / 20.9
(Vim-T/S/B).
"""

from __future__ import annotations

import dataclasses
import math

import jax
from flax import nnx

from fastvim_jax.errors import UserError
from fastvim_jax.layers.channel_embed import strided_grid
from fastvim_jax.layers.channel_pooling import channel_poolings
from fastvim_jax.layers.masking import kept_count
from fastvim_jax.layers.patch_embed import grid_of
from fastvim_jax.models import (
    AnyModelConfig,
    MaskedAutoencoderConfig,
    VisionMambaConfig,
    ViTConfig,
    build_model,
)
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig

SCAN_MACS = 9
"""Multiply-adds per step, channel and state of a selective scan."""


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """The costs of one model.

    Attributes:
        parameters: trained numbers.
        gmacs: billions of multiply-adds per image.
        scan_steps: sequential steps of each direction's scan, for one period of the blocks; empty for a ViT.
        parallel_steps: the same for a parallel scan, ceil(log2(steps)).
    """

    parameters: int
    gmacs: float
    scan_steps: tuple[int, ...]
    parallel_steps: tuple[int, ...]


def model_cost(
    config: AnyModelConfig, image_size: int | tuple[int, int] | None = None
) -> ModelCost:
    """Return all costs of the model described by `config`; see `gmacs` for `image_size`."""
    return ModelCost(
        count_parameters(config),
        gmacs(config, image_size),
        scan_steps(config, image_size),
        parallel_steps(config, image_size),
    )


def count_parameters(config: AnyModelConfig) -> int:
    """Return the number of trained numbers, without allocating any of them."""
    shapes = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param)))


def gmacs(config: AnyModelConfig, image_size: int | tuple[int, int] | None = None) -> float:
    """Return billions of multiply-adds per image (the module's docstring says which are counted).

    Args:
        config: the model.
        image_size: side, or height and width, in pixels; None: the size the model is built for.

    Raises:
        UserError: for an image smaller than a patch.
    """
    if isinstance(config, MaskedAutoencoderConfig):
        return _masked_gmacs(config, image_size)
    shape = _shape_of(config, image_size)
    patch_weights = math.prod(_pair(config.patch_size)) * shape.inputs * config.embed_dim
    blocks = sum(_block_macs(config, shape.tokens, s) for s in shape.steps)
    head = shape.head_tokens * config.embed_dim * shape.classes
    return (shape.patches * patch_weights + blocks + head) / 1e9


def activations(config: AnyModelConfig, image_size: int | tuple[int, int] | None = None) -> float:
    """Return millions of activations per image (the module's docstring says which are counted).

    Args:
        config: the model.
        image_size: side, or height and width, in pixels; None: the size the model is built for.

    Raises:
        UserError: for an image smaller than a patch.
    """
    if isinstance(config, MaskedAutoencoderConfig):
        return _masked_activations(config, image_size)
    shape = _shape_of(config, image_size)
    blocks = sum(_block_results(config, shape.tokens, s) for s in shape.steps)
    head = shape.head_tokens * shape.classes
    return (shape.patches * config.embed_dim + blocks + head) / 1e6


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Hold the numbers of patches, inputs of a patch's pixels, tokens, steps of each block, and the head's sizes."""

    patches: int
    inputs: int
    tokens: int
    steps: list[int]
    head_tokens: int
    classes: int


def _shape_of(
    config: VisionMambaConfig | ViTConfig, image_size: int | tuple[int, int] | None
) -> _Shape:
    rows, columns = _grid(config, image_size)
    apart = isinstance(config, (ChannelMambaConfig, ChannelViTConfig))  # One token a channel.
    patches = rows * columns * (config.channels if apart else 1)
    tokens, reads_all = patches + 1, False
    if isinstance(config, VisionMambaConfig):
        tokens = patches + (config.class_token != "none")
        reads_all = config.class_token == "none" and config.head_pool in ("max", "all")
    return _Shape(
        patches=patches,
        inputs=1 if apart else config.channels,
        tokens=tokens,
        steps=_steps_per_block(config, rows, columns),
        head_tokens=tokens if reads_all else 1,
        classes=0 if config.out_indices else config.num_classes,
    )


def scan_steps(
    config: AnyModelConfig, image_size: int | tuple[int, int] | None = None
) -> tuple[int, ...]:
    """Return the steps of each direction's scan, for one period of the blocks; empty for a ViT.

    A period is one block, or two where the pooled axis alternates. A class token is a step of its own.
    """
    if isinstance(config, MaskedAutoencoderConfig):
        if isinstance(config.encoder, VisionMambaConfig) and config.encoder.pooling == "none":
            return (_kept(config, image_size) + (config.encoder.class_token != "none"),)
        return scan_steps(config.encoder, image_size)
    if isinstance(config, ViTConfig):
        return ()
    steps = _steps_per_block(config, *_grid(config, image_size))
    if isinstance(config, ChannelMambaConfig):
        return tuple(steps[: len(_channel_steps(config, *_grid(config, image_size)))])
    alternates = config.pooling != "none" and config.pool_axes == "alternate"
    return tuple(steps[: 2 if alternates else 1])


def parallel_steps(
    config: AnyModelConfig, image_size: int | tuple[int, int] | None = None
) -> tuple[int, ...]:
    """Return ceil(log2(s)) for each scan of `scan_steps`: its depth as a parallel scan."""
    return tuple(math.ceil(math.log2(s)) for s in scan_steps(config, image_size))


@dataclasses.dataclass(frozen=True)
class _Masked:
    """Hold what a masked autoencoder computes for one image.

    Attributes:
        patches: patches of the image, which the decoder predicts.
        kept: patches that the encoder sees.
        pixels: numbers of a patch.
        tokens: the encoder's tokens: the kept patches, and the class token if there is one.
        steps: scan steps of each block of the encoder, or tokens attended to.
        decoder: the config of the decoder's blocks.
        decoder_tokens: all patches, and the class token if there is one.
    """

    patches: int
    kept: int
    pixels: int
    tokens: int
    steps: list[int]
    decoder: VisionMambaConfig | ViTConfig
    decoder_tokens: int


def _masked(config: MaskedAutoencoderConfig, image_size: int | tuple[int, int] | None) -> _Masked:
    encoder = config.encoder
    rows, columns = _grid(encoder, image_size)
    patches, kept = rows * columns, _kept(config, image_size)
    decoder: VisionMambaConfig | ViTConfig
    if isinstance(encoder, VisionMambaConfig):
        extra = int(encoder.class_token != "none")
        decoder = dataclasses.replace(
            encoder, embed_dim=config.decoder_dim, pooling="none", pool_scale=1.0
        )
        pooled = encoder.pooling != "none"
    else:
        extra, pooled = 1, False
        decoder = dataclasses.replace(
            encoder, embed_dim=config.decoder_dim, num_heads=config.decoder_heads
        )
    tokens = kept + extra
    return _Masked(
        patches=patches,
        kept=kept,
        pixels=math.prod(_pair(encoder.patch_size)) * encoder.channels,
        tokens=tokens,
        steps=_steps_per_block(encoder, rows, columns) if pooled else [tokens] * encoder.depth,
        decoder=decoder,
        decoder_tokens=patches + extra,
    )


def _masked_gmacs(
    config: MaskedAutoencoderConfig, image_size: int | tuple[int, int] | None
) -> float:
    """Count an encoder over the kept patches and a decoder over all of them."""
    m, encoder = _masked(config, image_size), config.encoder
    ends = m.kept * m.pixels * encoder.embed_dim + m.patches * config.decoder_dim * m.pixels
    blocks = sum(_block_macs(encoder, m.tokens, s) for s in m.steps)
    decoder = config.decoder_depth * _block_macs(m.decoder, m.decoder_tokens, m.decoder_tokens)
    between = m.tokens * encoder.embed_dim * config.decoder_dim
    return (ends + blocks + between + decoder) / 1e9


def _masked_activations(
    config: MaskedAutoencoderConfig, image_size: int | tuple[int, int] | None
) -> float:
    """Count the results of the same parts, and the embedding of all patches, of which the kept ones are taken."""
    m, encoder = _masked(config, image_size), config.encoder
    ends = m.patches * (encoder.embed_dim + m.pixels)
    blocks = sum(_block_results(encoder, m.tokens, s) for s in m.steps)
    decoder = config.decoder_depth * _block_results(m.decoder, m.decoder_tokens, m.decoder_tokens)
    return (ends + blocks + m.tokens * config.decoder_dim + decoder) / 1e6


def _block_macs(config: VisionMambaConfig | ViTConfig, tokens: int, steps: int) -> int:
    count = _mixer if isinstance(config, VisionMambaConfig) else _vit_block
    return count(config, tokens, steps)  # type: ignore[arg-type]


def _block_results(config: VisionMambaConfig | ViTConfig, tokens: int, steps: int) -> int:
    count = _mixer_results if isinstance(config, VisionMambaConfig) else _vit_results
    return count(config, tokens, steps)  # type: ignore[arg-type]


def _kept(config: MaskedAutoencoderConfig, image_size: int | tuple[int, int] | None) -> int:
    rows, columns = _grid(config.encoder, image_size)
    return kept_count(rows * columns, config.mask_ratio)


def _mixer(config: VisionMambaConfig, tokens: int, steps: int) -> int:
    """Count the multiply-adds of one block: l tokens, s scan steps."""
    mixer = config.mixer
    d, e, n, r = config.embed_dim, mixer.inner, mixer.state_size, mixer.rank
    direction = (
        tokens * e * config.conv_width
        + (tokens * e if config.pooling == "attention" else 0)  # the tokens' scores
        + steps * e * (r + 2 * n)
        + steps * r * e
        + SCAN_MACS * steps * e * n
        + (steps if config.unpool == "after_skip" else tokens) * e
    )
    return tokens * d * 2 * e + 2 * direction + tokens * e * d


def _mixer_results(config: VisionMambaConfig, tokens: int, steps: int) -> int:
    """Count the results of one block: in_proj, both directions, out_proj."""
    mixer = config.mixer
    e, n, r = mixer.inner, mixer.state_size, mixer.rank
    direction = (
        (tokens * e if config.conv_width else 0)
        + (tokens if config.pooling == "attention" else 0)
        + steps * (r + 2 * n)
        + 2 * steps * e  # dt_proj and the scan
    )
    return tokens * 2 * e + 2 * direction + tokens * config.embed_dim


def _vit_results(config: ViTConfig, tokens: int, steps: int) -> int:
    """Count the results of one block: attention over s tokens, then the MLP."""
    d = config.embed_dim
    attention = steps * 3 * d + config.num_heads * steps * steps + steps * d + tokens * d
    hidden = int(d * config.mlp_ratio)
    return (tokens * d if config.conv_width else 0) + attention + tokens * (hidden + d)


def _vit_block(config: ViTConfig, tokens: int, steps: int) -> int:
    """Count the multiply-adds of one block: l tokens, attention over s of them."""
    d = config.embed_dim
    attention = tokens * d * config.conv_width + steps * d * 3 * d + 2 * steps * steps * d
    return attention + tokens * d * d + 2 * tokens * d * int(d * config.mlp_ratio)


def _steps_per_block(config: VisionMambaConfig | ViTConfig, rows: int, columns: int) -> list[int]:
    """Scan steps (tokens attended to, in a ViT) of each block over a grid of patches."""
    if isinstance(config, ChannelMambaConfig):
        period = _channel_steps(config, rows, columns)
        return [period[block % len(period)] for block in range(config.depth)]
    if isinstance(config, ChannelViTConfig):
        return [rows * columns * config.channels + 1] * config.depth
    class_token = 1 if isinstance(config, ViTConfig) else int(config.class_token != "none")
    if config.pooling == "none":
        return [rows * columns + class_token] * config.depth
    if isinstance(config, VisionMambaConfig) and config.token_order == "column":
        rows, columns = columns, rows
    # Pooling over the columns leaves one step per row, and the other way round.
    left = {"alternate": (rows, columns), "columns": (rows,), "rows": (columns,)}[config.pool_axes]
    return [left[block % len(left)] + class_token for block in range(config.depth)]


def _channel_steps(config: ChannelMambaConfig, rows: int, columns: int) -> list[int]:
    """Return the scan steps of one period of blocks over all channels."""
    if config.token_order == "column":
        rows, columns = columns, rows
    poolings = channel_poolings(
        (rows, columns),
        config.channels,
        scan_order=config.scan_order,
        pool_axes=config.pool_axes,
        method=config.pooling,
        class_token=config.class_token != "none",
    )
    return [pooling.scan_length for pooling in poolings]


def _grid(
    config: VisionMambaConfig | ViTConfig, image_size: int | tuple[int, int] | None
) -> tuple[int, int]:
    size = _pair(config.image_size if image_size is None else image_size)
    patch = _pair(config.patch_size)
    if size[0] < patch[0] or size[1] < patch[1]:
        raise UserError(
            f"An image of {size[0]}x{size[1]} pixels is smaller than a patch of {patch[0]}x{patch[1]}."
        )
    if isinstance(config, ChannelMambaConfig):
        return strided_grid(size, patch, config.step)
    if isinstance(config, ChannelViTConfig):
        return strided_grid(size, patch, patch)
    return grid_of(size, patch)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])

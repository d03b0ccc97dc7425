"""Define the configurations of the backbones: every architecture option, checked before any compute."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from fastvim_jax.config_checks import (
    NonNegativeFloat,
    PositiveFloat,
    Rate,
    check_fields,
)
from fastvim_jax.errors import UserError, suggest
from fastvim_jax.layers.direction import MixerConfig
from fastvim_jax.layers.patch_embed import grid_of
from fastvim_jax.precision import (
    Activations,
    DtypeName,
    MatmulPrecision,
    ParamDtypeName,
    Precision,
)

# Larger ones, a typing error, would take all memory or compile for hours.
Depth = Annotated[int, Interval(ge=1, le=1024)]
Width = Annotated[int, Interval(ge=1, le=65536)]
Pixels = Width | tuple[Width, Width]
Classes = Annotated[int, Interval(ge=0, le=2**24)]
Taps = Annotated[int, Interval(ge=0, le=1024)]
States = Annotated[int, Interval(ge=1, le=1024)]
PoolingMethod = Literal["mean", "max", "attention", "none"]
PoolAxes = Literal["alternate", "columns", "rows"]
BlockMode = Literal["scan", "unroll"]
Remat = Literal["none", "block", "dots"]
ScanName = Literal[
    "auto", "xla", "xla_associative", "xla_sequential", "pallas", "triton", "reference"
]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The options that all backbones share. A new model's config extends this one, in a file beside the model.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    image_size: Pixels = 224
    """Height and width of the images in pixels (one number: square), for which position embeddings are learned. A model
    accepts other sizes when it is called."""
    patch_size: Pixels = 16
    """Height and width of a patch in pixels (one number: square)."""
    channels: Width = 3
    """Image channels."""
    num_classes: Classes = 1000
    """Classes of the head; 0 for none (the model then returns its pooled features)."""
    embed_dim: Width = 192
    """Model width d."""
    depth: Depth = 12
    """Number of blocks."""
    head_std: PositiveFloat = 0.02
    """Standard deviation of the head's initial weights (2e-5 in the recipe that continues fine-tuning at 448 px)."""
    drop_path: Rate = 0.0
    """Rate of stochastic depth at the last block; linear in depth from 0 at the first."""
    out_indices: tuple[int, ...] = ()
    """Blocks whose outputs are returned as dense features, each through its own LayerNorm, instead of logits. Negative
    ones count from the last block."""
    norm_eps: NonNegativeFloat = 1e-5
    """Added to the mean square or variance in the norms."""
    dtype: DtypeName = "float32"
    """Dtype of the operands of matrix products; see fastvim_jax.precision."""
    param_dtype: ParamDtypeName = "float32"
    """Dtype in which parameters are stored."""
    matmul_precision: MatmulPrecision = "highest"
    """How a GPU computes float32 matrix products: in true float32, or in TF32 (10 mantissa bits, faster)."""
    activations: Activations = "wide"
    """What linear layers return. wide: float32 or wider; in mixers each token is split into two terms of `dtype`, so
    gradients are close to exact. compute: `dtype`, from tokens rounded once, which is faster. Largest errors in
    bfloat16, relative to the largest entry of the authors' float64 values, on four-block Mamba models: wide 2e-2 in
    outputs and 5e-2 in gradients, compute 1e-1 and 3e-1. Where a maximum is taken (max pooling, head_pool=max), the
    rounding of compute may let another token win; then the gradients of both tokens are entirely different."""
    residual_in_fp32: bool = True
    """Store the residual stream between blocks in float32 or wider. False: in `dtype`, which moves fewer bytes; every
    sum is still computed in float32 and rounded once, and norms read the rounded sum. docs/models.md has the bounds."""
    blocks: BlockMode = "scan"
    """scan: compile one period of the stack of blocks and loop over it (compiles fast); unroll: compile every block
    (runs faster)."""
    remat: Remat = "none"
    """What the backward pass recomputes, to save memory: nothing, whole blocks, or all but matrix products (dots)."""

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "image_size", _pair(self.image_size))
        object.__setattr__(self, "patch_size", _pair(self.patch_size))
        if any(s < p for s, p in zip(_pair(self.image_size), self.patch, strict=True)):
            raise UserError(
                f"image_size={self.image_size} is smaller than patch_size={self.patch_size}."
            )
        object.__setattr__(self, "out_indices", _block_indices(self.out_indices, self.depth))

    @property
    def precision(self) -> Precision:
        """The dtype policy."""
        return Precision(
            self.dtype,
            self.param_dtype,
            self.matmul_precision,
            self.activations,
            self.residual_in_fp32,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        return grid_of(_pair(self.image_size), self.patch)

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return _pair(self.patch_size)


@dataclass(frozen=True, kw_only=True)
class VisionMambaConfig(BackboneConfig):
    """A FastVim or Vim backbone with its head.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    depth: Depth = 24
    """Number of blocks."""
    pooling: PoolingMethod = "mean"
    """What the scan reads of each row of tokens: mean, max or attention (FastVim); none: every token (Vim)."""
    pool_axes: PoolAxes = "alternate"
    """alternate: pool over the columns in even blocks and over the rows in odd ones; columns, rows: always over these
    (Table 6)."""
    token_order: Literal["row", "column"] = "row"
    """How the grid of patches is flattened. With column, rows and columns swap roles in all other options."""
    norm: Literal["rms", "layer"] = "rms"
    """Input norms of the blocks and the final norm (Table 17)."""
    post_norm: Literal["layer", "rms", "none"] = "layer"
    """Norm between the scan and the gate."""
    class_token: Literal["none", "middle", "head"] = "none"
    """Put a class token into the middle of the sequence, or at its head. The classifier then reads it (Table 16)."""
    conv_width: Taps = 4
    """Width of the depthwise causal convolution; 0 leaves it out (Table 7)."""
    unpool: Literal["before_skip", "after_skip"] = "before_skip"
    """Repeat the scan's result along the row before or after the skip (D · tokens) is added (Table 18)."""
    pool_scale: PositiveFloat = 1.0
    """Factor on pooled means. After masked pre-training it is 1 - mask_ratio, for example 0.25."""
    layer_scale: float | None = None
    """Initial value of a learned per-channel factor on mixer outputs; None for no such factor."""
    state_size: States = 16
    """States n of each channel."""
    expand: Annotated[int, Interval(ge=1, le=64)] = 2
    """Inner width e over model width d."""
    dt_rank: Width | None = None
    """Rank r of the projection to step sizes; None: ceil(embed_dim / 16)."""
    proj_bias: bool = False
    """Biases in in_proj and out_proj."""
    conv_bias: bool = True
    """Biases in the convolutions."""
    pos_embed: bool = True
    """Learned position embeddings."""
    head_pool: Literal["mean", "last", "max", "all"] = "mean"
    """What the classifier reads: the mean of the tokens, the last token, or every token. Of every token's logits, max
    returns the largest for each class, and all returns all. If there is a class token, the classifier reads that."""
    scan_implementation: ScanName = "auto"
    """Implementation of the selective scan. auto: GPU kernels where there are any, otherwise XLA (docs/kernels.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool_scale != 1.0 and self.pooling != "mean":
            raise UserError(
                f"pool_scale={self.pool_scale} only acts on pooling='mean', not {self.pooling!r}."
            )

    @property
    def mixer(self) -> MixerConfig:
        """Sizes and choices of the mixer of every block."""
        return MixerConfig(
            width=self.embed_dim,
            depth=self.depth,
            state_size=self.state_size,
            expand=self.expand,
            conv_width=self.conv_width,
            dt_rank=self.dt_rank,
            proj_bias=self.proj_bias,
            conv_bias=self.conv_bias,
            post_norm=self.post_norm,
            unpool=self.unpool,
            attention_pooling=self.pooling == "attention",
            layer_scale=self.layer_scale,
            scan_implementation=self.scan_implementation,
            precision=self.precision,
        )


@dataclass(frozen=True, kw_only=True)
class ViTConfig(BackboneConfig):
    """A Vision Transformer (the DeiT architecture), also with pooled attention (Table 7 of the paper).

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    num_heads: Width = 3
    """Attention heads; must divide embed_dim."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden width of the MLP over embed_dim."""
    qkv_bias: bool = True
    """Bias of the query, key and value projection."""
    head_pool: Literal["token", "mean"] = "token"
    """The head reads the final-norm class token, or the mean of the patch tokens through a norm of its own."""
    pooling: Literal["none", "mean"] = "none"
    """mean: attention reads the row means of the normalised tokens, and its result is repeated along the row. The class
    token is not pooled."""
    pool_axes: PoolAxes = "alternate"
    """alternate: pool over the columns in even blocks and over the rows in odd ones; columns, rows: always these."""
    conv_width: Taps = 0
    """Width of a depthwise causal convolution with SiLU before the pooling; 0 for none."""
    norm_eps: NonNegativeFloat = 1e-6
    """Added to the variance in every norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if int(self.embed_dim * self.mlp_ratio) < 1:
            raise UserError(
                f"mlp_ratio={self.mlp_ratio} leaves no hidden unit of embed_dim={self.embed_dim}."
            )
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}; choose one that does."
            )


ModelConfig = VisionMambaConfig | ViTConfig


def replace_options(config: ModelConfig, **options) -> ModelConfig:
    """Return `config` with `options` replaced.

    Raises:
        UserError: an option that this kind of model does not have (nearest names suggested), or a bad value.
    """
    names = [f.name for f in dataclasses.fields(config)]
    for option in options:
        if option not in names:
            raise UserError(
                f"{type(config).__name__} has no option {option!r}.{suggest(option, names)} "
                f"Options: {', '.join(names)}."
            )
    return dataclasses.replace(config, **options)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _block_indices(indices: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Count negative indices from the last block."""
    bad = [i for i in indices if not -depth <= i < depth]
    if bad:
        raise UserError(f"out_indices {bad} are outside the model's blocks 0..{depth - 1}.")
    return tuple(i % depth for i in indices)

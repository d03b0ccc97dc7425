"""Configurations of the backbones: every architecture option, checked before any compute."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from fastvim_jax.errors import UserError, suggest
from fastvim_jax.layers.direction import MixerConfig
from fastvim_jax.layers.patch_embed import grid_of
from fastvim_jax.precision import Precision

PoolingMethod = Literal["mean", "max", "attention", "none"]
PoolAxes = Literal["alternate", "columns", "rows"]
DtypeName = Literal["float32", "bfloat16", "float64"]
ParamDtypeName = Literal["float32", "float64"]
MatmulPrecision = Literal["highest", "tf32"]
BlockMode = Literal["scan", "unroll"]
Remat = Literal["none", "block", "dots"]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What the configs of all backbones share. A new model's config extends this one, in a file beside the model.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    image_size: int | tuple[int, int] = 224
    """Pixels, height and width (one number: square), for which position embeddings are learned. Other sizes are
    accepted at call time."""
    patch_size: int | tuple[int, int] = 16
    """Pixels of a patch, height and width."""
    channels: int = 3
    """Image channels."""
    num_classes: int = 1000
    """Classes of the head; 0 for none (the model then returns its pooled features)."""
    embed_dim: int = 192
    """Model width d."""
    depth: int = 12
    """Number of blocks."""
    drop_path: float = 0.0
    """Rate of stochastic depth at the last block; linear in depth from 0 at the first."""
    out_indices: tuple[int, ...] = ()
    """Blocks whose outputs are returned as dense features, each through its own LayerNorm, instead of logits."""
    norm_eps: float = 1e-5
    """Added to the mean square or variance in the norms."""
    dtype: DtypeName = "float32"
    """Dtype of the operands of products; see fastvim_jax.precision."""
    param_dtype: ParamDtypeName = "float32"
    """Dtype in which parameters are stored."""
    matmul_precision: MatmulPrecision = "highest"
    """How float32 products are carried out on a GPU: in true float32, or in TF32 (10 mantissa bits, faster)."""
    blocks: BlockMode = "scan"
    """Compile one period of the stack and loop over it, or every block."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, whole blocks, or all but the products."""

    def __post_init__(self) -> None:
        _normalise_sizes(self)
        _check_choices(self)
        _check_positive(self, "embed_dim", "depth", "channels")
        _check_common(self)

    @property
    def precision(self) -> Precision:
        """The dtype policy."""
        return Precision(self.dtype, self.param_dtype, self.matmul_precision)

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

    depth: int = 24
    """Number of blocks."""
    pooling: PoolingMethod = "mean"
    """What the scan reads of each row of tokens: mean, max or attention (FastVim), or every token, none (Vim)."""
    pool_axes: PoolAxes = "alternate"
    """Pool over columns in even blocks and over rows in odd ones, or always over columns, or rows (Table 6)."""
    token_order: Literal["row", "column"] = "row"
    """Patches flattened row by row or column by column; the grid's axes then swap roles everywhere."""
    norm: Literal["rms", "layer"] = "rms"
    """Input norms of the blocks and the final norm (Table 17)."""
    post_norm: Literal["layer", "rms", "none"] = "layer"
    """Norm between the scan and the gate; none leaves it out."""
    class_token: Literal["none", "middle", "head"] = "none"
    """A class token in the middle of the sequence or at its head; the classifier then reads it (Table 16)."""
    conv_width: int = 4
    """Width of the depthwise causal convolution; 0 leaves it out (Table 7)."""
    unpool: Literal["before_skip", "after_skip"] = "before_skip"
    """Repeat the scan's result along the row before or after D · tokens is added (Table 18)."""
    pool_scale: float = 1.0
    """Factor on pooled means; 0.25 after masked pre-training of ratio 0.75."""
    layer_scale: float | None = None
    """Initial value of a learned per-channel factor on mixer outputs; None for no such factor."""
    state_size: int = 16
    """States n of each channel."""
    expand: int = 2
    """Inner width e over model width d."""
    dt_rank: int | None = None
    """Rank r of the projection to step sizes; None: ceil(embed_dim / 16)."""
    proj_bias: bool = False
    """Biases in in_proj and out_proj."""
    conv_bias: bool = True
    """Biases in the convolutions."""
    pos_embed: bool = True
    """Learned position embeddings."""
    head_pool: Literal["mean", "last", "max", "all"] = "mean"
    """The head reads the mean of the tokens or the last one, or all of them: the largest or every token's logits.
    A class token takes precedence."""
    activations: Literal["wide", "compute"] = "wide"
    """What the mixers' linear layers leave in memory: float32 or wider from tokens as two terms, whose gradients are
    close to exact, or `dtype` from images and tokens rounded once, which is faster."""
    scan_implementation: str = "auto"
    """Implementation of the selective scan: auto, xla, xla_associative, xla_sequential, pallas or reference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "state_size", "expand")
        if self.conv_width < 0:
            raise UserError(f"conv_width={self.conv_width}: use 0 to leave the convolution out.")
        if self.dt_rank is not None and self.dt_rank < 1:
            raise UserError(
                f"dt_rank={self.dt_rank} must be at least 1, or None for ceil(embed_dim / 16)."
            )
        if self.pool_scale != 1.0 and self.pooling != "mean":
            raise UserError(
                f"pool_scale={self.pool_scale} only acts on pooling='mean', not {self.pooling!r}."
            )

    @property
    def precision(self) -> Precision:
        """The dtype policy."""
        return Precision(self.dtype, self.param_dtype, self.matmul_precision, self.activations)

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

    num_heads: int = 3
    """Attention heads; must divide embed_dim."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over embed_dim."""
    qkv_bias: bool = True
    """Bias of the query, key and value projection."""
    head_pool: Literal["token", "mean"] = "token"
    """The head reads the final-norm class token, or the mean of the patch tokens through a norm of its own."""
    pooling: Literal["none", "mean"] = "none"
    """mean: queries, keys and values from the row means of the normed tokens, the result repeated along the row; the
    class token stays a token of its own."""
    pool_axes: PoolAxes = "alternate"
    """Pool over columns in even blocks and over rows in odd ones, or always over columns, or rows."""
    conv_width: int = 0
    """Width of a depthwise causal convolution with SiLU before the pooling; 0 for none."""
    norm_eps: float = 1e-6
    """Added to the variance in every norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "num_heads")
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}; choose one that does."
            )


ModelConfig = VisionMambaConfig | ViTConfig


def replace_options(config: ModelConfig, **options) -> ModelConfig:
    """`config` with `options` replaced.

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


def _normalise_sizes(config) -> None:
    for field in ("image_size", "patch_size"):
        value = getattr(config, field)
        pair = (value, value) if isinstance(value, int) else tuple(value)
        if len(pair) != 2 or not all(isinstance(v, int) and v > 0 for v in pair):
            raise UserError(
                f"{field}={value!r} must be a positive integer or a pair (height, width)."
            )
        object.__setattr__(config, field, pair)
    object.__setattr__(config, "out_indices", tuple(config.out_indices))
    if any(s < p for s, p in zip(config.image_size, config.patch_size, strict=True)):
        raise UserError(
            f"image_size={config.image_size} is smaller than patch_size={config.patch_size}."
        )


def _check_choices(config) -> None:
    for name, hint in get_type_hints(type(config)).items():
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        value = getattr(config, name)
        if choices and value not in choices:
            raise UserError(
                f"{name}={value!r} is not one of {', '.join(choices)}.{suggest(value, choices)}"
            )


def _check_positive(config, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{field}={value!r} must be a positive integer.")


def _check_common(config) -> None:
    _ = config.precision  # raises on an unknown dtype
    if config.num_classes < 0:
        raise UserError(f"num_classes={config.num_classes} must not be negative (0 for no head).")
    if not 0.0 <= config.drop_path < 1.0:
        raise UserError(f"drop_path={config.drop_path} must be in [0, 1).")
    bad = [i for i in config.out_indices if not 0 <= i < config.depth]
    if bad:
        raise UserError(f"out_indices {bad} are outside the model's blocks 0..{config.depth - 1}.")

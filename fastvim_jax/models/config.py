"""Configurations of the backbones: every architecture option, checked before any compute."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fastvim_jax.errors import UserError, suggest
from fastvim_jax.layers.mixer import MixerConfig
from fastvim_jax.layers.patch_embed import grid_of
from fastvim_jax.precision import Precision

CHOICES = {
    "pooling": ("mean", "max", "attention", "none"),
    "pool_axes": ("alternate", "columns", "rows"),
    "token_order": ("row", "column"),
    "norm": ("rms", "layer"),
    "post_norm": ("layer", "rms", "none"),
    "class_token": ("none", "middle", "head"),
    "unpool": ("before_skip", "after_skip"),
    "head_pool": ("mean", "last", "max", "all"),
    "blocks": ("scan", "unroll"),
    "remat": ("none", "block", "dots"),
}


@dataclass(frozen=True)
class VisionMambaConfig:
    """A FastVim or Vim backbone with its head.

    Sizes:
        image_size: Height and width in pixels (an int for a square) for which position embeddings are learned;
            other sizes are accepted at call time.
        patch_size: Height and width of a patch in pixels.
        channels: Image channels.
        num_classes: Classes of the head; 0 for none (the model then returns its pooled features).
        embed_dim: Model width d.
        depth: Number of blocks.
        state_size, expand, conv_width, dt_rank: n, e/d, k (0 leaves the convolution out), r (None: ceil(d/16)).
        proj_bias, conv_bias: Biases in in_proj and out_proj; in the convolutions.

    Choices:
        pooling: What the scan reads of each row: "mean", "max", "attention" — FastVim — or "none" — Vim.
        pool_axes: "alternate" between columns (even blocks) and rows; or always pool over "columns" or "rows".
        token_order: Patches flattened by "row" or "column" (the grid's axes then swap roles everywhere).
        norm: Input norms and final norm; post_norm: norm after the scan ("none" leaves it out).
        class_token: "none", in the "middle" of the sequence, or at its "head"; the classifier then reads it.
        unpool: Repeat the scan's result "before_skip" (before D · tokens is added) or "after_skip".
        pool_scale: Factor on pooled means (0.25 after masked pre-training).
        layer_scale: Initial value of a per-channel factor on mixer outputs, or None.
        pos_embed: Learned position embeddings.
        drop_path: Rate of stochastic depth of the last block; linear in depth from 0.
        head_pool: "mean" of the tokens, "last" token, "max" of all tokens' logits, or "all" tokens' logits.
        out_indices: Blocks whose outputs are returned as dense features `b rows columns d`, each through its own
            LayerNorm, instead of logits.
        norm_eps: ε of the input norms and the final norm; the norms after the scan and of dense features keep 1e-5.

    Execution:
        dtype, param_dtype, matmul_precision: see `fastvim_jax.precision`.
        blocks: "scan" compiles one period of the pattern, "unroll" every block. remat: what the backward pass
            recomputes. scan_implementation: `implementation` of `selective_scan`.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    channels: int = 3
    num_classes: int = 1000
    embed_dim: int = 192
    depth: int = 24
    pooling: str = "mean"
    pool_axes: str = "alternate"
    token_order: str = "row"
    norm: str = "rms"
    post_norm: str = "layer"
    class_token: str = "none"
    conv_width: int = 4
    unpool: str = "before_skip"
    pool_scale: float = 1.0
    layer_scale: float | None = None
    state_size: int = 16
    expand: int = 2
    dt_rank: int | None = None
    proj_bias: bool = False
    conv_bias: bool = True
    pos_embed: bool = True
    drop_path: float = 0.0
    head_pool: str = "mean"
    out_indices: tuple[int, ...] = ()
    norm_eps: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"
    matmul_precision: str = "highest"
    blocks: str = "scan"
    remat: str = "none"
    scan_implementation: str = "auto"

    def __post_init__(self) -> None:
        _normalise_sizes(self)
        _check_choices(self)
        _check_positive(self, "embed_dim", "depth", "channels", "state_size", "expand")
        _check_common(self)
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
        return Precision(self.dtype, self.param_dtype, self.matmul_precision)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        return grid_of(_pair(self.image_size), self.patch)

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return _pair(self.patch_size)

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


@dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer (the DeiT architecture), also with pooled attention (Table 7 of the paper).

    Args:
        image_size, patch_size, channels, num_classes, embed_dim, depth, drop_path, out_indices, dtype,
            param_dtype, matmul_precision, blocks, remat: as in `VisionMambaConfig`.
        num_heads: Attention heads; must divide embed_dim.
        mlp_ratio: Hidden width of the MLP over embed_dim.
        qkv_bias: Bias of the query, key and value projection.
        head_pool: The head reads the final-norm class "token", or the "mean" of the patch tokens through a norm
            of its own.
        pooling: "none", or "mean": queries, keys and values from the row means of the normed tokens, the result
            repeated along the row; the class token stays a step of its own. pool_axes: as in VisionMambaConfig.
        conv_width: Width of a depthwise causal convolution with SiLU before the pooling; 0 for none.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    channels: int = 3
    num_classes: int = 1000
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    head_pool: str = "token"
    pooling: str = "none"
    pool_axes: str = "alternate"
    conv_width: int = 0
    drop_path: float = 0.0
    out_indices: tuple[int, ...] = ()
    norm_eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    matmul_precision: str = "highest"
    blocks: str = "scan"
    remat: str = "none"

    def __post_init__(self) -> None:
        _normalise_sizes(self)
        _check_choices(self, head_pool=("token", "mean"), pooling=("none", "mean"))
        _check_positive(self, "embed_dim", "depth", "channels", "num_heads")
        _check_common(self)
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}; choose one that does."
            )

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


def _check_choices(config, **narrower: tuple[str, ...]) -> None:
    for field in dataclasses.fields(config):
        choices = narrower.get(field.name, CHOICES.get(field.name))
        value = getattr(config, field.name)
        if choices and value not in choices:
            raise UserError(
                f"{field.name}={value!r} is not one of {', '.join(choices)}.{suggest(value, choices)}"
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

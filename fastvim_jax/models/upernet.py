"""UperNet: a backbone's dense features, perhaps a neck, UPerHead, and an auxiliary FCN head for training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax
from annotated_types import Interval
from flax import nnx
from jaxtyping import Array, Float, Int

from fastvim_jax.config_checks import NonNegativeInt, PositiveInt, Rate, check_fields
from fastvim_jax.errors import UserError
from fastvim_jax.layers.resize import resize_bilinear, resized_argmax
from fastvim_jax.models import saving
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.models.config import VisionMambaConfig, ViTConfig, Width
from fastvim_jax.models.segmentation.heads import FCNHead, UPerHead
from fastvim_jax.models.segmentation.necks import DeconvolutionNeck, MultiLevelNeck
from fastvim_jax.precision import Precision
from fastvim_jax.typing import Images


@dataclass(frozen=True)
class UperNetConfig:
    """A segmentation model: its backbone, neck and heads.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    backbone: VisionMambaConfig | ViTConfig | ChannelMambaConfig | ChannelViTConfig
    """The backbone, whose `out_indices` name the four blocks to read."""
    num_classes: PositiveInt = 150
    """Classes to tell apart; ignored pixels are no class."""
    neck: Literal["none", "deconvolution", "multilevel"] = "none"
    """none: four maps of stride 16 (FastVim); deconvolution: Vim's pyramid; multilevel: DeiT + MLN."""
    channels: Width = 512
    """Width of UPerHead."""
    pool_scales: tuple[Width, ...] = (1, 2, 3, 6)
    """Grid sizes of the pooling pyramid."""
    auxiliary_channels: Annotated[int, Interval(ge=0, le=65536)] = 256
    """Width of the auxiliary head, which only training runs; 0: no such head."""
    auxiliary_level: NonNegativeInt = 2
    """Which of the four maps the auxiliary head reads, from 0."""
    dropout: Rate = 0.1
    """Share of whole channels dropped before the classifiers in training."""

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.backbone.out_indices) != 4:
            raise UserError(
                f"backbone.out_indices={self.backbone.out_indices}: UperNet reads four blocks, for example "
                f"{quarter_blocks(self.backbone.depth)}; fastvim_jax.models.upernet() chooses them."
            )
        if self.num_classes < 2:
            raise UserError(
                f"num_classes={self.num_classes} must be at least 2: count the background of a single kind of object "
                "as a class."
            )
        if not self.pool_scales:
            raise UserError("pool_scales is empty: name at least one grid size.")
        if self.auxiliary_level > 3:
            raise UserError(f"auxiliary_level={self.auxiliary_level} must be 0, 1, 2 or 3.")

    @property
    def precision(self) -> Precision:
        """The dtype policy, that of the backbone."""
        return self.backbone.precision

    @property
    def dtype(self) -> str:
        """Name of the dtype in which products are computed."""
        return self.backbone.dtype

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width for which the backbone's position embeddings are made."""
        return self.backbone.image_size  # type: ignore[return-value]  # a pair once it is checked


class SegmentationLogits(NamedTuple):
    """The result of a training call, float32 or wider."""

    main: Float[Array, "b rows columns classes"]
    """Logits of UPerHead, at the size of its finest map."""
    auxiliary: Float[Array, "b rows2 columns2 classes"] | None
    """Logits of the auxiliary head, or None without one."""


class SegmentationDraws(NamedTuple):
    """The random draws of a training call; None where nothing is dropped."""

    drop_path: Float[Array, "depth ... b"] | None
    """0/1 masks: which images keep which block's output."""
    main: Float[Array, "b channels"] | None
    """0/1: which channels UPerHead keeps."""
    auxiliary: Float[Array, "b channels2"] | None
    """0/1: which channels the auxiliary head keeps."""


NOTHING_DROPPED = SegmentationDraws(None, None, None)


class UperNet(nnx.Module):
    """A segmentation model. Build it with `fastvim_jax.models.build_model(upernet(...), rngs=...)`.

    Trained values are `nnx.Param`; running statistics of batch norms are `nnx.BatchStat`.
    """

    save_pretrained = saving.save_pretrained

    def __init__(
        self,
        config: UperNetConfig,
        *,
        backbone: nnx.Module,
        widths: Sequence[int] | None = None,
        rngs: nnx.Rngs,
    ):
        """Put neck and heads on `backbone`, which maps images to four maps.

        Their channels are `widths`, by default `config.backbone.embed_dim` each. A neck wants equal ones.
        """
        self.config, p = config, config.precision
        widths = (config.backbone.embed_dim,) * 4 if widths is None else tuple(widths)
        self.backbone: Any = backbone
        self.neck: Any = nnx.data(None)
        if config.neck == "deconvolution":
            self.neck = DeconvolutionNeck(widths[0], precision=p, rngs=rngs)
        elif config.neck == "multilevel":
            self.neck = MultiLevelNeck(widths, widths[0], precision=p, rngs=rngs)
        self.decode_head = UPerHead(
            widths,
            features=config.channels,
            classes=config.num_classes,
            pool_scales=config.pool_scales,
            dropout=config.dropout,
            precision=p,
            rngs=rngs,
        )
        self.auxiliary_head = (
            FCNHead(
                widths[config.auxiliary_level],
                features=config.auxiliary_channels,
                classes=config.num_classes,
                dropout=config.dropout,
                precision=p,
                rngs=rngs,
            )
            if config.auxiliary_channels
            else nnx.data(None)
        )

    def __call__(
        self,
        images: Images,
        *,
        train: bool = False,
        drawn: SegmentationDraws = NOTHING_DROPPED,
    ) -> SegmentationLogits:
        """Compute logits at the stride of the finest map.

        Args:
            images: `b h w c`, normalised, any float dtype.
            train: normalise by the batch, update the running statistics and run the auxiliary head.
            drawn: masks of dropout and drop path, from `draw`.
        """
        maps = self.features(images, train=train, drop_path_keep=drawn.drop_path)
        main = self.decode_head(maps, train=train, keep=drawn.main)
        auxiliary = None
        if train and self.auxiliary_head is not None:
            level = maps[self.config.auxiliary_level]
            auxiliary = self.auxiliary_head(level, train=train, keep=drawn.auxiliary)
        return SegmentationLogits(main, auxiliary)

    def features(
        self,
        images: Images,
        *,
        train: bool = False,
        drop_path_keep: Float[Array, "depth ... b"] | None = None,
    ) -> Sequence[Array]:
        """Return the four maps `b rows columns d` that the heads read: the backbone's, through the neck."""
        maps = self.backbone(images, drop_path_keep=drop_path_keep)
        return maps if self.neck is None else self.neck(maps, train=train)

    def draw(self, key: jax.Array, batch: int) -> SegmentationDraws:
        """Draw what a training call on `batch` images drops."""
        config, keys = self.config, jax.random.split(key, 3)
        main = self.decode_head.classifier.draw_keep(keys[1], batch, config.channels)
        auxiliary = None
        if self.auxiliary_head is not None:
            classifier = self.auxiliary_head.classifier
            auxiliary = classifier.draw_keep(keys[2], batch, config.auxiliary_channels)
        return SegmentationDraws(self.backbone.draw_drop_path(keys[0], batch), main, auxiliary)

    def segment(self, images: Images) -> Float[Array, "b h w classes"]:
        """Return the logits resized to the images' own size (bilinear)."""
        return resize_bilinear(self(images).main, (images.shape[1], images.shape[2]))

    def classes(self, images: Images) -> Int[Array, "b h w"]:
        """Return the class of every pixel: that of the largest logit of `segment`, the lowest number among equals.

        The resized logits, gigabytes for a batch, are never written to memory.
        """
        return resized_argmax(self(images).main, (images.shape[1], images.shape[2]))


def upernet(
    backbone: VisionMambaConfig | ViTConfig | ChannelMambaConfig | ChannelViTConfig,
    *,
    image_size: int | tuple[int, int] = 512,
    **options: Any,
) -> UperNetConfig:
    """Describe UperNet on a backbone.

    Args:
        backbone: any backbone's config, such as `model_config("fastvim_tiny_patch16_224")`. Unless it says which blocks
            to read (`out_indices`), the last of every quarter of its depth is read; it loses its classifier.
        image_size: height and width of training crops.
        **options: fields of `UperNetConfig`.
    """
    blocks = backbone.out_indices or quarter_blocks(backbone.depth)
    dense = dataclasses.replace(backbone, out_indices=blocks, image_size=image_size, num_classes=0)
    return UperNetConfig(dense, **options)


def quarter_blocks(depth: int) -> tuple[int, ...]:
    """Return the last block of each quarter: 5, 11, 17, 23 of 24."""
    if depth < 4:
        return tuple(min(i, depth - 1) for i in range(4))
    return tuple(depth * (i + 1) // 4 - 1 for i in range(4))

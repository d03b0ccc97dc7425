"""Configure a masked autoencoder: its encoder by a classifier's config, its decoder, and its mask."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Interval

from fastvim_jax.config_checks import check_fields
from fastvim_jax.errors import UserError, suggest
from fastvim_jax.layers.masking import kept_count
from fastvim_jax.models.config import Depth, VisionMambaConfig, ViTConfig, Width
from fastvim_jax.precision import Precision


@dataclass(frozen=True, kw_only=True)
class MaskedAutoencoderConfig:
    """Describe a masked autoencoder: its encoder, its decoder and its mask.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    encoder: VisionMambaConfig | ViTConfig
    """The backbone, without a head (num_classes=0). pooling="mean" or "max": FastMaskVim; "none": Vim."""
    mask_ratio: Annotated[float, Interval(gt=0, lt=1)] = 0.75
    """Share of the patches that random masks remove; int(patches * (1 - mask_ratio)) are kept."""
    decoder_dim: Width = 512
    """Width of the decoder."""
    decoder_depth: Depth = 2
    """Blocks of the decoder."""
    decoder_heads: Width = 16
    """Attention heads of a ViT's decoder; must divide decoder_dim. Unused with a Mamba encoder."""
    divisor: Literal["row_length", "count"] = "row_length"
    """What a pooled row's sum is divided by. row_length: the columns of the whole grid. count: the number of the row's
    tokens, which gives their true mean (Table 12 of the paper)."""
    reversal: Literal["released", "consistent"] = "released"
    """released: the backward direction reverses the tokens and not their rows, as the released weights were trained.
    consistent: each token keeps its own row."""

    def __post_init__(self) -> None:
        check_fields(self)
        encoder = self.encoder
        kept_count(encoder.grid[0] * encoder.grid[1], self.mask_ratio)
        wanted: dict[str, Any] = {"num_classes": 0, "out_indices": (), "drop_path": 0.0}
        if isinstance(encoder, ViTConfig):
            wanted |= {"pooling": "none", "head_pool": "token"}
            if self.decoder_dim % self.decoder_heads:
                raise UserError(
                    f"decoder_heads={self.decoder_heads} does not divide decoder_dim={self.decoder_dim}."
                )
        else:
            wanted |= {"token_order": "row", "pos_embed": True}
            if encoder.pooling != "none":
                wanted |= {"class_token": "none"}
            if encoder.pooling == "attention":
                raise UserError(
                    "encoder.pooling='attention' has no masked form: use mean, max or none."
                )
        for name, value in wanted.items():
            if getattr(encoder, name) != value:
                raise UserError(
                    f"encoder.{name}={getattr(encoder, name)!r}: a masked autoencoder's encoder has {name}={value!r}."
                )
        for name, width in (
            ("encoder.embed_dim", encoder.embed_dim),
            ("decoder_dim", self.decoder_dim),
        ):
            if width % 4:
                raise UserError(
                    f"{name}={width} must be a multiple of 4: positions are sines and cosines of both axes."
                )
        for size, patch in zip(encoder.image_size, encoder.patch, strict=True):  # type: ignore[arg-type]
            if size % patch:
                raise UserError(
                    f"encoder.image_size={encoder.image_size} is not a whole number of patches of {encoder.patch}."
                )

    @property
    def precision(self) -> Precision:
        """The dtype policy."""
        return self.encoder.precision

    @property
    def dtype(self) -> str:
        """Name of the dtype in which the model computes."""
        return self.encoder.dtype

    @property
    def num_classes(self) -> int:
        """Number of classes: 0, because the model predicts pixels."""
        return 0

    @property
    def channels(self) -> int:
        """Image channels."""
        return self.encoder.channels

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Height and width in pixels."""
        return self.encoder.image_size

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return self.encoder.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        return self.encoder.grid

    @property
    def matmul_precision(self) -> str:
        """How a GPU computes float32 products."""
        return self.encoder.matmul_precision

    @property
    def kept(self) -> int:
        """Number of patches that a random mask keeps of an image of `image_size`."""
        return kept_count(self.grid[0] * self.grid[1], self.mask_ratio)


def replace_masked_options(
    config: MaskedAutoencoderConfig, **options: Any
) -> MaskedAutoencoderConfig:
    """Return `config` with `options` replaced, which are fields of its own or of its encoder.

    Raises:
        UserError: neither has such an option (the message suggests names), or a value is bad.
    """
    own = {f.name for f in dataclasses.fields(config)}
    encoder = {f.name for f in dataclasses.fields(config.encoder)} - {"num_classes"}
    for option in options:
        if option not in own | encoder:
            names = sorted(own | encoder)
            raise UserError(
                f"a masked autoencoder has no option {option!r}.{suggest(option, names)} Options: {', '.join(names)}."
            )
    inner = {name: value for name, value in options.items() if name not in own}
    outer = {name: value for name, value in options.items() if name in own}
    given = outer.get("encoder", config.encoder)
    if inner and isinstance(given, VisionMambaConfig | ViTConfig):  # else refused by its class
        outer["encoder"] = dataclasses.replace(given, **inner)
    return dataclasses.replace(config, **outer)

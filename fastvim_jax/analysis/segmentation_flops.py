"""Count UperNet's multiply-adds: those of the backbone, and one per weight and output pixel of each convolution."""

from __future__ import annotations

from fastvim_jax.analysis.flops import gmacs
from fastvim_jax.layers.patch_embed import grid_of
from fastvim_jax.models import UperNetConfig

_LEVELS = {"none": (1, 1, 1, 1), "deconvolution": (4, 2, 1, 0.5), "multilevel": (4, 2, 1, 0.5)}
"""Side of each level's map relative to the backbone's grid of tokens, by neck."""


def segmentation_gmacs(
    config: UperNetConfig, size: tuple[int, int] | None = None, *, train: bool = False
) -> dict[str, float]:
    """Return billions of multiply-adds per image of `backbone`, `neck` and `heads`.

    Resizing, pooling and norms are not counted.

    Args:
        config: the model.
        size: height and width of the image; None: the size that the model is built for.
        train: also count the auxiliary head.
    """
    size = config.image_size if size is None else size
    rows, columns = grid_of(size, config.backbone.patch)
    d, c, classes = config.backbone.embed_dim, config.channels, config.num_classes
    pixels = [rows * columns * scale**2 for scale in _LEVELS[config.neck]]
    scales = config.pool_scales
    # Levels 0 to 2: a 1x1 and a 3x3 convolution each.
    heads = sum(pixels[:3]) * (d * c + 9 * c * c)
    # Level 3: pooled at each scale, then one 3x3 convolution of all.
    heads += sum(s * s for s in scales) * d * c + pixels[3] * 9 * (d + len(scales) * c) * c
    # All levels at the size of level 0: one 3x3 convolution, then the classes.
    heads += pixels[0] * (9 * 4 * c * c + c * classes)
    if train and config.auxiliary_channels:
        a = config.auxiliary_channels
        heads += pixels[config.auxiliary_level] * (9 * d * a + a * classes)
    neck = 0.0
    if config.neck == "multilevel":
        neck = 4 * rows * columns * d * d + sum(pixels) * 9 * d * d
    elif config.neck == "deconvolution":
        # A 2x2 up-convolution costs 4 d² per pixel of its input. Level 0 takes two of them, level 1 one.
        neck = rows * columns * d * d * (4 + 16 + 4)
    backbone = gmacs(config.backbone, size)
    return {"backbone": backbone, "neck": neck / 1e9, "heads": heads / 1e9}

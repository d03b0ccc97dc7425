"""Pyramids made of four feature maps of one stride (16): levels of stride 4, 8, 16 and 32.

FastVim's segmentation uses none. `DeconvolutionNeck` is Vim's (hustvl/Vim), `MultiLevelNeck` that of DeiT + MLN.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from fastvim_jax.errors import UserError
from fastvim_jax.layers.batch_norm import BatchNorm, UpConv, convolution
from fastvim_jax.layers.gelu import gelu
from fastvim_jax.layers.resize import resize_bilinear
from fastvim_jax.precision import Precision
from fastvim_jax.typing import FeatureMap

MULTILEVEL_SCALES = (4, 2, 1, 0.5)


class DeconvolutionNeck(nnx.Module):
    """Up-convolve level 0 twice and level 1 once, keep level 2, max-pool level 3; the width is kept."""

    def __init__(self, features: int, *, precision: Precision, rngs: nnx.Rngs):
        self.up4_first = UpConv(features, features, precision=precision, rngs=rngs)
        self.up4_norm = BatchNorm(features, precision=precision, rngs=rngs)
        self.up4_second = UpConv(features, features, precision=precision, rngs=rngs)
        self.up2 = UpConv(features, features, precision=precision, rngs=rngs)

    def __call__(self, maps: Sequence[FeatureMap], *, train: bool) -> tuple[FeatureMap, ...]:
        """Resize four maps `b h w d` of one size by 4, 2, 1 and 1/2 (odd sizes are floored)."""
        x0, x1, x2, x3 = maps
        up = gelu(self.up4_norm(self.up4_first(x0), train=train))
        return self.up4_second(up), self.up2(x1), x2, nnx.max_pool(x3, (2, 2), strides=(2, 2))


class MultiLevelNeck(nnx.Module):
    """For each level: 1 x 1 convolution, bilinear resize by 4, 2, 1, 0.5, 3 x 3 convolution; no norm, no activation.

    Halving is the mean of 2 x 2 cells, for odd sizes too: there the last row or column is left out.
    """

    def __init__(
        self, features_in: Sequence[int], features_out: int, *, precision: Precision, rngs: nnx.Rngs
    ):
        init = jax.nn.initializers.xavier_uniform()
        self.laterals = nnx.List(
            convolution(
                d,
                features_out,
                width=1,
                bias=True,
                precision=precision,
                rngs=rngs,
                kernel_init=init,
            )
            for d in features_in
        )
        self.outputs = nnx.List(
            convolution(
                features_out, features_out, width=3, bias=True, precision=precision, rngs=rngs,
                kernel_init=init,
            )
            for _ in features_in
        )  # fmt: skip

    def __call__(self, maps: Sequence[FeatureMap], *, train: bool) -> tuple[FeatureMap, ...]:
        """Resize four maps `b h w d` of one size by 4, 2, 1 and 1/2, and project them to one width."""
        levels = []
        for x, scale, lateral, output in zip(
            maps, MULTILEVEL_SCALES, self.laterals, self.outputs, strict=True
        ):
            size = int(x.shape[1] * scale), int(x.shape[2] * scale)
            if min(size) < 1:
                raise UserError(
                    f"a feature map of {x.shape[1]}x{x.shape[2]} is too small for the multilevel neck, whose last "
                    "level halves it; use larger images."
                )
            if scale < 1:  # The reference does not read what is left over of an odd size.
                x = x[:, : int(size[0] / scale), : int(size[1] / scale)]
            levels.append(output(resize_bilinear(lateral(x), size)))
        return tuple(levels)

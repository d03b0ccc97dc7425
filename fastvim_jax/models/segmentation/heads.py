"""UPerHead (Xiao et al. 2018) and the FCN head, on four feature maps of one stride or of a pyramid.

l_i = relu(BN(conv1x1(x_i))), i = 0..2          l_3 = relu(BN(conv3x3([x_3, ppm_1(x_3), ppm_2(x_3), ...])))
for i = 3, 2, 1:  l_(i-1) += resize(l_i)        sums accumulate downwards
f_i = relu(BN(conv3x3(l_i))), i = 0..2          f_3 = l_3
logits = conv1x1(dropout(relu(BN(conv3x3([f_0, resize(f_1), resize(f_2), resize(f_3)])))))
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float

from fastvim_jax.layers.batch_norm import ConvNorm, convolution
from fastvim_jax.layers.resize import adaptive_average_pool, resize_bilinear
from fastvim_jax.precision import Precision
from fastvim_jax.typing import FeatureMap

Kept = Float[Array, "b c"]
"""0/1: which channels of which image dropout keeps."""


class PyramidPooling(nnx.Module):
    """Pool to s x s for every scale s, 1 x 1 convolution, batch norm, ReLU, resize back."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        scales: Sequence[int],
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.scales = tuple(scales)
        self.branches = nnx.List(
            ConvNorm(features_in, features_out, width=1, precision=precision, rngs=rngs)
            for _ in self.scales
        )

    def __call__(self, x: FeatureMap, *, train: bool) -> list[FeatureMap]:
        """Return one map `b h w o` for each scale."""
        size = (x.shape[1], x.shape[2])
        return [
            resize_bilinear(branch(adaptive_average_pool(x, (scale, scale)), train=train), size)
            for scale, branch in zip(self.scales, self.branches, strict=True)
        ]


class Classifier(nnx.Module):
    """Channel dropout and a 1 x 1 convolution to classes, whose logits are float32 or wider."""

    def __init__(
        self, features: int, classes: int, dropout: float, *, precision: Precision, rngs: nnx.Rngs
    ):
        self.dropout, self.wide = dropout, precision.wide
        self.conv = convolution(
            features, classes, width=1, bias=True, precision=precision, rngs=rngs,
            kernel_init=normal(0.01),
        )  # fmt: skip

    def __call__(self, x: FeatureMap, keep: Kept | None) -> FeatureMap:
        """Return class logits `b h w classes`, without the channels that `keep` (from `draw_keep`) drops."""
        if keep is not None:
            x = x * (keep / (1 - self.dropout)).astype(x.dtype)[:, None, None]
        return self.conv(x).astype(self.wide)

    def draw_keep(self, key: jax.Array, batch: int, features: int) -> Kept | None:
        """Draw which channels of each image are kept; None if dropout is off."""
        if not self.dropout:
            return None
        return jax.random.bernoulli(key, 1 - self.dropout, (batch, features)).astype(jnp.float32)


class UPerHead(nnx.Module):
    """Fuse a pooled top level and three lateral levels into logits at the size of level 0."""

    def __init__(
        self,
        features_in: Sequence[int],
        *,
        features: int,
        classes: int,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        def conv(i: int, width: int) -> ConvNorm:
            return ConvNorm(i, features, width=width, precision=precision, rngs=rngs)

        *lower, top = features_in
        self.laterals = nnx.List(conv(d, 1) for d in lower)
        self.ppm = PyramidPooling(top, features, pool_scales, precision=precision, rngs=rngs)
        self.bottleneck = conv(top + len(pool_scales) * features, 3)
        self.outputs = nnx.List(conv(features, 3) for _ in lower)
        self.fusion = conv(len(features_in) * features, 3)
        self.classifier = Classifier(features, classes, dropout, precision=precision, rngs=rngs)

    def __call__(
        self,
        maps: Sequence[FeatureMap],
        *,
        train: bool = False,
        keep: Kept | None = None,
    ) -> FeatureMap:
        """Compute logits.

        Args:
            maps: four feature maps `b h w d`, the finest first; all of one size, or a pyramid.
            train: normalise by the batch's statistics, and update the running ones.
            keep: 0/1 masks `b features` of the channels kept, from `classifier.draw_keep`; None drops none.

        Returns:
            Logits `b h w classes` at the size of the first map, float32 or wider.
        """
        *lower, top = maps
        levels = [lateral(x, train=train) for lateral, x in zip(self.laterals, lower, strict=True)]
        pooled = self.ppm(top, train=train)
        levels.append(
            self.bottleneck(
                jnp.concatenate([top.astype(pooled[0].dtype), *pooled], -1), train=train
            )
        )
        for i in range(len(levels) - 1, 0, -1):
            below = levels[i - 1]
            levels[i - 1] = below + resize_bilinear(levels[i], (below.shape[1], below.shape[2]))
        outputs = [f(x, train=train) for f, x in zip(self.outputs, levels[:-1], strict=True)]
        size = (outputs[0].shape[1], outputs[0].shape[2])
        fused = [resize_bilinear(x, size) for x in (*outputs, levels[-1])]
        return self.classifier(self.fusion(jnp.concatenate(fused, -1), train=train), keep)


class FCNHead(nnx.Module):
    """One 3 x 3 convolution with batch norm and ReLU, and the classifier: the auxiliary head."""

    def __init__(
        self,
        features_in: int,
        *,
        features: int,
        classes: int,
        dropout: float = 0.1,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.conv = ConvNorm(features_in, features, width=3, precision=precision, rngs=rngs)
        self.classifier = Classifier(features, classes, dropout, precision=precision, rngs=rngs)

    def __call__(
        self,
        x: FeatureMap,
        *,
        train: bool = False,
        keep: Kept | None = None,
    ) -> FeatureMap:
        """Return the logits `b h w classes` of one feature map; arguments as in `UPerHead.__call__`."""
        return self.classifier(self.conv(x, train=train), keep)

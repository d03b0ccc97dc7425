"""Box heads and mask heads, which read the features of one box at a time."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import he_normal, normal
from jaxtyping import Array, Float, Int

from fastvim_jax.layers.linear import promote_parameters
from fastvim_jax.models.detection.simple_fpn import ConvNorm, Upsample, interleaved
from fastvim_jax.precision import Precision
from pallas_kernels.sharding import cast_parameter

BOX_SIZE, MASK_SIZE = 7, 14
"""Bins along each side that RoIAlign gives to a box head and to a mask head, which doubles them."""


def _convs(count, width, out, eps, precision, rngs) -> list[ConvNorm]:
    widths = [width] + [out] * count
    return [
        ConvNorm(a, b, 3, eps=eps, precision=precision, rngs=rngs)
        for a, b in itertools.pairwise(widths)
    ]


class BoxHead(nnx.Module):
    """Predict class scores and deltas of a box: convolutions, one fully connected layer, two linear outputs.

    Args:
        width: Channels of the features.
        num_classes: Classes without the background.
        convs: Number of 3 × 3 convolutions.
        conv_width: Their channels.
        hidden: Width of the fully connected layer.
        class_agnostic: Predict one set of deltas for all classes.
        eps: Epsilon of the norms.
        precision: Dtypes of parameters and products.
        rngs: Source of the initial weights.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        convs: int,
        conv_width: int,
        hidden: int,
        class_agnostic: bool,
        eps: float,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        p = precision
        self.classes = 1 if class_agnostic else num_classes
        self.convs = nnx.List(_convs(convs, width, conv_width, eps, precision, rngs))

        def linear(width, out, std, dtype):
            return nnx.LinearGeneral(
                width,
                out,
                axis=tuple(range(-len(width), 0)),
                kernel_init=he_normal() if std is None else normal(std),
                dtype=dtype,
                param_dtype=p.params,
                precision=p.lax,
                promote_dtype=promote_parameters,
                rngs=rngs,
            )

        self.fc = linear((BOX_SIZE, BOX_SIZE, conv_width), hidden, None, p.compute)
        self.cls = linear((hidden,), num_classes + 1, 0.01, p.wide)
        self.reg = linear((hidden,), 4 * self.classes, 0.001, p.wide)

    def __call__(
        self, x: Float[Array, "n h w c"]
    ) -> tuple[Float[Array, "n classes"], Float[Array, "n boxes 4"]]:
        """Return class logits (background last), and deltas for each class or one set for all; float32 or wider."""
        for conv in self.convs:
            x = jax.nn.relu(conv(x))
        x = jax.nn.relu(self.fc(x))
        return self.cls(x), self.reg(x).reshape(len(x), self.classes, 4)


class MaskHead(nnx.Module):
    """Predict one mask of logits for each class: convolutions, doubled resolution, a 1 × 1 convolution.

    Args: as for `BoxHead`.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        convs: int,
        conv_width: int,
        eps: float,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.precision = p = precision
        self.convs = nnx.List(_convs(convs, width, conv_width, eps, precision, rngs))
        self.upsample = Upsample(conv_width, conv_width, precision=p, rngs=rngs)
        self.logits = nnx.Conv(
            conv_width,
            num_classes,
            (1, 1),
            kernel_init=he_normal(),
            dtype=p.compute,
            param_dtype=p.params,
            precision=p.lax,
            promote_dtype=promote_parameters,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 classes"]:
        """Return mask logits at twice the resolution, float32 or wider."""
        y = self.logits(interleaved(self._fours(x)))
        return y.astype(jnp.promote_types(y.dtype, jnp.float32))

    def of_class(
        self, x: Float[Array, "n h w c"], labels: Int[Array, " n"]
    ) -> Float[Array, "n h2 w2"]:
        """Return each box's logits for one class, without computing those of the others."""
        y, p = self._fours(x), self.precision
        assert self.logits.bias is not None
        kernel, bias = (
            cast_parameter(each[...], dtype, x)
            for each, dtype in ((self.logits.kernel, p.compute), (self.logits.bias, p.wide))
        )
        of_box = jnp.take(kernel[0, 0], labels, axis=1, mode="clip")
        logits = jnp.einsum(
            "nhwpqc,cn->nhwpq", y, of_box, precision=p.lax, preferred_element_type=p.wide
        )
        shift = jnp.take(bias, labels, mode="clip")
        return interleaved(logits + shift[:, None, None, None, None])

    def _fours(self, x):
        for conv in self.convs:
            x = jax.nn.relu(conv(x))
        return jax.nn.relu(self.upsample.fours(x))

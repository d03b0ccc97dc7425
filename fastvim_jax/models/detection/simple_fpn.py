"""Define ViTDet's simple feature pyramid on one stride-16 map, and the two layers that it and the heads are made of."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import he_normal, zeros
from jaxtyping import Array, Float

from fastvim_jax.layers.gelu import gelu
from fastvim_jax.layers.linear import promote_parameters
from fastvim_jax.layers.norms import make_norm
from fastvim_jax.precision import Precision
from fastvim_jax.typing import Grid
from pallas_kernels.sharding import cast_parameter


class ConvNorm(nnx.Module):
    """A convolution without bias and a LayerNorm over channels ("LN2d"), `b h w c` → `b h w d`."""

    def __init__(
        self, width: int, out: int, size: int, *, eps: float, precision: Precision, rngs: nnx.Rngs
    ):
        self.conv = nnx.Conv(
            width,
            out,
            (size, size),
            use_bias=False,
            kernel_init=he_normal(),
            dtype=precision.compute,
            param_dtype=precision.params,
            precision=precision.lax,
            promote_dtype=promote_parameters,
            rngs=rngs,
        )
        self.norm = make_norm("layer", out, eps=eps, precision=precision, rngs=rngs)

    def __call__(self, x: Grid) -> Float[Array, "b rows2 columns2 out"]:
        """Return the normed convolution in the compute dtype."""
        y = self.conv(x)
        return self.norm(y).astype(y.dtype)


class Upsample(nnx.Module):
    """A transposed convolution of 2 × 2 with stride 2: every cell becomes four, each through a matrix of its own."""

    def __init__(self, width: int, out: int, *, precision: Precision, rngs: nnx.Rngs):
        kernel_init = he_normal(in_axis=2, out_axis=(0, 1, 3))
        self.precision = precision
        self.kernel = nnx.Param(kernel_init(rngs.params(), (2, 2, width, out), precision.params))
        self.bias = nnx.Param(zeros(rngs.params(), (out,), precision.params))

    def __call__(self, x: Grid) -> Float[Array, "b rows2 columns2 out"]:
        """Double rows and columns; the result is in the compute dtype."""
        return interleaved(self.fours(x))

    def fours(self, x: Grid) -> Float[Array, "b rows columns 2 2 out"]:
        """Return the four cells that every cell becomes beside each other, as the product leaves them."""
        p = self.precision
        kernel = cast_parameter(self.kernel[...], p.compute, x)
        # As one product with a bias of its own width: XLA would write a bias of each cell to memory before the product.
        four = jnp.moveaxis(kernel, 2, 0).reshape(kernel.shape[2], -1)
        y = jnp.einsum("bhwi,io->bhwo", x.astype(p.compute), four, precision=p.lax)
        y += jnp.concatenate([cast_parameter(self.bias[...], y.dtype, y)] * 4)
        return y.reshape(*x.shape[:3], 2, 2, -1)


def interleaved(
    fours: Float[Array, "b rows columns 2 2 *out"],
) -> Float[Array, "b rows2 columns2 *out"]:
    """Put the cells of `Upsample.fours` in rows and columns."""
    b, h, w, _, _, *rest = fours.shape
    return jnp.swapaxes(fours, 2, 3).reshape(b, 2 * h, 2 * w, *rest)


class SimpleFPN(nnx.Module):
    """Make five levels of strides 4, 8, 16, 32 and 64 from one map of stride 16, without a top-down path.

    p2 = up(gelu(norm(up(x)))), p3 = up(x), p4 = x, p5 = max-pool(x); each then a 1 × 1 and a 3 × 3 `ConvNorm`, without
    activation; p6 is every second cell of p5.
    """

    def __init__(self, width: int, out: int, *, eps: float, precision: Precision, rngs: nnx.Rngs):
        half, quarter = width // 2, width // 4
        self.up4_first = Upsample(width, half, precision=precision, rngs=rngs)
        self.up4_norm = make_norm("layer", half, eps=eps, precision=precision, rngs=rngs)
        self.up4_second = Upsample(half, quarter, precision=precision, rngs=rngs)
        self.up2 = Upsample(width, half, precision=precision, rngs=rngs)

        def conv(channels: int, size: int) -> ConvNorm:
            return ConvNorm(channels, out, size, eps=eps, precision=precision, rngs=rngs)

        self.lateral = nnx.List(conv(channels, 1) for channels in (quarter, half, width, width))
        self.output = nnx.List(conv(out, 3) for _ in range(4))

    def __call__(self, x: Grid) -> tuple[Float[Array, "b _h _w out"], ...]:
        """Return p2 to p6 of `b rows columns d`, in the compute dtype. Odd sizes are floored by the pooling."""
        first = self.up4_first(x)
        first = gelu(self.up4_norm(first)).astype(first.dtype)
        pooled = nnx.max_pool(x, (2, 2), strides=(2, 2))
        maps = (self.up4_second(first), self.up2(x), x, pooled)
        levels = [
            output(lateral(level))
            for level, lateral, output in zip(maps, self.lateral, self.output, strict=True)
        ]
        return (*levels, levels[-1][:, ::2, ::2])

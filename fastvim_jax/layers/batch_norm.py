"""Batch normalisation with running statistics, and the convolution that it follows in dense heads.

Training: y = (x - m) / sqrt(v + eps) * scale + bias, with mean m and population variance v over batch, rows and
columns; running = 0.9 running + 0.1 new, where the new variance is v n / (n - 1). Evaluation uses the running values.

Inside a step over a mesh the batch is the global one, so the statistics are those of all devices. A training call
changes the `nnx.BatchStat` variables in place; a step returns them as part of its state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer, ones, variance_scaling, zeros

from fastvim_jax.layers.linear import promote_parameters
from fastvim_jax.precision import Precision
from fastvim_jax.typing import FeatureMap
from pallas_kernels.sharding import cast_parameter

EPS = 1e-5
MOMENTUM = 0.1
KAIMING: Initializer = variance_scaling(2.0, "fan_out", "normal")
"""Initial kernels of convolutions before a ReLU (He et al. 2015), by fan-out as in the reference."""


class BatchNorm(nnx.Module):
    """Normalise `b h w c` over all axes but the last; statistics and output are float32 or wider."""

    def __init__(self, features: int, *, precision: Precision, rngs: nnx.Rngs):
        self.wide = precision.wide
        dtype = precision.params
        self.scale = nnx.Param(ones(rngs.params(), (features,), dtype))
        self.bias = nnx.Param(zeros(rngs.params(), (features,), dtype))
        self.mean = nnx.BatchStat(jnp.zeros((features,), dtype))
        self.var = nnx.BatchStat(jnp.ones((features,), dtype))

    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Normalise. With `train`, use and update by the batch's statistics; otherwise use the running ones."""
        x = x.astype(self.wide)
        if train:
            mean = jnp.mean(x, axis=(0, 1, 2))
            var = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2))
            count = int(np.prod(x.shape[:3]))
            self._update(self.mean, mean)
            self._update(self.var, var * (count / max(count - 1, 1)))
        else:
            mean, var = self.mean[...].astype(self.wide), self.var[...].astype(self.wide)
        factor = jax.lax.rsqrt(var + EPS) * self.scale[...].astype(self.wide)
        return (x - mean) * factor + self.bias[...].astype(self.wide)

    def _update(self, running: nnx.BatchStat, new: jax.Array) -> None:
        new = jax.lax.stop_gradient(new).astype(running[...].dtype)
        running[...] = (1 - MOMENTUM) * running[...] + MOMENTUM * new


class ConvNorm(nnx.Module):
    """Square convolution without bias and with zero padding, batch norm, ReLU: `b h w i` → `b h w o`."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        width: int,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.conv = convolution(
            features_in, features_out, width=width, bias=False, precision=precision, rngs=rngs
        )
        self.norm = BatchNorm(features_out, precision=precision, rngs=rngs)
        self.compute = precision.compute

    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Return the activated maps in the compute dtype."""
        return nnx.relu(self.norm(self.conv(x), train=train)).astype(self.compute)


class UpConv(nnx.Module):
    """Transposed convolution 2 x 2 of stride 2 with bias: each pixel becomes four, `b h w i` → `b 2h 2w o`."""

    def __init__(
        self, features_in: int, features_out: int, *, precision: Precision, rngs: nnx.Rngs
    ):
        self.precision = precision
        shape = (features_in, 2, 2, features_out)
        init = variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=3)
        self.kernel = nnx.Param(init(rngs.params(), shape, precision.params))
        self.bias = nnx.Param(zeros(rngs.params(), (features_out,), precision.params))

    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Return maps of twice the size in the compute dtype. One matrix product does it, as windows do not overlap."""
        p = self.precision
        kernel = cast_parameter(self.kernel[...], p.compute, x)
        y = jnp.einsum("bhwi,ipqo->bhpwqo", x.astype(p.compute), kernel, precision=p.lax)
        b, h, _, w, _, o = y.shape
        return y.reshape(b, 2 * h, 2 * w, o) + cast_parameter(self.bias[...], y.dtype, y)


def convolution(
    features_in: int,
    features_out: int,
    *,
    width: int,
    bias: bool,
    precision: Precision,
    rngs: nnx.Rngs,
    kernel_init: Initializer = KAIMING,
) -> nnx.Conv:
    """Build a square convolution of stride 1 that keeps the size, padded with zeros, in the compute dtype."""
    return nnx.Conv(
        features_in,
        features_out,
        kernel_size=(width, width),
        padding="SAME",
        use_bias=bias,
        kernel_init=kernel_init,
        bias_init=zeros,
        dtype=precision.compute,
        param_dtype=precision.params,
        precision=precision.lax,
        promote_dtype=promote_parameters,
        rngs=rngs,
    )

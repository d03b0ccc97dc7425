"""The bidirectional state-space mixer of Vim and FastVim; the pooling decides which of the two it is.

    x, z = in_proj(h)
    per direction:  c = silu(conv(x));  u = pool(c);  Δ, B, C = projections of u
                    y = unpool(scan(u, Δ, A, B, C)) + D · c
    out  = out_proj(norm((y_forward + y_backward) / 2) · silu(z))

The backward direction visits the same tokens from last to first: an argument, not a flipped copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import constant, ones, zeros

from fastvim_jax.layers import initializers as init
from fastvim_jax.layers.fused_core import fused_core, runs_fused
from fastvim_jax.layers.linear import linear, product
from fastvim_jax.layers.norms import keeping_input, make_norm
from fastvim_jax.layers.pooling import NoPooling, Pooling
from fastvim_jax.precision import Precision
from fastvim_jax.typing import Inner, Pooled, Tokens
from pallas_kernels import causal_conv1d, selective_scan


@dataclass(frozen=True)
class MixerConfig:
    """Sizes and choices of one mixer; `VisionMambaConfig` documents them.

    `depth` only enters the initialisation: out_proj is divided by sqrt(depth).
    """

    width: int
    depth: int = 1
    state_size: int = 16
    expand: int = 2
    conv_width: int = 4
    dt_rank: int | None = None
    proj_bias: bool = False
    conv_bias: bool = True
    post_norm: str = "layer"
    norm_eps: float = 1e-5
    unpool: str = "before_skip"
    attention_pooling: bool = False
    layer_scale: float | None = None
    scan_implementation: str = "auto"
    precision: Precision = Precision()

    @property
    def inner(self) -> int:
        """Inner width e."""
        return self.expand * self.width

    @property
    def rank(self) -> int:
        """Rank r of the projection that gives Δ."""
        return self.dt_rank or math.ceil(self.width / 16)


class DepthwiseConv(nnx.Module):
    """Causal depthwise convolution followed by SiLU; the last tap meets the current token. Kernel `k e`."""

    def __init__(self, channels: int, width: int, *, bias: bool, dtype, rngs: nnx.Rngs):
        uniform = init.fan_in_uniform(width)
        self.kernel = nnx.Param(uniform(rngs.params(), (width, channels), dtype))
        self.bias = (
            nnx.Param(uniform(rngs.params(), (channels,), dtype)) if bias else nnx.data(None)
        )

    def __call__(self, x: Inner, *, reverse: bool) -> Inner:
        bias = None if self.bias is None else self.bias[...]
        return causal_conv1d(x, self.kernel[...], bias, activation="silu", reverse=reverse)


class ScanDirection(nnx.Module):
    """One direction of the mixer, with its own convolution, projections, A and D."""

    def __init__(self, config: MixerConfig, *, reverse: bool, rngs: nnx.Rngs):
        p = config.precision
        e, n, r = config.inner, config.state_size, config.rank
        self.config, self.reverse = config, reverse
        self.conv = (
            DepthwiseConv(e, config.conv_width, bias=config.conv_bias, dtype=p.params, rngs=rngs)
            if config.conv_width
            else nnx.data(None)
        )
        dense: dict[str, Any] = {
            "dtype": p.compute,
            "param_dtype": p.params,
            "precision": p.lax,
            "rngs": rngs,
        }
        self.x_proj = nnx.Linear(
            e, r + 2 * n, use_bias=False, kernel_init=init.fan_in_uniform(e), **dense
        )
        # The authors protect only the forward bias from a general reset, so the backward one starts at zero.
        self.dt_proj = nnx.Linear(
            r,
            e,
            kernel_init=init.fan_in_uniform(r),
            bias_init=zeros if reverse else init.step_bias(),
            **dense,
        )
        self.A_log = nnx.Param(init.log_range(rngs.params(), (e, n), p.params))
        self.D = nnx.Param(ones(rngs.params(), (e,), p.params))
        self.score = (
            nnx.Linear(e, 1, kernel_init=init.fan_in_uniform(e), **dense)
            if config.attention_pooling
            else nnx.data(None)
        )

    def __call__(self, x: Inner, pooling: Pooling) -> Inner:
        """x `b l e` in scan order → y `b l e` in scan order, float32 or wider."""
        precision = self.config.precision
        wide = precision.wide
        c = self.convolve(x)
        if isinstance(pooling, NoPooling):  # the scan has every token at hand, and adds the skip
            return self.scan(c, D=self.D[...].astype(wide)).astype(wide)
        scores = None if self.score is None else linear(self.score, c, precision)
        u = pooling.pool(c, scores)
        y = self.scan(u).astype(wide)
        D = self.D[...].astype(wide)
        if self.config.unpool == "after_skip":
            return pooling.unpool(y + D * u)
        return pooling.unpool(y) + D * c

    def convolve(self, x: Inner) -> Inner:
        """The tokens after convolution and SiLU."""
        return jax.nn.silu(x) if self.conv is None else self.conv(x, reverse=self.reverse)

    def select(self, u: Pooled) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Δ before its bias and softplus `b s e`, B `b s n` and C `b s n`, from the scan's tokens.

        Wide, but narrow tokens (unpooled, with activations="compute") have a narrow Δ: it is as large as they are.
        """
        precision = self.config.precision
        kernel = self.dt_proj.kernel[...]
        if precision.activations == "compute":
            narrow = precision.compute != precision.wide

            def multiply(x, kernel):
                # As x is: rounding the few pooled tokens would take a kernel longer than TF32's products do.
                mode = jax.lax.Precision.DEFAULT if narrow else precision.lax
                return jnp.matmul(x, kernel.astype(x.dtype), precision=mode)
        else:

            def multiply(x, kernel):
                return product(x, kernel, precision.compute, precision.lax)

        projected = multiply(u, self.x_proj.kernel[...])
        # Rows that `join_directions` adds are zeros; they may be as many as there are columns here.
        delta = multiply(projected[..., : kernel.shape[0]], kernel)
        B, C = jnp.split(projected[..., -2 * self.config.state_size :], 2, axis=-1)
        return delta, B, C

    def scan(self, u: Pooled, D: jax.Array | None = None) -> Pooled:
        """The selective scan over u `b s e`, with the skip D · u if D `e` is given."""
        wide = self.config.precision.wide
        delta, B, C = self.select(u)
        return selective_scan(
            u,
            delta,
            -jnp.exp(self.A_log[...].astype(wide)),
            B,
            C,
            D=D,
            delta_bias=self.dt_proj.bias[...].astype(wide),
            delta_softplus=True,
            reverse=self.reverse,
            implementation=self.config.scan_implementation,
        )


class Mixer(nnx.Module):
    """Bidirectional selective-scan mixer; `pooling` of each call decides what is scanned, and in which order."""

    def __init__(self, config: MixerConfig, *, rngs: nnx.Rngs):
        p = config.precision
        d, e = config.width, config.inner
        self.config = config
        dense: dict[str, Any] = {
            "use_bias": config.proj_bias,
            "dtype": p.compute,
            "param_dtype": p.params,
            "precision": p.lax,
            "rngs": rngs,
        }
        self.in_proj = nnx.Linear(
            d,
            2 * e,
            kernel_init=init.fan_in_uniform(d),
            bias_init=zeros,
            **dense,
        )
        self.forward = ScanDirection(config, reverse=False, rngs=rngs)
        self.backward = ScanDirection(config, reverse=True, rngs=rngs)
        # A ScanDirection instead of the two while a stack runs fused: see `fused_core.join_directions`.
        self.both: Any = nnx.data(None)
        self.post_norm = (
            nnx.data(None)
            if config.post_norm == "none"
            else make_norm(config.post_norm, e, eps=config.norm_eps, precision=p, rngs=rngs)
        )
        self.out_proj = nnx.Linear(
            e,
            d,
            kernel_init=init.fan_in_uniform(e, 1 / math.sqrt(config.depth)),
            bias_init=zeros,
            **dense,
        )
        self.layer_scale = (
            nnx.data(None)
            if config.layer_scale is None
            else nnx.Param(constant(config.layer_scale)(rngs.params(), (d,), p.params))
        )

    def __call__(self, h: Tokens, pooling: Pooling) -> Tokens:
        """h `b l d` in stored order → `b l d`; both float32 or wider, as is everything between the products."""
        precision = self.config.precision
        xz = linear(self.in_proj, h, precision)
        if runs_fused(self, pooling):
            gated = fused_core(self, xz, pooling)
        else:
            x, z = jnp.split(xz, 2, axis=-1)
            x = pooling.to_scan_order(x)
            y = (self.forward(x, pooling) + self.backward(x, pooling)) / 2
            y = pooling.from_scan_order(y)
            if self.post_norm is not None:
                y = keeping_input(self.post_norm, y)
            gated = y * jax.nn.silu(z.astype(y.dtype))
        out = linear(self.out_proj, gated, precision)
        return out if self.layer_scale is None else out * self.layer_scale[...].astype(out.dtype)

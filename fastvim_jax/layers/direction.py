"""Define one direction of the mixer: convolution, pooling, projections to Δ, B and C, selective scan, skip.

    c = silu(conv(x));   u = pool(c);   Δ, B, C = projections of u;   y = unpool(scan(u, Δ, A, B, C)) + D · c

The backward direction visits the same tokens from last to first. Convolution and scan take `reverse=True` for this, so
no flipped copy of the tokens is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import ones, zeros

from fastvim_jax.layers import initializers as init
from fastvim_jax.layers.conv import DepthwiseConv
from fastvim_jax.layers.linear import linear, product
from fastvim_jax.layers.pooling import Pooling
from fastvim_jax.precision import Precision
from fastvim_jax.typing import Inner, Pooled
from pallas_kernels import selective_scan
from pallas_kernels.selective_scan import RANK_MULTIPLE, instead, scan_weights
from pallas_kernels.sharding import cast_parameter

KEPT = "kept of a scan's inputs"
"""Name of the arrays that the backward pass reads where it computes Δ again."""


@dataclass(frozen=True)
class MixerConfig:
    """Hold the sizes and choices of one mixer; `VisionMambaConfig` documents them.

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
        # The projections and A once more, for `projected_scan`: see `prepare_scan`.
        self.scan_weights: Any = nnx.data(None)

    def __call__(self, x: Inner, pooling: Pooling) -> Inner:
        """Scan tokens x `b l e`, in scan order; y `b l e` is in the same order, float32 or wider."""
        precision = self.config.precision
        wide = precision.wide
        # 1) Convolution and SiLU.
        c = self.convolve(x)
        if pooling.every_token:  # Nothing is pooled: the scan itself adds the skip.
            return self.scan(c, D=self.D[...].astype(wide)).astype(wide)
        # 2) Pool the tokens to the scan's steps.
        scores = None if self.score is None else linear(self.score, c, precision)
        u = pooling.pool(c, scores, reverse=self.reverse)
        # 3) Project to Δ, B and C, and scan.
        y = self.scan(u).astype(wide)
        # 4) Repeat each step's result for its tokens, and add the skip.
        D = self.D[...].astype(wide)
        if self.config.unpool == "after_skip":
            return pooling.unpool(y + D * u.astype(wide), reverse=self.reverse)
        return pooling.unpool(y, reverse=self.reverse) + D * c.astype(wide)

    def convolve(self, x: Inner) -> Inner:
        """Apply the convolution and SiLU to the tokens."""
        return jax.nn.silu(x) if self.conv is None else self.conv(x, reverse=self.reverse)

    def select(
        self, u: Pooled, delta: Pooled | None = None, columns: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Project the scan's tokens u to Δ before its bias and softplus `b s e`, B `b s n` and C `b s n`.

        Where Δ and x_proj's `columns` are known already, only gradients are computed; see `projected_scan`.

        Float32 or wider, except for unpooled tokens with activations="compute": Δ is as large as the tokens, so it
        stays in the compute dtype.
        """
        precision = self.config.precision
        kernel = self.dt_proj.kernel[...]
        if precision.activations == "compute":
            narrow = precision.compute != precision.wide

            def multiply(x, kernel):
                # x keeps its dtype: a kernel that rounds the few pooled tokens takes longer than a product in TF32.
                mode = jax.lax.Precision.DEFAULT if narrow else precision.lax
                return jnp.matmul(x, cast_parameter(kernel, x.dtype, x), precision=mode)
        else:

            def multiply(x, kernel):
                return product(x, kernel, precision.compute, precision.lax)

        projected = multiply(u, self.x_proj.kernel[...])
        if columns is not None:
            projected = instead(projected, columns)
        projected = checkpoint_name(projected, KEPT)
        # `pad_rank` may have added rows of zeros to the kernel, up to the number of columns of `projected`.
        step = multiply(projected[..., : kernel.shape[0]], kernel)
        B, C = jnp.split(projected[..., -2 * self.config.state_size :], 2, axis=-1)
        return step if delta is None else instead(step, delta), B, C

    def scan(self, u: Pooled, D: jax.Array | None = None) -> Pooled:
        """Scan u `b s e` and add the skip D · u if D `e` is given."""
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


def stack_directions(
    forward: ScanDirection, backward: ScanDirection, *, axis: int
) -> ScanDirection:
    """Stack the parameters of both directions along a new `axis` of size two, as one module.

    The result is a container of parameters: read them, or map over the new axis, but do not call it.
    """
    graphdef, first = nnx.split(forward)  # nothing that is read there depends on the direction
    stack = lambda *sides: jnp.stack(sides, axis)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(stack, first, nnx.state(backward)))


def prepare_scan(both: ScanDirection) -> ScanDirection:
    """Add `scan_weights`, which one kernel for projections and scans reads, if it is as exact as `select`.

    It rounds the operands of products to TF32, as `select` does where the precision asks for it.
    """
    precision = both.config.precision
    narrow = precision.compute.itemsize < 4
    if precision.wide == jnp.float32 and (
        precision.activations == "compute" if narrow else precision.matmul_precision == "tf32"
    ):
        A = -jnp.exp(both.A_log[...].astype(precision.wide))
        weights = scan_weights(
            both.x_proj.kernel[...], both.dt_proj.kernel[...], both.dt_proj.bias[...], A
        )
        again = weights[:2] if precision.compute == jnp.bfloat16 else ()  # for tokens in bfloat16
        arrays = (*weights, *(w.astype(jnp.bfloat16) for w in again))
        both.scan_weights = nnx.data(tuple(map(nnx.Param, arrays)))
    return both


def pad_rank(both: ScanDirection) -> ScanDirection:
    """Fill up the rank of Δ with zeros, so that x_proj writes rows of whole 16 bytes.

    cuBLAS is twice as fast with such rows: 44 columns of FastVim-T, 88 bytes in bf16, become 48. In half precision
    dt_proj gets zeros for B and C as well and reads whole rows: the longer product costs less than a slice. Beside
    `scan_weights` (call `prepare_scan` first) the rank is that of these, because one kernel writes x_proj's columns.
    """
    out, step = both.x_proj.kernel[...], both.dt_proj.kernel[...]  # `... e r+2n`, `... r e`
    rank, size = step.shape[-2], both.config.precision.compute.itemsize
    missing = -rank % (16 // size if both.scan_weights is None else RANK_MULTIPLE)
    zeros = jnp.zeros((*out.shape[:-1], missing), out.dtype)
    columns = jnp.concatenate([out[..., :rank], zeros, out[..., rank:]], axis=-1)
    below = columns.shape[-1] - rank if size < 4 else missing
    rows = jnp.concatenate(
        [step, jnp.zeros((*step.shape[:-2], below, step.shape[-1]), step.dtype)], axis=-2
    )
    both.x_proj.kernel, both.dt_proj.kernel = nnx.Param(columns), nnx.Param(rows)
    return both

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
from jax.nn.initializers import ones, zeros

from fastvim_jax.layers import initializers as init
from fastvim_jax.layers.conv import DepthwiseConv
from fastvim_jax.layers.linear import linear, product
from fastvim_jax.layers.pooling import Pooling
from fastvim_jax.precision import Precision
from fastvim_jax.typing import Inner, Pooled
from pallas_kernels.selective_scan import bidirectional_scan, scan_weights, selective_scan


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

    def convolve(self, x: Inner) -> Inner:
        """Apply the convolution and SiLU to the tokens."""
        return jax.nn.silu(x) if self.conv is None else self.conv(x, reverse=self.reverse)

    def select(self, u: Pooled) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Project the scan's tokens u to Δ before its bias and softplus `b s e`, B `b s n` and C `b s n`.

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
                return jnp.matmul(x, kernel.astype(x.dtype), precision=mode)
        else:

            def multiply(x, kernel):
                return product(x, kernel, precision.compute, precision.lax)

        projected = multiply(u, self.x_proj.kernel[...])
        # `pad_rank` may have added rows of zeros to the kernel, up to the number of columns of `projected`.
        delta = multiply(projected[..., : kernel.shape[0]], kernel)
        B, C = jnp.split(projected[..., -2 * self.config.state_size :], 2, axis=-1)
        return delta, B, C

    def pool(self, c: Inner, pooling: Pooling) -> Pooled:
        """Pool convolved tokens c to the scan's steps."""
        scores = None if self.score is None else linear(self.score, c, self.config.precision)
        return pooling.pool(c, scores, reverse=self.reverse)

    def scan_inputs(self, u: Pooled) -> dict[str, Any]:
        """Return what `selective_scan` reads beside u: Δ, A, B, C, and the bias of Δ."""
        wide = self.config.precision.wide
        delta, B, C = self.select(u)
        bias = self.dt_proj.bias[...].astype(wide)
        A = -jnp.exp(self.A_log[...].astype(wide))
        return {"delta": delta, "A": A, "B": B, "C": C, "delta_bias": bias}

    def unpool(self, y: Pooled, u: Pooled, c: Inner, pooling: Pooling) -> Inner:
        """Give each token its step's result, and add the skip."""
        wide = self.config.precision.wide
        D = self.D[...].astype(wide)
        if self.config.unpool == "after_skip":
            return pooling.unpool(y + D * u.astype(wide), reverse=self.reverse)
        return pooling.unpool(y, reverse=self.reverse) + D * c.astype(wide)


def scan_directions(
    forward: ScanDirection, backward: ScanDirection, x: Inner, pooling: Pooling
) -> tuple[Inner, Inner]:
    """Scan tokens x `b l e`, in scan order, in both directions.

    Returns:
        y of each direction, `b l e` in the same order, float32 or wider.
    """
    config = forward.config
    wide, name = config.precision.wide, config.scan_implementation
    sides = (forward, backward)
    # 1) Convolution and SiLU.
    convolved = [side.convolve(x) for side in sides]
    if pooling.every_token:
        # Nothing is pooled: the scan itself adds the skip. One direction at a time, so that no long array is reversed.
        first, second = (
            selective_scan(
                c,
                **side.scan_inputs(c),
                D=side.D[...].astype(wide),
                reverse=side.reverse,
                delta_softplus=True,
                implementation=name,
            ).astype(wide)
            for side, c in zip(sides, convolved, strict=True)
        )
        return first, second
    # 2) Pool the tokens to the scan's steps.
    pooled = [side.pool(c, pooling) for side, c in zip(sides, convolved, strict=True)]
    # 3) Project to Δ, B and C, and scan.
    inputs = [side.scan_inputs(u) for side, u in zip(sides, pooled, strict=True)]
    both: dict[str, Any] = {key: jnp.stack([each[key] for each in inputs]) for key in inputs[0]}
    scanned = bidirectional_scan(jnp.stack(pooled), **both, implementation=name)
    # 4) Repeat each step's result for its tokens, and add the skip.
    first, second = (
        side.unpool(y.astype(wide), u, c, pooling)
        for side, y, u, c in zip(sides, scanned, pooled, convolved, strict=True)
    )
    return first, second


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
        both.scan_weights = nnx.data(tuple(map(nnx.Param, weights)))
    return both


def pad_rank(both: ScanDirection) -> ScanDirection:
    """Fill up the rank of Δ with zeros, so that x_proj writes rows of whole 16 bytes.

    cuBLAS is twice as fast with such rows: 44 columns of FastVim-T, 88 bytes in bf16, become 48. In half precision
    dt_proj gets zeros for B and C as well and reads whole rows: the longer product costs less than a slice.
    """
    out, step = both.x_proj.kernel[...], both.dt_proj.kernel[...]  # `... e r+2n`, `... r e`
    rank, size = step.shape[-2], both.config.precision.compute.itemsize
    missing = -rank % (16 // size)
    zeros = jnp.zeros((*out.shape[:-1], missing), out.dtype)
    columns = jnp.concatenate([out[..., :rank], zeros, out[..., rank:]], axis=-1)
    below = columns.shape[-1] - rank if size < 4 else missing
    rows = jnp.concatenate(
        [step, jnp.zeros((*step.shape[:-2], below, step.shape[-1]), step.dtype)], axis=-2
    )
    both.x_proj.kernel, both.dt_proj.kernel = nnx.Param(columns), nnx.Param(rows)
    return both

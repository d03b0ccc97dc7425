"""Mix tokens with the bidirectional state-space mixer of Vim and FastVim.

The `pooling` given to each call decides which of the two models a mixer belongs to: `NoPooling` makes it Vim's,
`GridPooling` FastVim's.

    x, z = in_proj(h)
    per direction:  c = silu(conv(x));  u = pool(c);  Δ, B, C = projections of u
                    y = unpool(scan(u, Δ, A, B, C)) + D · c
    out  = out_proj(norm((y_forward + y_backward) / 2) · silu(z))

Here h are the tokens, x the scanned half and z the gate. The backward direction visits the same tokens from last to
first. Convolution and scan take `reverse=True` for this, so no flipped copy of the tokens is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import constant, zeros
from jaxtyping import Array, Float

from fastvim_jax.layers import initializers as init
from fastvim_jax.layers.cores import program_cores
from fastvim_jax.layers.direction import (
    MixerConfig,
    ScanDirection,
    pad_rank,
    prepare_scan,
    stack_directions,
)
from fastvim_jax.layers.fused_core import fused_core, joined_block, runs_fused
from fastvim_jax.layers.linear import linear
from fastvim_jax.layers.norms import checkpointed_norm, make_norm
from fastvim_jax.layers.pooling import Pooling
from fastvim_jax.layers.ragged_pooling import RaggedPooling
from fastvim_jax.typing import Inner, Keep, Tokens
from pallas_kernels.mixer_core import Projection, Unprojected
from pallas_kernels.sharding import cast_parameter
from pallas_kernels.silu import silu


class Mixer(nnx.Module):
    """Bidirectional selective-scan mixer. The `pooling` of each call decides what is scanned, and in which order."""

    def __init__(self, config: MixerConfig, *, rngs: nnx.Rngs):
        p = config.precision
        d, e = config.width, config.inner  # model width, inner width
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
            2 * e,  # x and z
            kernel_init=init.fan_in_uniform(d),
            bias_init=zeros,
            **dense,
        )
        self.forward = ScanDirection(config, reverse=False, rngs=rngs)
        self.backward = ScanDirection(config, reverse=True, rngs=rngs)
        # Both directions' parameters stacked. Replaces `forward` and `backward` while a stack of blocks runs fused: see
        # `stack_mixer_directions`.
        self.both: Any = nnx.data(None)
        self.post_norm = (
            nnx.data(None)
            if config.post_norm == "none"
            else make_norm(config.post_norm, e, eps=config.norm_eps, precision=p, rngs=rngs)
        )
        # Divide by sqrt(depth), so that the variance of the residual stream does not grow with the number of blocks.
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
        """Mix tokens h `b l d`, given and returned in stored order.

        The result is float32 or wider, and so is everything between the matrix products. With activations="compute" the
        projections return the compute dtype instead.
        """
        if isinstance(pooling, RaggedPooling) and pooling.order is not None:
            # Reorder the tokens before in_proj, where they are d wide. After in_proj they are 2e wide, and an order
            # given as an array moves them in memory.
            return pooling.from_scan_order(self(pooling.to_scan_order(h), pooling.as_stored()))
        precision = self.config.precision
        # 1) Input projection: x is scanned, z gates. 2) to 5) Convolution, pooling, scan, norm and gate.
        if program_cores() > 1 and not runs_fused(self.config, pooling):
            # Two products: while a scan keeps one core of a CPU busy, others compute what is left of z.
            halves = slice(0, self.config.inner), slice(self.config.inner, None)
            x, z = (linear(self.in_proj, h, precision, columns) for columns in halves)
            gated = self._mix(x, z, pooling)
        else:
            gated = self.core(linear(self.in_proj, h, precision), pooling)
        # 6) Output projection.
        out = linear(self.out_proj, gated, precision)
        if self.layer_scale is None:
            return out
        return out * cast_parameter(self.layer_scale[...], out.dtype, out)

    def join(
        self,
        unprojected: Unprojected,
        residual: Tokens,
        pooling: Pooling,
        projection: Projection,
        norm_eps: float,
        keep: Keep | None,
        keep_tokens: bool,
    ) -> tuple[Tokens, Tokens]:
        """Mix normalised tokens, add the result to the residual stream, and apply the next block's norm to the sum.

        See `joined_block`. `unprojected` takes the place of in_proj and its input, `projection` that of out_proj.

        Returns:
            The new residual stream, and its normalised tokens: the input of the next block's in_proj. Both are `b l d`.
        """
        both = self.both or stack_directions(self.forward, self.backward, axis=0)
        norm = self.post_norm
        return joined_block(
            unprojected, residual, pooling, both, norm, projection, norm_eps, keep, keep_tokens
        )

    def core(self, xz: Float[Array, "b l e2"], pooling: Pooling) -> Inner:
        """Run everything between the two projections: xz `b l 2e` → `b l e`.

        The fused kernels compute it in one go where `runs_fused` returns True. Everywhere else the steps below run.
        """
        if runs_fused(self.config, pooling):
            both = self.both or stack_directions(self.forward, self.backward, axis=0)
            return fused_core(xz, pooling, both, self.post_norm)
        x, z = jnp.split(xz, 2, axis=-1)
        return self._mix(x, z, pooling)

    def _mix(self, x: Inner, z: Inner, pooling: Pooling) -> Inner:
        # 2) Bring the tokens into the order of the scan.
        x = pooling.to_scan_order(x)
        # 3) Scan in both directions (`ScanDirection`) and average.
        y = (self.forward(x, pooling) + self.backward(x, pooling)) / 2
        y = pooling.from_scan_order(y)
        # 4) Norm.
        if self.post_norm is not None:
            # The barrier makes XLA write y once. Otherwise its CPU backend computes y, from both directions' tokens,
            # again for each of the norm's three readers. The backward pass saves y in any case.
            y = checkpointed_norm(self.post_norm, jax.lax.optimization_barrier(y))
        # 5) Gate.
        return y * silu(z.astype(y.dtype))


def prepare_blocks(blocks: Any, poolings: Sequence[Pooling]) -> Any:
    """Return stacked blocks whose mixers hold their parameters in the layout that the fused kernels read.

    Blocks that do not run fused are returned as they are. `blocks` itself is never changed.

    Args:
        blocks: a module with a `mixer` whose parameters have a leading `depth` axis.
        poolings: one period of the stack's poolings, for instance over columns and over rows.
    """
    if not all(runs_fused(blocks.mixer.config, pooling) for pooling in poolings):
        return blocks
    prepared = nnx.clone(blocks)
    prepared.mixer = stack_mixer_directions(prepared.mixer)
    return prepared


def stack_mixer_directions(mixers: Mixer) -> Mixer:
    """Stack both directions' parameters, `depth 2 ...`, once for all blocks.

    Otherwise every block launches one GPU kernel per parameter to stack its own.
    """
    stacked = nnx.clone(mixers)
    both = stack_directions(stacked.forward, stacked.backward, axis=1)
    stacked.both = pad_rank(prepare_scan(both))
    del stacked.forward, stacked.backward
    return stacked

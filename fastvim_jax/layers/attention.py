"""Multi-head self-attention and the MLP of a Vision Transformer, with the pooled form of the paper's Table 7."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import truncated_normal, zeros

from fastvim_jax.layers.conv import DepthwiseConv
from fastvim_jax.layers.linear import linear
from fastvim_jax.layers.pooling import Pooling
from fastvim_jax.precision import Precision
from fastvim_jax.typing import Tokens
from pallas_kernels import gpu


def dense(
    features_in: int, features_out: int, *, bias: bool, precision: Precision, rngs: nnx.Rngs
) -> nnx.Linear:
    """Build a linear layer initialised as in DeiT: truncated normal 0.02, bias 0."""
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=bias,
        kernel_init=truncated_normal(0.02),
        bias_init=zeros,
        dtype=precision.compute,
        param_dtype=precision.params,
        precision=precision.lax,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Self-attention over the tokens that `pooling` leaves; its output is repeated for every token."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool,
        conv_width: int,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.heads, self.precision = heads, precision
        self.conv = (
            DepthwiseConv(width, conv_width, bias=True, dtype=precision.params, rngs=rngs)
            if conv_width
            else nnx.data(None)
        )
        self.qkv = dense(width, 3 * width, bias=qkv_bias, precision=precision, rngs=rngs)
        self.proj = dense(width, width, bias=True, precision=precision, rngs=rngs)

    def __call__(self, h: Tokens, pooling: Pooling) -> Tokens:
        """h `b l d` in stored order → `b l d`, float32 or wider."""
        p = self.precision
        x = pooling.to_scan_order(h)
        if self.conv is not None:
            x = self.conv(x, reverse=False)
        qkv = linear(self.qkv, pooling.pool(x), p).astype(p.compute)
        qkv = qkv.reshape(*qkv.shape[:2], 3, self.heads, h.shape[-1] // self.heads)
        attended = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], p)
        y = pooling.from_scan_order(pooling.unpool(jax.lax.collapse(attended, 2, 4)))
        return linear(self.proj, y.astype(p.compute), p)


class Mlp(nnx.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, width: int, hidden: int, *, precision: Precision, rngs: nnx.Rngs):
        self.precision = precision
        self.fc1 = dense(width, hidden, bias=True, precision=precision, rngs=rngs)
        self.fc2 = dense(hidden, width, bias=True, precision=precision, rngs=rngs)

    def __call__(self, h: Tokens) -> Tokens:
        """h `b l d` → `b l d`, float32 or wider."""
        p = self.precision
        hidden = linear(self.fc1, h, p).astype(p.compute)
        return linear(self.fc2, jax.nn.gelu(hidden, approximate=False), p)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, precision: Precision) -> jax.Array:
    """Softmax attention of q, k, v `b l heads width`, scaled by width^-0.5.

    In bfloat16 this is cuDNN's fused kernel where `_cudnn_takes` the heads; otherwise XLA, with the softmax in float32
    or wider.
    """
    if q.dtype == jnp.float64:  # the library's attention would go through float32
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
    mode = "highest" if precision.matmul_precision == "highest" else "default"
    # The library's attention promotes dtypes by itself, which a caller's strict promotion would refuse.
    with jax.default_matmul_precision(mode), jax.numpy_dtype_promotion("standard"):
        if q.dtype == jnp.bfloat16 and q.shape[0] != 0 and _cudnn_takes(q.shape[-1]):
            return _attend_on_gpu(q, k, v)
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def _cudnn_takes(width: int) -> bool:
    """Return whether cuDNN computes attention with heads of this width on the local GPUs.

    It wants an NVIDIA GPU from Ampere on, and whole 8 channels, up to 128 of them (256 on Hopper and newer GPUs).
    """
    default = jax.config.jax_default_device  # a device, the name of a platform, or None
    if getattr(default, "platform", default) == "cpu":
        return False
    capability = gpu.oldest_capability()
    return width % 8 == 0 and capability >= 8.0 and width <= (256 if capability >= 9.0 else 128)


def _attend_on_gpu(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's attention, whose gradient wants an even number of tokens: an odd one gets a token that nobody reads."""
    batch, tokens = q.shape[:2]
    if tokens % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full((batch,), tokens, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v,
        query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn",
    )  # fmt: skip
    return out[:, :tokens]

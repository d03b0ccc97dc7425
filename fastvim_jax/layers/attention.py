"""Multi-head self-attention and the MLP of a Vision Transformer, with the pooled form of the paper's Table 7."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, zeros
from jax.tree_util import Partial
from jaxtyping import Array, Float

from fastvim_jax.layers.conv import DepthwiseConv
from fastvim_jax.layers.gelu import erf, gelu
from fastvim_jax.layers.linear import linear, promote_parameters
from fastvim_jax.layers.pooling import Pooling
from fastvim_jax.precision import Precision
from fastvim_jax.typing import Tokens
from pallas_kernels import gpu
from pallas_kernels.derivatives import differentiated_as
from pallas_kernels.sharding import cast_parameter, mark_varying, varying_axes


def dense(
    features_in: int, features_out: int, *, bias: bool, precision: Precision, rngs: nnx.Rngs
) -> nnx.Linear:
    """Build a linear layer initialised as in DeiT: normal 0.02, cut at ±2 (which is never reached), bias 0."""
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=bias,
        kernel_init=normal(0.02),
        bias_init=zeros,
        dtype=precision.compute,
        param_dtype=precision.params,
        precision=precision.lax,
        promote_dtype=promote_parameters,
        rngs=rngs,
    )


PARTS = ("query", "key", "value")


class Attention(nnx.Module):
    """Self-attention over the pooled tokens. Its output is repeated for the tokens that were pooled."""

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
        """Attend over tokens h `b l d` in stored order; return `b l d`, as `linear` does."""
        y = self._attended(h, pooling, biased=PARTS)
        return linear(self.proj, y, self.precision)

    def without_bias(self, h: Tokens, pooling: Pooling) -> Tokens:
        """Compute `__call__` less `bias`, with fewer passes over the tokens.

        The biases of keys and values are left out. That of the keys adds the same number to all scores of a query,
        which the softmax cancels. That of the values is added to every output, since the weights sum to 1, and so goes
        through `proj` into `bias`.
        """
        return linear(
            self.proj, self._attended(h, pooling, biased=("query",)), self.precision, biased=False
        )

    def bias(self) -> Float[Array, "*stack d"]:
        """Return what `without_bias` leaves out of every token, float32 or wider; also for stacked layers."""
        wide = self.precision.wide
        assert self.proj.bias is not None
        bias = self.proj.bias[...].astype(wide)
        if self.qkv.bias is None:
            return bias
        values = self.qkv.bias[..., 2 * bias.shape[-1] :].astype(wide)
        kernel = self.proj.kernel[...].astype(wide)
        return bias + jnp.einsum("...d,...de->...e", values, kernel, precision="highest")

    def _attended(self, h: Tokens, pooling: Pooling, *, biased: Sequence[str]) -> Tokens:
        """Return the input of `proj` in the compute dtype, `b l d`."""
        p = self.precision
        x = pooling.to_scan_order(h)
        if self.conv is not None:
            x = self.conv(x, reverse=False)
        q, k, v = self._query_key_value(pooling.pool(x), biased)
        if padding := getattr(pooling, "padding", 0):
            k, v = _padded_keys(padding, k), _padded_keys(padding, v)
        attended = attend(q, k, v, p, padding)
        y = pooling.from_scan_order(pooling.unpool(jax.lax.collapse(attended, 2, 4)))
        return y.astype(p.compute)

    def _query_key_value(self, x: Tokens, biased: Sequence[str]) -> list[jax.Array]:
        """Return q, k and v `b l heads width` in the compute dtype; which have their bias is up to `biased`.

        With activations="compute" each has a product of its own, because cuDNN wants them apart: to copy them out of
        one result takes longer than the product. The barrier keeps XLA from joining the products again.
        """
        p, width = self.precision, x.shape[-1]
        if p.activations == "compute":
            inputs = jax.lax.optimization_barrier((x, x, x))
            found = [
                linear(
                    self.qkv,
                    each,
                    p,
                    columns=slice(i * width, (i + 1) * width),
                    biased=name in biased,
                )
                for i, (name, each) in enumerate(zip(PARTS, inputs, strict=True))
            ]
        else:
            found = jnp.split(linear(self.qkv, x, p).astype(p.compute), 3, axis=-1)
        return [part.reshape(*x.shape[:2], self.heads, width // self.heads) for part in found]


class Mlp(nnx.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, width: int, hidden: int, *, precision: Precision, rngs: nnx.Rngs):
        self.precision = precision
        self.fc1 = dense(width, hidden, bias=True, precision=precision, rngs=rngs)
        self.fc2 = dense(hidden, width, bias=True, precision=precision, rngs=rngs)

    def __call__(self, h: Tokens) -> Tokens:
        """Apply the MLP to tokens h `b l d`; return `b l d`, as `linear` does."""
        return linear(self.fc2, self._hidden(h), self.precision)

    def without_bias(self, h: Tokens) -> Tokens:
        """Compute `__call__` less the bias of the second layer."""
        return linear(self.fc2, self._hidden(h), self.precision, biased=False)

    def _hidden(self, h: Tokens) -> Float[Array, "b l hidden"]:
        p = self.precision
        if p.activations == "compute":
            assert self.fc1.bias is not None
            hidden = linear(self.fc1, h, p, biased=False)
            return _gelu(hidden, cast_parameter(self.fc1.bias[...], p.wide, hidden))
        return gelu(linear(self.fc1, h, p).astype(p.compute))


@jax.checkpoint
def _gelu(x: Float[Array, "*rows d"], bias: Float[Array, " d"]) -> Float[Array, "*rows d"]:
    """Compute GELU(x + bias) in float32 and round the result to the dtype of x; save only x for the gradient.

    x is what the product wrote, so that no other array of its size is written for the gradient. By erf, as PyTorch
    does: `jax.nn.gelu` takes erfc, which is exact where Φ is below 1e-6, and slower.
    """
    wide = x.astype(bias.dtype) + bias
    return (0.5 * wide * (1 + erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, precision: Precision, padding: int = 0
) -> jax.Array:
    """Compute softmax attention of q, k, v `b l heads width`, scaled by width^-0.5, to all but the last `padding` keys.

    In bfloat16 this is cuDNN's fused kernel if the program is lowered for CUDA and cuDNN takes the heads. Otherwise it
    is XLA, with the softmax in float32 or wider.
    """
    if q.dtype == jnp.float64:  # the library's attention would go through float32
        k, v = k[:, : k.shape[1] - padding], v[:, : v.shape[1] - padding]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
    mode = "highest" if precision.matmul_precision == "highest" else "default"
    length, width = q.shape[1], q.shape[-1]
    tokens = length - padding
    known = all(isinstance(size, int) for size in q.shape) and q.shape[0] != 0
    if q.dtype != jnp.bfloat16 or not known or _cudnn_refusal(width) is not None:
        return _attend_in_xla(mode, tokens, q, k, v)
    by_platform = functools.partial(_attend_by_platform, mode, tokens)
    if length % 2 == 0:
        return by_platform(q, k, v)

    def padded(*qkv: jax.Array) -> jax.Array:
        """Add a token that is masked, because cuDNN's gradient needs an even number of tokens."""
        return by_platform(*(jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in qkv))[:, :length]

    return differentiated_as(padded, by_platform, q, k, v)


def _cudnn_refusal(width: int) -> str | None:
    """Return why cuDNN cannot compute attention with heads of this width on the GPUs at hand, or None if it can."""
    off = gpu.switched_off()
    if off is not None:
        return off
    capability = gpu.lowering_capability()
    if capability < 8.0:
        return gpu.NO_GPU if not capability else "the GPU is older than Ampere"
    reason = _refusal(width, capability)
    if reason is not None:
        gpu.log_once(f"attention: using XLA and not cuDNN, since {reason}")
    return reason


@functools.cache
def _refusal(width: int, capability: float) -> str | None:
    del capability  # part of the cache's key: JAX's checks ask the device
    tokens = jax.ShapeDtypeStruct((1, 2, 1, width), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(_attend_on_gpu, 2), tokens, tokens, tokens)
    except (NotImplementedError, RuntimeError) as error:
        return str(error)
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_by_platform(
    mode: str, tokens: int, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """Attend to the first `tokens` keys, with cuDNN if the program is lowered for CUDA and with XLA elsewhere.

    It has its own derivative rule, because JAX's rule for a choice saves what any of the branches needs: the
    attention weights `b heads l l` of XLA's branch also on CUDA.
    """
    return jax.lax.platform_dependent(
        q, k, v,
        cuda=functools.partial(_attend_on_gpu, tokens),
        default=functools.partial(_attend_in_xla, mode, tokens),
    )  # fmt: skip


def _forward(mode, tokens, q, k, v):
    """Save q, k and v, and what else cuDNN's gradient needs: the output and `b heads l` sums."""
    structure: Any = None
    varying: list[bool] = []

    def on_gpu(*qkv):
        nonlocal structure, varying
        out, pull = jax.vjp(functools.partial(_attend_on_gpu, tokens), *qkv)
        leaves, tree = jax.tree.flatten(pull)
        known = [next((i for i, x in enumerate(qkv) if x is leaf), None) for leaf in leaves]
        structure = (tree, known)
        saved = [leaf for leaf, at in zip(leaves, known, strict=True) if at is None]
        varying = [bool(varying_axes(leaf)) for leaf in saved]  # not the numbers of keys
        return out, saved

    def in_xla(*qkv):
        zeros = [jnp.zeros(x.shape, x.dtype) for x in shapes]
        saved = [mark_varying(x, qkv) if v else x for x, v in zip(zeros, varying, strict=True)]
        return _attend_in_xla(mode, tokens, *qkv), saved

    shapes = jax.eval_shape(on_gpu, q, k, v)[1]
    out, saved = jax.lax.platform_dependent(q, k, v, cuda=on_gpu, default=in_xla)
    return out, (q, k, v, Partial(functools.partial(_pull_on_gpu, *structure), saved))


def _pull_on_gpu(tree: Any, known: list[int | None], saved, qkv, out_bar) -> Any:
    rest = iter(saved)
    leaves = [next(rest) if at is None else qkv[at] for at in known]
    return jax.tree.unflatten(tree, leaves)(out_bar)


def _backward(mode, tokens, residuals, out_bar):
    *qkv, pull = residuals

    def in_xla(pull, qkv, out_bar):
        del pull
        return jax.vjp(functools.partial(_attend_in_xla, mode, tokens), *qkv)[1](out_bar)

    return jax.lax.platform_dependent(
        pull, qkv, out_bar, cuda=lambda pull, *arrays: pull(*arrays), default=in_xla
    )


_attend_by_platform.defvjp(_forward, _backward)


def _attend_in_xla(mode: str, tokens: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    # The library's attention promotes dtypes by itself, which a caller's strict promotion would refuse.
    with jax.default_matmul_precision(mode), jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, implementation="xla", **_lengths(tokens, q))


def _attend_on_gpu(tokens: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **_lengths(tokens, q))
    return mark_varying(out, (q, k, v))


def _lengths(tokens: Any, q: jax.Array) -> dict[str, Any]:
    """Return the arguments that mask keys from number `tokens` on, if there are any.

    Queries are not masked, because cuDNN may leave the outputs of masked queries unwritten.
    """
    if tokens == q.shape[1]:
        return {}
    return {"key_value_seq_lengths": jnp.full((q.shape[0],), tokens, jnp.int32)}


def pads_for_gradient(precision: Precision, tokens: int, width: int) -> bool:
    """Return whether the gradient of `attend` would pad each of its arrays by a token here.

    It is faster to pad the tokens once before all blocks, by `NoPooling`'s padding.
    """
    halves = precision.compute == jnp.bfloat16
    return halves and tokens % 2 == 1 and _cudnn_refusal(width) is None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _padded_keys(padding: int, x: jax.Array) -> jax.Array:
    """Return keys or values of which the last `padding` are masked; their gradient is 0, whatever cuDNN writes."""
    del padding
    return x


_padded_keys.defvjp(
    lambda padding, x: (x, None),
    lambda padding, _, x_bar: (x_bar.at[:, x_bar.shape[1] - padding :].set(0),),
)

"""Define `sequence_core`, the core of mixers that pool nothing: check its arguments, and differentiate it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.dtypes import wide_dtype
from pallas_kernels.mixer_core import sequence_xla
from pallas_kernels.mixer_core.checks import CheckedMiddle, check_arrays, expect_norm_kind
from pallas_kernels.mixer_core.narrow import Narrowed, missing_channels, widen_call
from pallas_kernels.mixer_core.sequence_xla import Convolutions
from pallas_kernels.mixer_core.types import Norm
from pallas_kernels.sharding import match_types, on_cuda, per_shard
from pallas_kernels.trial import Trial

IMPLEMENTATIONS = ("auto", "pallas", "xla")


def sequence_core(
    xz: Float[Array, "b l e2"],
    convolutions: Convolutions,
    norm: Norm,
    middle_params: Any,
    *,
    middle: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]],
    eps: float = 1e-5,
    norm_kind: str = "layer",
    implementation: str = "auto",
) -> Float[Array, "b l e"]:
    """Compute everything of a bidirectional Vim mixer between its two projections.

        x, z = halves of xz;   c_d = silu(conv_d(x))
        y = middle(middle_params, c)                    the projections of c, the scans and their skips
        out = LayerNorm((y_f + y_b) / 2) · silu(z)

    Here d is one of the two directions. The convolution of the second direction looks ahead. On Hopper GPUs one kernel
    before and one after the scans read and write memory once, forward and backward. Reverse-mode differentiation works;
    where kernels run, only once. The forward pass saves xz, both y, and what `middle` saves (its scans save both c).

    Under a sharded `jit`, every device works on its share of b. Axes other than b are gathered, because the LayerNorm
    needs all channels of a token.

    Args:
        xz: tokens in the order of the scan, x and z one after the other on the channel axis; bfloat16 to float64.
        convolutions: of both directions. The last tap meets the current token.
        norm: LayerNorm over the channels.
        middle_params: pytree passed to `middle`; gradients flow to it.
        middle: function (middle_params, c) -> (y_f, y_b). c `2 b l e`, in xz's dtype, holds both directions; y_f and
            y_b are `b l e` and are rounded to xz's dtype. The function must not close over tracers.
        eps: epsilon of the norm.
        norm_kind: "layer", "rms" or "none", see `mixer_core`.
        implementation: "pallas" (kernels), "xla", or "auto": kernels if the program is lowered for a Hopper or newer
            GPU, otherwise XLA.

    Returns:
        The input of out_proj, `b l e` in xz's dtype.

    Raises:
        ValueError: shapes do not fit, also those that `middle` returns, or implementation is unknown.
        NotImplementedError: implementation is "pallas", but the kernels cannot run here.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"sequence_core: implementation must be one of {IMPLEMENTATIONS}; got {implementation!r}"
        )
    expect_norm_kind("sequence_core", norm_kind)
    xz = check_arrays("sequence_core", xz, *convolutions, norm)
    if xz.shape[0] == 0:  # no kernel takes an empty batch
        return jnp.zeros((*xz.shape[:2], xz.shape[2] // 2), xz.dtype)
    width = xz.shape[2] // 2
    padding = missing_channels(width)
    wide = functools.partial(widen_call, padding=padding)
    rounded = _Rounded(CheckedMiddle("sequence_core", middle), xz.dtype)

    def run(xz, convolutions, norm):
        always = _Stages("always", float(eps), padding, norm_kind)
        return _core(
            always, _Rounded(lambda _, c: (c[0], c[1]), xz.dtype), xz, convolutions, norm, ()
        )

    like = jax.eval_shape(wide, xz, convolutions, norm)
    trial = Trial(run, like, (float(eps), padding, norm_kind))
    kernels = _kernels(implementation, like[0], like[1], trial)
    if kernels == "never":
        stages = _Stages(kernels, float(eps), 0, norm_kind)
        y = rounded(middle_params, stages.front(xz, convolutions))
        return stages.back(xz, y, norm)
    stages = _Stages(kernels, float(eps), padding, norm_kind)
    on_wide = Narrowed(rounded, padding) if padding else rounded
    xz, convolutions, norm = wide(xz, convolutions, norm)
    return _core(stages, on_wide, xz, convolutions, norm, middle_params)[..., :width]


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """Apply `middle`, and round its results to one dtype."""

    middle: Callable
    dtype: Any

    def __call__(self, params, c):
        forward, backward = self.middle(params, c)
        return forward.astype(self.dtype), backward.astype(self.dtype)


# Dimensions of the operands and results of every stage. Devices split b and nothing else.
_XZ, _TOKENS, _PAIR, _BOTH = "b l w", "b l e", ("b l e", "b l e"), "d b l e"
_CONVOLUTIONS = Convolutions("d k e", "d e")  # type: ignore[arg-type]
_NORM = Norm("e", "e")  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class _Stages:
    """Run the four stages on each device's share of the batch; kernels run "always", "on CUDA" or "never"."""

    kernels: str
    eps: float
    padding: int
    norm_kind: str

    def front(self, xz, convolutions):
        return self._run("front", (_XZ, _CONVOLUTIONS), _BOTH)(xz, convolutions)

    def back(self, xz, y, norm):
        return self._run("back", (_XZ, _PAIR, _NORM), _TOKENS, **self._of_norm)(xz, y, norm)

    def back_gradients(self, xz, y, norm, out_bar):
        dims = (_XZ, _PAIR, _NORM, _TOKENS), (_TOKENS, _XZ, _NORM)
        return self._run("back_gradients", *dims, **self._of_norm)(xz, y, norm, out_bar)

    def front_gradients(self, xz, c_bar, xz_bar, convolutions):
        dims = (_XZ, _BOTH, _XZ, _CONVOLUTIONS), (_XZ, _CONVOLUTIONS)
        return self._run("front_gradients", *dims)(xz, c_bar, xz_bar, convolutions)

    @property
    def _of_norm(self) -> dict[str, Any]:
        return {"eps": self.eps, "padding": self.padding, "norm_kind": self.norm_kind}

    def _run(self, name: str, operands: Any, results: Any, **options: Any) -> Callable:
        plain = functools.partial(getattr(sequence_xla, name), **options)
        if self.kernels == "never":
            return per_shard(
                lambda _, *arrays: plain(*arrays), operands, results, split="b", opaque=False
            )
        from pallas_kernels.mixer_core import mosaic_sequence

        kernel = functools.partial(getattr(mosaic_sequence, name), **options)

        def either(_, *arrays):
            if self.kernels == "always":
                return kernel(*arrays)
            return on_cuda(kernel, plain, *arrays)

        return per_shard(either, operands, results, split="b", opaque=True)


def _kernels(name: str, xz, convolutions, trial: Trial) -> str:
    """Return where the stages run as kernels: "always", "on CUDA" or "never"."""

    def unsupported():
        from pallas_kernels.mixer_core import mosaic_sequence

        return mosaic_sequence.unsupported(xz, convolutions)

    runs = gpu.choose(name, "sequence_core", unsupported, trial)
    return "never" if not runs else "always" if name == "pallas" else "on CUDA"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _core(stages, middle, xz, convolutions, norm, middle_params):
    y = middle(middle_params, stages.front(xz, convolutions))
    return stages.back(xz, y, norm)


def _forward(stages, middle, xz, convolutions, norm, middle_params):
    c = stages.front(xz, convolutions)
    y, pull = jax.vjp(middle, middle_params, c)
    return stages.back(xz, y, norm), (xz, y, pull, convolutions, norm)


def _backward(stages, middle, residuals, out_bar):
    xz, y, pull, *weights = residuals
    # Sums over devices are in float32 or wider.
    convolutions, norm = jax.tree.map(lambda w: w.astype(wide_dtype(w.dtype)), weights)
    y_bar, xz_bar, norm_bar = stages.back_gradients(xz, y, norm, out_bar)
    middle_bar, c_bar = pull((y_bar, y_bar))
    xz_bar, convolutions_bar = stages.front_gradients(xz, c_bar, xz_bar, convolutions)
    return match_types(xz_bar, xz), *match_types([convolutions_bar, norm_bar], weights), middle_bar


_core.defvjp(_forward, _backward)

"""Define `mixer_block`: a FastVim mixer with or without in_proj, the residual sum, and the next block's RMSNorm."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.checks import as_floats, expect_counts, expect_shape
from pallas_kernels.mixer_core import xla
from pallas_kernels.mixer_core.api import (
    DIRECTIONS,
    IMPLEMENTATIONS,
    METHODS,
    NORM,
    POOLED,
    Saved,
    Stages,
    core_gradients,
    mixer_core,
)
from pallas_kernels.mixer_core.checks import check_arrays
from pallas_kernels.mixer_core.types import CoreOptions, Directions, Norm
from pallas_kernels.sharding import cast_parameter, on_cuda, per_shard


class Projection(NamedTuple):
    """Hold the parameters after the mixer's core: out_proj's kernel, transposed, and the scale of the next RMSNorm."""

    weight: Float[Array, "o e"]
    gain: Float[Array, " o"]


class Unprojected(NamedTuple):
    """Hold the factors of xz: the mixer's tokens, and in_proj's kernel, transposed. in_proj has no bias."""

    tokens: Float[Array, "b l i"]
    weight: Float[Array, "e2 i"]

    def projected(self) -> Float[Array, "b l e2"]:
        """Compute xz in the tokens' dtype."""
        tokens = self.tokens
        return jnp.matmul(tokens, cast_parameter(self.weight, tokens.dtype, tokens).T)


def mixer_block(
    xz: Float[Array, "b l e2"] | Unprojected,
    residual: Float[Array, "b l o"],
    directions: Directions,
    norm: Norm,
    projection: Projection,
    middle_params: Any,
    *,
    middle: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]],
    rows: int,
    columns: int,
    transposed: bool = False,
    per_position: int = 1,
    method: str = "mean",
    scale: float = 1.0,
    eps: float = 1e-5,
    norm_eps: float = 1e-6,
    keep: Float[Array, " b"] | None = None,
    keep_tokens: bool = True,
    pooled_dtype: Any = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "b l o"], Float[Array, "b l o"]]:
    """Compute everything between in_proj of one block and in_proj of the next.

        g        = mixer_core(xz)
        residual = residual + keep · g · weight^T                   rounded to the dtype of `residual`
        normed   = residual / sqrt(mean over o of residual² + norm_eps) · gain

    On Hopper GPUs, and only there, one kernel computes the three lines from the scans' outputs: g and the product never
    exist in memory; the kernel of the core's gradients computes g once more. One more kernel computes the gradient of
    residual sum and norm. The kernels run where `block_unsupported` returns None. What the first kernel does not cover,
    such as more than 384 channels, is computed by `mixer_core`, a product, and a kernel for residual sum and norm (by
    XLA if the residual's channels are no multiple of 128). Everywhere else `mixer_core` and XLA compute the same step
    by step. A product by XLA is rounded to xz's dtype before it is added; the first kernel does not round it.

    Given `Unprojected`, one more kernel computes xz and the pooled tokens together on Hopper GPUs, where
    `project_front_unsupported` returns None for a device's share of the batch.

    Args:
        xz: see `mixer_core`, or `Unprojected`.
        residual: residual stream. Its sum is computed in float32 or wider, and the norm reads the rounded sum.
        projection: float parameters; the weight is rounded to xz's dtype.
        norm_eps: epsilon of the RMSNorm.
        keep: one factor for each image, as drop path draws them; no gradient flows to it. None for 1.
        keep_tokens: whether the gradient keeps the tokens of `Unprojected`. If not, they must be what this function
            would return for `residual`, normalised with a gain of ones; the gradient keeps `residual` in their place,
            which the block before keeps as well, and normalises it once more.
        pooled_dtype: of the pooled tokens that `middle` gets where the kernels run and nothing is differentiated;
            float32 by default, and for a gradient. Only of method "mean".
        implementation: "pallas" (the kernel), "xla", or "auto": the kernels if the program is lowered for a Hopper GPU,
            otherwise `mixer_core` and XLA.
        directions, norm, middle_params, middle, rows, columns, transposed, per_position, method, scale, eps: see
            `mixer_core`.

    Returns:
        The new residual stream in the dtype of `residual`, and the normalised tokens in xz's dtype.

    Raises:
        ValueError: shapes do not fit, or implementation is unknown.
        NotImplementedError: implementation is "pallas", but the kernel cannot run here.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"mixer_block: implementation must be one of {IMPLEMENTATIONS}; got {implementation!r}"
        )
    if method not in METHODS:
        raise ValueError(f"mixer_block: method must be one of {METHODS}; got {method!r}")
    expect_counts("mixer_block", rows=rows, columns=columns, per_position=per_position)
    given = xz
    if isinstance(given, Unprojected):
        _check_unprojected(given, 2 * directions.kernels.shape[-1])
        xz = given.projected()  # Dead code where the kernel runs.
    xz = check_arrays("mixer_block", xz, directions[0], directions[1], norm, directions[2])
    if xz.shape[1] != rows * columns * per_position:
        size = f"{rows} x {columns}" + (f" x {per_position}" if per_position > 1 else "")
        raise ValueError(f"mixer_block: xz {xz.shape} (b l 2e) must hold {size} tokens")
    outputs = residual.shape[-1]
    beside = f"xz {xz.shape} (b l 2e)"
    for name, x, letters, shape in (
        ("residual", residual, "b l o", (*xz.shape[:2], outputs)),
        ("the projection's weight", projection.weight, "o e", (outputs, xz.shape[2] // 2)),
        ("the gain", projection.gain, "o", (outputs,)),
    ):
        expect_shape("mixer_block", name, x, letters, shape, beside)
    if pooled_dtype is not None:
        pooled_dtype = jnp.dtype(pooled_dtype)
        if method != "mean":
            raise ValueError(f"mixer_block: pooled_dtype is of the method mean, not {method}")
    options = CoreOptions(
        rows, columns, transposed, float(scale), float(eps), method,
        per_position=per_position, pooled_dtype=pooled_dtype,
    )  # fmt: skip
    keep_tokens = keep_tokens or not isinstance(given, Unprojected)
    call = _Call(middle, options, float(norm_eps), keep_tokens, implementation)
    if keep is not None:
        expect_shape("mixer_block", "keep", keep, "b", xz.shape[:1], beside)
        keep = lax.stop_gradient(keep.astype(xla.at_least_float32(residual.dtype)))
    arrays = (residual, directions, norm, projection, keep, middle_params)
    by_name = implementation == "pallas"

    def reason():
        return _unsupported(xz, residual, directions.kernels, options, by_name=by_name)

    runs = gpu.choose(implementation, "mixer_block", reason)
    if not runs:
        return call.step_by_step(xz, *arrays)
    return _fused(call, given if isinstance(given, Unprojected) else xz, *arrays)


def _check_unprojected(given: Unprojected, width: int) -> None:
    tokens = as_floats("mixer_block", "tokens", given.tokens, "b l i")
    weight = as_floats("mixer_block", "in_proj's weight", given.weight, "2e i")
    beside = f"tokens {tokens.shape} (b l i) and convolutions of {width // 2} channels"
    shape = (width, tokens.shape[2])
    expect_shape("mixer_block", "in_proj's weight", weight, "2e i", shape, beside)


def block_unsupported(
    xz: Any,
    residual: Any,
    kernels: Any,
    *,
    rows: int,
    columns: int,
    transposed: bool,
    method: str,
    per_position: int = 1,
) -> str | None:
    """Return why `mixer_block` of such arrays runs step by step here, or None.

    Args:
        xz, residual, kernels: as for `mixer_block` (`directions.kernels`), or their `jax.ShapeDtypeStruct`.
        rows, columns, transposed, method, per_position: see `mixer_block`.
    """
    options = CoreOptions(rows, columns, transposed, 1.0, 1e-5, method, per_position=per_position)
    missing = gpu.kernels_missing()
    return missing or _unsupported(xz, residual, kernels, options, by_name=False)


def _unsupported(xz, residual, kernels, options: CoreOptions, *, by_name: bool) -> str | None:
    """Return why the block does not run joined to the next norm, or None; `by_name` if "pallas" was asked for."""
    from pallas_kernels.mixer_core import mosaic

    return (
        gpu.wgmma_missing()
        or mosaic.unsupported(xz, kernels, (), options)
        or mosaic.block_unsupported(xz, residual, kernels, options, by_name=by_name)
    )


class _Call(NamedTuple):
    """Everything of one call that is not an array."""

    middle: Callable
    options: CoreOptions
    norm_eps: float
    keep_tokens: bool
    implementation: str

    @property
    def stages(self) -> Stages:
        """The kernels of `mixer_core`."""
        return Stages(always=self.implementation == "pallas")

    @property
    def differentiated(self) -> _Call:
        """The same call with float32 pooled tokens, of which alone there are gradients."""
        return self._replace(options=dataclasses.replace(self.options, pooled_dtype=None))

    def step_by_step(self, xz, residual, directions, norm, projection, keep, middle_params):
        """Compute the block with the kernels of `mixer_core`, where they run, and XLA."""
        options = self.options
        if isinstance(xz, Unprojected):
            xz = xz.projected()
        g = mixer_core(
            xz,
            directions,
            norm,
            middle_params,
            middle=self.middle,
            rows=options.rows,
            columns=options.columns,
            transposed=options.transposed,
            per_position=options.per_position,
            method=options.method,
            scale=options.scale,
            eps=options.eps,
            implementation=self.implementation,
        )
        weight, gain = projection
        return xla.add_and_normalise(g, residual, weight, gain, keep, self.norm_eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(call: _Call, xz, residual, directions, norm, projection, keep, middle_params):
    xz, skip, u, _ = _front(call, xz, directions, residual.shape[-1])
    y = call.middle(middle_params, u)
    return _project(call, xz, skip, y, residual, norm, projection, keep)


def _forward(call, given, residual, directions, norm, projection, keep, middle_params):
    call = call.differentiated
    xz, skip, u, places = _front(call, given, directions)
    y, pull = jax.vjp(call.middle, middle_params, u)
    weights = (norm, projection, keep)
    total, normed = _project(call, xz, skip, y, residual, *weights)
    unprojected = given if isinstance(given, Unprojected) else None
    if not call.keep_tokens:
        unprojected = given._replace(tokens=residual)
    core = Saved(xz, skip, y, places, pull)
    return (total, normed), (unprojected, core, total, directions, *weights)


def _backward(call, saved, bars):
    call = call.differentiated
    unprojected, core, total, directions, norm, projection, keep = saved
    total_bar, normed_bar = bars
    weight, gain = projection
    # 1) The residual sum and the RMSNorm. `residual_bar` is the gradient of both terms of the sum.
    residual_bar, update_bar = _norm_gradient(call, total_bar, normed_bar, total, gain, keep)
    normalise = lambda gain: xla.rms_norm(total, gain, call.norm_eps, core.skip.dtype)  # noqa: E731
    (gain_bar,) = jax.vjp(normalise, gain)[1](normed_bar)  # Dead code where the gain is constant.
    # 2) The output projection's input g.
    (g_bar,) = jax.linear_transpose(lambda g: xla.project(g, weight), core.skip)(update_bar)
    # 3) The core, which computes g once more: to keep both g and the skips would take memory.
    *core_bars, g = core_gradients(
        call.stages, call.options, core, directions, norm, (), g_bar, with_g=True
    )
    xz_bar, directions_bar, norm_bar, middle_bar = core_bars
    (weight_bar,) = jax.linear_transpose(lambda weight: xla.project(g, weight), weight)(update_bar)
    # 4) The input projection.
    if unprojected is not None:
        if not call.keep_tokens:
            ones = jnp.ones(total.shape[-1], xla.at_least_float32(total.dtype))
            tokens = xla.rms_norm(unprojected.tokens, ones, call.norm_eps, core.skip.dtype)
            unprojected = unprojected._replace(tokens=tokens)
        _, pull_xz = jax.vjp(Unprojected.projected, unprojected)
        (xz_bar,) = pull_xz(xz_bar)
    projection_bar = Projection(weight_bar, gain_bar)
    keep_bar = None if keep is None else jnp.zeros_like(keep)
    return xz_bar, residual_bar, directions_bar, norm_bar, projection_bar, keep_bar, middle_bar


_fused.defvjp(_forward, _backward)


def _front(call: _Call, xz, directions, outputs: int | None = None):
    """Return xz, the skips, the pooled tokens and, with "max", the places of the maxima.

    With `outputs`, the width of the residual stream, z may take the place of xz: no gradient will read x.
    """
    if isinstance(xz, Unprojected):
        if call.options.method == "mean":
            return *_project_front(call, *xz, directions, outputs), ()
        xz = xz.projected()
    u, skip, places = call.stages.front(xz, directions, (), call.options)
    return xz, skip, u, places


def _project_front(call: _Call, tokens, weight, directions, outputs):
    """Return xz or z, the skips and the pooled tokens: by kernels if the program is lowered for CUDA, else by XLA."""
    from pallas_kernels.mixer_core import mosaic

    with_x = outputs is None or mosaic.reads_x(tokens, directions.kernels, outputs, call.options)
    static: dict[str, Any] = {"options": call.options, "with_x": with_x}
    kernel: Callable = functools.partial(mosaic.project_front, **static)
    other: Callable = functools.partial(_xla_project_front, **static)
    operands = ("b l i", "w i", DIRECTIONS)
    results = ("b l c", "b l e", "d b s e")
    return _on_shares(call, kernel, other, operands, results, (tokens, weight, directions))


def _xla_project_front(tokens, weight, directions, options, with_x):
    xz = Unprojected(tokens, weight).projected()
    x, z = jnp.split(xz, 2, axis=-1)
    u, skip, _ = xla.front(x, directions, (), options)
    return xz if with_x else z, skip, u


def _project(call: _Call, xz, skip, y, residual, norm, projection, keep):
    """Return the residual stream and its normalised tokens, by the kernel or by XLA."""
    from pallas_kernels.mixer_core import mosaic

    static: dict[str, Any] = {"options": call.options, "norm_eps": call.norm_eps}
    kernel: Callable = functools.partial(mosaic.back_project, **static)
    other: Callable = functools.partial(_xla_project, **static)
    tokens = "b l o"
    projected = Projection("o e", "o")  # type: ignore[arg-type]
    kept = None if keep is None else "b"
    operands = ("b l w", "b l e", POOLED, tokens, NORM, projected, kept)
    arrays = (xz, skip, y, residual, norm, projection, keep)
    return _on_shares(call, kernel, other, operands, (tokens, tokens), arrays)


def _norm_gradient(call: _Call, total_bar, normed_bar, total, gain, keep):
    """Return the gradient of the residual sum, as it is and rounded: by the kernel or by XLA."""
    from pallas_kernels.mixer_core import mosaic

    kernel: Callable = functools.partial(mosaic.norm_gradient, norm_eps=call.norm_eps)
    other: Callable = functools.partial(xla.norm_gradient, eps=call.norm_eps)
    tokens = "b l o"
    arrays = (total_bar, normed_bar, total, gain, keep)
    operands = (*[tokens] * 3, "o", None if keep is None else "b")
    return _on_shares(call, kernel, other, operands, (tokens, tokens), arrays)


def _on_shares(call: _Call, kernel: Callable, other: Callable, operands, results, arrays):
    """Run the kernel on each device's share of the batch if the program is lowered for CUDA, otherwise the other."""

    def on_share(_, *arrays):
        always = call.implementation == "pallas"
        return kernel(*arrays) if always else on_cuda(kernel, other, *arrays)

    return per_shard(on_share, operands, results, split="b", opaque=True)(*arrays)


def _xla_project(xz, skip, y, residual, norm, projection, keep, options, norm_eps):
    z = xz[..., -skip.shape[-1] :]
    g = xla.gate(xla.mix(skip, y, (), options), z, norm, options)
    weight, gain = projection
    return xla.add_and_normalise(g, residual, weight, gain, keep, norm_eps)

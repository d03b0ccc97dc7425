"""Define what the mixer core computes, in plain JAX. Every platform without kernels runs this."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_conv1d import xla as conv1d
from pallas_kernels.dtypes import wide_dtype
from pallas_kernels.mixer_core.narrow import on_channels
from pallas_kernels.mixer_core.types import CoreOptions, Directions, Norm, RowIds, Visit
from pallas_kernels.moves import gather_tokens
from pallas_kernels.sharding import cast_parameter

Places = tuple[Int[Array, "b s e"], Int[Array, "b s e"]] | tuple[()]  # forward, backward


def _swap(x: jax.Array, first: int, options: CoreOptions) -> jax.Array:
    """Transpose tokens from stored order to scan order, or back; ``first`` is the number of rows before that."""
    if not options.transposed:
        return x
    shape = (
        x.shape[0],
        first,
        x.shape[1] // (first * options.per_position),
        options.per_position,
        x.shape[-1],
    )
    return x.reshape(shape).swapaxes(1, 2).reshape(x.shape)


def _on_lines(x: jax.Array, options: CoreOptions) -> jax.Array:
    """Reshape tokens in scan order to ``b lines positions per_position e``."""
    return x.reshape(
        x.shape[0], options.lines, options.positions, options.per_position, x.shape[-1]
    )


def _steps(x: jax.Array) -> jax.Array:
    """Reshape pooled tokens ``b lines per_position e`` to ``b s e``."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _convolved(x: jax.Array, directions: Directions, options: CoreOptions) -> list[jax.Array]:
    """Return the tokens after convolution and SiLU, of each direction ``b l e`` in scan order."""
    x = _swap(x, options.rows, options)
    return [
        conv1d.conv(
            x, directions.kernels[d], directions.biases[d], activation="silu", reverse=bool(d)
        )
        for d in (0, 1)
    ]


def front(
    x: Float[Array, "b l e"], directions: Directions, ids: RowIds, options: CoreOptions
) -> tuple[Float[Array, "2 b s e"], Float[Array, "b l e"], Places]:
    """Apply convolution and SiLU to both directions.

    Returns:
        The pooled lines; the mean of both skips, in x's dtype; and, with "max", the place of each line's first maximum
        (its index among the tokens of the line), otherwise ().
    """
    if ids and Visit(*ids).places is not None:
        visit = Visit(*ids)
        u, skip, none = front(gather_tokens(x, visit.places), directions, visit.rows, options)
        return u, gather_tokens(skip, visit.inverse), none
    both = _convolved(x, directions, options)
    skip = skips(both, directions, options).astype(x.dtype)
    if options.method == "mean":
        u = _mean(both, ids, options)
        return u if options.pooled_dtype is None else u.astype(options.pooled_dtype), skip, ()
    lines = [_on_lines(c, options) for c in both]
    first = jnp.arange(options.per_position, dtype=jnp.int32)[:, None]
    forward, backward = (
        _steps(jnp.argmax(c, axis=2).astype(jnp.int32) * options.per_position + first)
        for c in lines
    )
    return _at(lines, (forward, backward)), skip, (forward, backward)


def _mean(both: list[jax.Array], ids: RowIds, options: CoreOptions) -> jax.Array:
    if ids:
        sides = zip(both, ids, strict=True)
        sums = jnp.stack([row_sums(c, of_row, options.rows) for c, of_row in sides])
        return sums * (options.scale / options.columns)
    wide = wide_dtype(both[0].dtype)
    lines = (_on_lines(c, options) for c in both)
    return jnp.stack([_steps(jnp.mean(c, axis=2, dtype=wide)) * options.scale for c in lines])


def row_sums(x: Float[Array, "b l e"], ids: Int[Array, "b l"], rows: int) -> Float[Array, "b s e"]:
    """Sum the tokens of each row, in float32 or wider.

    The sums are a matrix product, because scattered sums change from run to run on GPUs. The product spreads a NaN or
    infinity to all rows of its sample; the kernel keeps it in one row.
    """
    wide = wide_dtype(x.dtype)
    of_row = (jnp.arange(rows)[:, None] == ids[:, None, :]).astype(x.dtype)
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("bsl,ble->bse", of_row, x, precision=exact, preferred_element_type=wide)


def _at(lines: list[jax.Array], places: Places) -> jax.Array:
    """Return for each step the token at its place in its line. That token alone gets the gradient."""
    wide = wide_dtype(lines[0].dtype)

    def one(c, place):
        batch, count, _, per_position, width = c.shape
        position = place.reshape(batch, count, 1, per_position, width) // per_position
        here = jax.lax.broadcasted_iota(jnp.int32, c.shape, 2) == position
        return _steps(jnp.sum(jnp.where(here, c, 0), axis=2, dtype=wide))

    return jnp.stack(list(map(one, lines, places)))


def skips(
    both: list[jax.Array], directions: Directions, options: CoreOptions
) -> Float[Array, "b l e"]:
    """Average both directions' skips, in stored order, float32 or wider; `both` is what `_convolved` returns."""
    wide = wide_dtype(both[0].dtype)
    forward, backward = (
        D.astype(wide) * c.astype(wide) for D, c in zip(directions.D, both, strict=True)
    )
    return _swap((forward + backward) / 2, options.columns, options)


def mix(
    skip: Float[Array, "b l e"],
    y: tuple[Float[Array, "b s e"], Float[Array, "b s e"]],
    ids: RowIds,
    options: CoreOptions,
) -> Float[Array, "b l e"]:
    """Add the mean of both directions' repeated scan outputs to the skips, in stored order, float32 or wider."""
    sides = [side.astype(wide_dtype(side.dtype)) for side in y]
    if ids:
        forward, backward = (
            jnp.take_along_axis(side, of_row[:, :, None], axis=1)
            for side, of_row in zip(sides, Visit(*ids).stored_rows, strict=True)
        )
        total = forward + backward
    else:
        steps = sides[0] + sides[1]
        steps = steps.reshape(skip.shape[0], options.lines, 1, options.per_position, skip.shape[-1])
        shape = (*steps.shape[:2], options.positions, *steps.shape[3:])
        total = _swap(jnp.broadcast_to(steps, shape).reshape(skip.shape), options.columns, options)
    return skip.astype(total.dtype) + total / 2


def normalise(s: jax.Array, norm: Norm, kind: str, eps: float) -> jax.Array:
    """Apply the norm called `kind`, one of `NORM_KINDS`, over the last axis."""
    if kind == "none":
        return s
    if kind == "layer":
        s = s - jnp.mean(s, axis=-1, keepdims=True)
    s = s * jax.lax.rsqrt(jnp.mean(s * s, axis=-1, keepdims=True) + eps)
    return s * norm.scale.astype(s.dtype) + norm.shift.astype(s.dtype)


def gate(
    s: Float[Array, "b l e"], z: Float[Array, "b l e"], norm: Norm, options: CoreOptions
) -> Float[Array, "b l e"]:
    """Compute norm(s) · silu(z), in z's dtype."""
    if options.padding:
        narrow = dataclasses.replace(options, padding=0)
        run = lambda s, z, norm: gate(s, z, norm, narrow)  # noqa: E731
        return on_channels(run, options.padding)(s, z, norm)
    s = normalise(s, norm, options.norm_kind, options.eps)
    return s.astype(z.dtype) * jax.nn.silu(z)


def back(
    xz: Float[Array, "b l e2"],
    skip: Float[Array, "b l e"],
    y: tuple[Float[Array, "b s e"], Float[Array, "b s e"]],
    norm: Norm,
    ids: RowIds,
    options: CoreOptions,
) -> Float[Array, "b l e"]:
    """Compute everything after the scan: `mix`, then `gate` with the second half of xz."""
    z = jnp.split(xz, 2, axis=-1)[1]
    return gate(mix(skip, y, ids, options), z, norm, options)


def back_gradients(
    xz: jax.Array,
    skip: jax.Array,
    y: tuple[jax.Array, jax.Array],
    norm: Norm,
    out_bar: jax.Array,
    ids: RowIds,
    options: CoreOptions,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array], Norm]:
    """Compute the gradients of s ``b l e`` (the LayerNorm's input), of z, of y and of norm.

    The gradient of z is the second half of an array like xz, whose first half is zero: `front_gradients` writes the
    gradient of x there, so no later pass has to join the two. Gradients of s and xz have xz's dtype.
    """
    z = jnp.split(xz, 2, axis=-1)[1]
    s = mix(skip, y, ids, options)
    _, pull = jax.vjp(lambda s, z, norm: gate(s, z, norm, options), s, z, norm)
    s_bar, z_bar, norm_bar = pull(out_bar)
    if ids:
        forward, backward = (row_sums(s_bar, of_row, options.rows) / 2 for of_row in ids)
    else:
        visited = _on_lines(_swap(s_bar, options.rows, options), options)
        forward = backward = _steps(visited.sum(2)) / 2
    xz_bar = jnp.pad(z_bar, ((0, 0), (0, 0), (z.shape[-1], 0)))
    return s_bar.astype(xz.dtype), xz_bar, (forward, backward), norm_bar


def back_gradients_with_g(
    xz, skip, y, norm, out_bar, ids: RowIds, options: CoreOptions
) -> tuple[Any, ...]:
    """Compute `back_gradients`, and `back` once more."""
    g = back(xz, skip, y, norm, ids, options)
    return *back_gradients(xz, skip, y, norm, out_bar, ids, options), g


def front_gradients(
    xz: jax.Array,
    s_bar: jax.Array,
    xz_bar: jax.Array,
    pooled_bar: Float[Array, "2 b s e"],
    places: Places,
    directions: Directions,
    ids: RowIds,
    options: CoreOptions,
) -> tuple[jax.Array, Directions]:
    """Write the gradient of x into the first half of `xz_bar`; return it and the gradients of the directions."""
    x = jnp.split(xz, 2, axis=-1)[0]

    def run(x, directions):
        both = _convolved(x, directions, options)
        if places:
            pooled = _at([_on_lines(c, options) for c in both], places)
        else:
            pooled = _mean(both, ids, options)
        return pooled, skips(both, directions, options)

    (_, s), pull = jax.vjp(run, x, directions)
    x_bar, directions_bar = pull((pooled_bar, s_bar.astype(s.dtype)))
    return xz_bar.at[..., : x.shape[-1]].set(x_bar), directions_bar


def add_and_normalise(
    g: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    gain: jax.Array,
    keep: jax.Array | None,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """Project g, add it to the residual stream, and normalise the sum; see `block.mixer_block`."""
    return add_and_normalise_update(project(g, weight), residual, gain, None, None, keep, eps)


def add_and_normalise_update(
    update: jax.Array | None,
    residual: jax.Array,
    gain: jax.Array,
    shift: jax.Array | None,
    bias: jax.Array | None,
    keep: jax.Array | None,
    eps: float,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Add an update to the residual stream, and normalise the sum; see `add_norm.add_norm`.

    Without an update, normalise the stream as it is. `dtype` is that of the normalised tokens, by default the update's.
    """
    total = residual
    if update is not None:
        dtype = update.dtype if dtype is None else dtype
        if bias is not None:
            wide = at_least_float32(residual.dtype)
            update = update.astype(wide) + bias.astype(wide)
        total = add_to_residual(residual, update, keep)
    return total, norm_of_sum(total, gain, shift, eps, dtype)


def add_to_residual(
    residual: Float[Array, "b l o"],
    update: Float[Array, "b l o"],
    keep: Float[Array, " b"] | None = None,
) -> Float[Array, "b l o"]:
    """Add an update, times one factor for each image, to the residual stream; round the sum to the stream's dtype."""
    dtype = residual.dtype
    wide = at_least_float32(dtype)
    update = update.astype(wide)
    if keep is not None:
        update = update * keep.astype(wide)[:, None, None]
    total = residual.astype(wide) + update
    if dtype != wide:
        # XLA would leave a conversion and its inverse out, and the norm would read another sum than the next block.
        about = jnp.finfo(dtype)
        total = jax.lax.reduce_precision(total, about.nexp, about.nmant)
    return total.astype(dtype)


def at_least_float32(dtype: Any) -> Any:
    """Return the dtype in which sums of numbers of `dtype` are computed."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def project(g: jax.Array, weight: Float[Array, "o e"]) -> jax.Array:
    """Multiply with a weight that is stored transposed, in the dtype of g."""
    return jnp.matmul(g, cast_parameter(weight, g.dtype, g).T)


def rms_norm(total: jax.Array, gain: jax.Array, eps: float, dtype: Any) -> jax.Array:
    """Apply an RMSNorm over the last axis in float32 or wider, and round to `dtype`; save `total` alone."""
    return norm_of_sum(total, gain, None, eps, dtype)


def norm_of_sum(
    total: jax.Array, gain: jax.Array, shift: jax.Array | None, eps: float, dtype: Any
) -> jax.Array:
    """Apply a LayerNorm, or an RMSNorm if there is no shift, as `rms_norm` does."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run(total, gain, shift):
        normed = standardised(total, eps, layer=shift is not None) * gain.astype(wide)
        return (normed if shift is None else normed + shift.astype(wide)).astype(dtype)

    wide = at_least_float32(total.dtype)
    return run(total, gain, shift)


def standardised(total: jax.Array, eps: float, *, layer: bool) -> jax.Array:
    """Apply a LayerNorm or an RMSNorm without parameters over the last axis, in float32 or wider."""
    total = total.astype(at_least_float32(total.dtype))
    if layer:
        total = total - jnp.mean(total, axis=-1, keepdims=True)
    return total * jax.lax.rsqrt(jnp.mean(total * total, axis=-1, keepdims=True) + eps)


def norm_gradient(
    total_bar: jax.Array,
    normed_bar: jax.Array,
    total: jax.Array,
    gain: jax.Array,
    keep: jax.Array | None,
    eps: float,
    *,
    layer: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Add the gradient of `total` through its RMSNorm, or LayerNorm, to `total_bar`.

    Returns:
        The sum, in the dtype of `total`; and the sum times each image's factor, rounded to the dtype of `normed_bar`.
    """
    wide = total.astype(at_least_float32(total.dtype))
    shift = jnp.zeros_like(gain) if layer else None
    _, pull = jax.vjp(lambda total: norm_of_sum(total, gain, shift, eps, normed_bar.dtype), wide)
    (bar,) = pull(normed_bar)
    bar = total_bar.astype(wide.dtype) + bar
    scaled = bar if keep is None else bar * keep[:, None, None]
    return bar.astype(total.dtype), scaled.astype(normed_bar.dtype)


def layer_norm_gradient(
    total_bar: jax.Array,
    normed_bar: jax.Array,
    total: jax.Array,
    gain: jax.Array,
    keep: jax.Array | None,
    eps: float,
) -> tuple[jax.Array, jax.Array, Float[Array, "3 o"]]:
    """Compute `norm_gradient` of a LayerNorm, and sums over all tokens.

    Returns:
        Both results of `norm_gradient`; and the gradients of gain, shift and the update's bias, float32 or wider.
    """
    bar, scaled = norm_gradient(total_bar, normed_bar, total, gain, keep, eps, layer=True)
    normed = standardised(total, eps, layer=True)
    wide = normed_bar.astype(normed.dtype)
    terms = (wide * normed, wide, scaled.astype(normed.dtype))
    return bar, scaled, jnp.stack([jnp.sum(x, axis=(0, 1)) for x in terms])

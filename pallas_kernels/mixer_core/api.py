"""Define `mixer_core`: check its arguments, choose kernels or XLA, and differentiate it.

Kernels and XLA compute the same four stages, two for the forward and two for the backward pass:

    front            convolution, SiLU and pooling of both directions, and their skips
    back             repeat the scans' outputs, add the skips, LayerNorm, gate
    back_gradients   gradients of `back`, except through its skips
    front_gradients  gradients of `front` and of the skips

Between front and back the caller's `middle` runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import gpu
from pallas_kernels.checks import expect_counts
from pallas_kernels.derivatives import differentiated_as
from pallas_kernels.dtypes import wide_dtype
from pallas_kernels.mixer_core import xla
from pallas_kernels.mixer_core.checks import CheckedMiddle, check_arrays, expect_norm_kind
from pallas_kernels.mixer_core.narrow import Narrowed, missing_channels, widen_call
from pallas_kernels.mixer_core.types import CoreOptions, Directions, Norm
from pallas_kernels.moves import move_tokens
from pallas_kernels.sharding import match_types, on_cuda, per_shard
from pallas_kernels.trial import Trial

IMPLEMENTATIONS = ("auto", "pallas", "xla")
METHODS = ("mean", "max")


def mixer_core(
    xz: Float[Array, "b l e2"],
    directions: Directions,
    norm: Norm,
    middle_params: Any,
    *,
    middle: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]],
    rows: int,
    columns: int,
    row_ids: tuple[Int[Array, "b _"], Int[Array, "b _"]] | None = None,
    places: tuple[Int[Array, "b _"], Int[Array, "b _"]] | None = None,
    transposed: bool = False,
    per_position: int = 1,
    method: str = "mean",
    scale: float = 1.0,
    eps: float = 1e-5,
    norm_kind: str = "layer",
    implementation: str = "auto",
) -> Float[Array, "b l e"]:
    """Compute everything of a bidirectional FastVim mixer between its two projections.

        x, z = halves of xz;   c_d = silu(conv_d(x));   u_d = mean · scale or maximum of c_d over each line
        y = middle(middle_params, u)                    the projections of u and the scans
        out = LayerNorm(sum over d of (y_d of the token's line + D_d c_d) / 2) · silu(z)

    Here d is one of the two directions. The convolution of the second direction looks ahead. A line is a row of the
    grid, or a column if `transposed`. A position of the grid may hold several tokens (`per_position`, for instance one
    for each channel of a patch), visited one after the other. A line is then pooled to `per_position` tokens: the k-th
    of them from the k-th token of each position.

    The GPU kernels (Hopper and newer) read x and z once. The kernel before `middle` writes the mean of both D_d c_d, in
    xz's dtype, and the kernel after `middle` reads it. c and the repeated y are never written to memory.

    Reverse-mode differentiation works; where kernels run, only once. For the gradient the forward pass saves xz, the
    mean of both D_d c_d, and arrays of the size of u. With "max", one of these (int32) holds the place of the first
    maximum in each line, because only this token gets the gradient. A NaN in a line makes its maximum NaN.

    In a ragged grid, tokens are missing, different ones in each sample. xz holds the tokens that exist, and `row_ids`
    the row of each. u_d is the sum over the tokens of a row divided by the length of a *whole* row, and 0 for a row
    without tokens. The convolutions see tokens that are adjacent in xz as neighbours. Each direction has its own row
    ids, because the released masked models reverse the tokens but not their rows: for these models the row ids of the
    second direction are `rows - 1 - ids[:, ::-1]`. Otherwise both directions have the same.

    Under a sharded `jit`, every device works on its share of b. Axes other than b are gathered, because the LayerNorm
    needs all channels of a token.

    Args:
        xz: tokens row by row, x and z one after the other on the channel axis; bfloat16 to float64.
        directions: convolutions and skips. The last tap of a convolution meets the current token.
        norm: LayerNorm over the channels.
        middle_params: pytree passed to `middle`; gradients flow to it.
        middle: function (middle_params, u) -> (y_f, y_b). u `2 b s e`, in float32 or wider, holds both directions'
            pooled tokens, s = lines · per_position; y_f and y_b are `b s e`. The function must not close over tracers.
        rows, columns: size of the whole grid, in positions.
        row_ids: for a ragged grid, the row ids of the forward and the backward direction: from 0 to rows - 1, and never
            decreasing within a sample. A ragged grid must be pooled by "mean", must not be transposed, and has one
            token at a position.
        places: for a ragged grid, the order in which its tokens are visited: the index in xz of each token that
            `row_ids` names, a permutation in each sample, and the inverse permutation. None: as they lie in xz. The
            kernels read and write every token at its place; for a gradient the tokens are moved.
        transposed: visit the positions column by column, so that lines are columns.
        per_position: tokens of a position, next to each other in xz.
        method: "mean" or "max", over a line.
        scale: factor on the pooled mean; a maximum has none.
        eps: epsilon of the norm.
        norm_kind: "layer", "rms" (then the norm's shift is usually zero) or "none" (then `norm` is not read).
        implementation: "pallas" (kernels), "xla", or "auto": kernels if the program is lowered for a Hopper or newer
            GPU, otherwise XLA.

    Returns:
        The input of out_proj, `b l e` in xz's dtype.

    Raises:
        ValueError: shapes do not fit, also those that `middle` returns, or method or implementation is unknown.
        NotImplementedError: implementation is "pallas", but the kernels cannot run here.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"mixer_core: implementation must be one of {IMPLEMENTATIONS}; got {implementation!r}"
        )
    if method not in METHODS:
        raise ValueError(f"mixer_core: method must be one of {METHODS}; got {method!r}")
    expect_counts("mixer_core", rows=rows, columns=columns, per_position=per_position)
    expect_norm_kind("mixer_core", norm_kind)
    xz = check_arrays("mixer_core", xz, directions[0], directions[1], norm, directions[2])
    if row_ids is not None:
        _check_ragged(xz, row_ids, places, method, transposed or per_position > 1)
    elif places is not None:
        raise ValueError("mixer_core: places are of a ragged grid: give row_ids as well")
    elif xz.shape[1] != rows * columns * per_position:
        size = " x ".join(
            map(str, (rows, columns, per_position) if per_position > 1 else (rows, columns))
        )
        raise ValueError(f"mixer_core: xz {xz.shape} (b l 2e) must hold {size} tokens")
    if xz.shape[0] == 0:  # no kernel takes an empty batch
        return jnp.zeros((*xz.shape[:2], xz.shape[2] // 2), xz.dtype)
    middle = CheckedMiddle("mixer_core", middle)
    width = xz.shape[2] // 2
    padding = missing_channels(width)
    options = CoreOptions(
        rows,
        columns,
        transposed,
        float(scale),
        float(eps),
        method,
        padding,
        norm_kind,
        per_position,
    )
    # Clip the ids to the grid, because the kernels use them as addresses.
    given = () if row_ids is None else row_ids
    ids = tuple(jnp.clip(jnp.asarray(of_row).astype(jnp.int32), 0, rows - 1) for of_row in given)
    if places is not None:
        there, back = (
            jnp.clip(jnp.asarray(x).astype(jnp.int32), 0, xz.shape[1] - 1) for x in places
        )
        stored = tuple(jnp.take_along_axis(of_row, back, axis=1) for of_row in ids)
        ids = (*ids, there, back, *stored)

    def run(xz, directions, norm, ids):
        return _core(Stages(always=True), _unchanged, options, xz, directions, norm, (), ids)

    wide = functools.partial(widen_call, padding=padding)
    like = jax.eval_shape(wide, xz, directions, norm)
    trial = Trial(run, (*like, ids), options)
    stages = _stages(implementation, like[0], like[1], ids, options, trial)
    if stages is None:
        options = dataclasses.replace(options, padding=0)
        u, skip, _ = _of_share("front", _xla_front, options)(xz, directions, ids)
        y = middle(middle_params, u)
        return _of_share("back", xla.back, options)(xz, skip, y, norm, ids)
    middle = Narrowed(middle, padding) if padding else middle
    xz, directions, norm = wide(xz, directions, norm)
    core = functools.partial(_core, stages, middle, options)
    if places is None:
        return core(xz, directions, norm, middle_params, ids)[..., :width]

    def moved(xz, directions, norm, middle_params, ids):
        there, back = ids[2:4]
        xz = move_tokens(xz, there, back)
        out = core(xz, directions, norm, middle_params, ids[:2])
        return move_tokens(out, back, there)

    return differentiated_as(moved, core, xz, directions, norm, middle_params, ids)[..., :width]


def _unchanged(params: tuple[()], u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Stand in for the scans in a trial."""
    del params
    return u[0], u[1]


def _check_ragged(xz, row_ids, places, method: str, regular: bool) -> None:
    """Check the row ids. `regular` says whether the call asks for what only whole grids have."""
    if method != "mean" or regular:
        raise ValueError(
            "mixer_core: a ragged grid is pooled by 'mean' and not transposed, and has per_position=1"
        )
    for name, pair in (("row_ids", row_ids), ("places", places)):
        if pair is None:
            continue
        arrays = [jnp.asarray(x) for x in pair]
        if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in arrays):
            kinds = [str(x.dtype) for x in arrays]
            raise ValueError(f"mixer_core: {name} must be integers, got {kinds}")
        shapes = [x.shape for x in arrays]
        if shapes != [xz.shape[:2]] * 2:
            raise ValueError(
                f"mixer_core: {name} {shapes} (b l each) must fit xz {xz.shape} (b l 2e)"
            )


# Dimensions of the operands and results of every stage (letters: see the package). Devices split b and nothing else.
_XZ, _TOKENS, POOLED = "b l w", "b l e", ("b s e", "b s e")
_BOTH = "d b s e"
# `_of_share` replaces these: places of the maxima in their lines, and row ids; both are empty where a call has none.
_PLACES, _IDS = "places", "ids"
DIRECTIONS = Directions("d k e", "d e", "d e")  # type: ignore[arg-type]
NORM = Norm("e", "e")  # type: ignore[arg-type]
_DIMS: dict[str, tuple[Any, Any]] = {
    "front": ((_XZ, DIRECTIONS, _IDS), (_BOTH, _TOKENS, _PLACES)),
    "back": ((_XZ, _TOKENS, POOLED, NORM, _IDS), _TOKENS),
    "back_gradients": (
        (_XZ, _TOKENS, POOLED, NORM, _TOKENS, _IDS),
        (_TOKENS, _XZ, POOLED, NORM),
    ),
    "back_gradients_with_g": (
        (_XZ, _TOKENS, POOLED, NORM, _TOKENS, _IDS),
        (_TOKENS, _XZ, POOLED, NORM, _TOKENS),
    ),
    "front_gradients": (
        (_XZ, _TOKENS, _XZ, _BOTH, _PLACES, DIRECTIONS, _IDS),
        (_XZ, DIRECTIONS),
    ),
}


def _of_share(
    name: str, stage: Callable, options: CoreOptions, *, opaque: bool = False
) -> Callable:
    """Return the stage as a function that runs on each device's share of the batch.

    Args:
        name: key of the stage in `_DIMS`.
        stage: function of the stage's arrays and the options.
        options: the static half of the call.
        opaque: whether the stage holds kernels, which XLA's partitioner cannot split by itself.
    """

    def run(*arrays):
        known = {
            _PLACES: POOLED if options.method == "max" else (),
            _IDS: ("b l",) * len(arrays[-1]),
        }
        operands, results = jax.tree.map(lambda dims: known.get(dims, dims), _DIMS[name])
        on_share = lambda _, *arrays: stage(*arrays, options)  # noqa: E731
        return per_shard(on_share, operands, results, split="b", opaque=opaque)(*arrays)

    return run


def _xla_front(xz, directions, ids, options):
    return xla.front(jnp.split(xz, 2, axis=-1)[0], directions, ids, options)


@dataclasses.dataclass(frozen=True)
class Stages:
    """The four stages as attributes: `front`, `back`, `back_gradients` (or `..._with_g`) and `front_gradients`.

    Each is a function that runs kernels if the program is lowered for CUDA, otherwise XLA. With `always` it holds
    kernels only, because "pallas" was asked for by name.
    """

    always: bool

    def __getattr__(self, name: str) -> Callable:
        from pallas_kernels.mixer_core import mosaic

        kernel = getattr(mosaic, name)
        other: Callable = _xla_front if name == "front" else getattr(xla, name)

        def either(*args):
            *arrays, options = args
            if self.always:
                return kernel(*arrays, options)
            return on_cuda(
                lambda *arrays: kernel(*arrays, options),
                lambda *arrays: other(*arrays, options),
                *arrays,
            )

        def run(*args):
            *arrays, options = args
            return _of_share(name, either, options, opaque=True)(*arrays)

        return run


def _stages(name: str, xz, directions, ids, options, trial: Trial) -> Stages | None:
    """Return the four stages if they can run as kernels, otherwise None."""

    def unsupported():
        from pallas_kernels.mixer_core import mosaic

        return mosaic.unsupported(xz, directions.kernels, ids, options)

    runs = gpu.choose(name, "mixer_core", unsupported, trial)
    return Stages(always=name == "pallas") if runs else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _core(stages, middle, options, xz, directions, norm, middle_params, ids):
    u, skip, _ = stages.front(xz, directions, ids, options)
    y = middle(middle_params, u)
    return stages.back(xz, skip, y, norm, ids, options)


def _forward(stages, middle, options, xz, directions, norm, middle_params, ids):
    u, skip, places = stages.front(xz, directions, ids, options)
    y, pull = jax.vjp(middle, middle_params, u)
    out = stages.back(xz, skip, y, norm, ids, options)
    return out, (xz, skip, y, places, pull, ids, directions, norm)


def _backward(stages, middle, options, residuals, out_bar):
    *saved, ids, directions, norm = residuals
    *gradients, _ = core_gradients(stages, options, Saved(*saved), directions, norm, ids, out_bar)
    return *gradients, jax.tree.map(lambda _: None, ids)


class Saved(NamedTuple):
    """Hold what the forward pass of a core keeps for the gradient.

    Attributes:
        xz: input of the core.
        skip: mean of both directions' skips.
        y: what `middle` returned.
        places: see `xla.front`.
        pull: transpose of `middle`, from `jax.vjp`.
    """

    xz: jax.Array
    skip: jax.Array
    y: tuple[jax.Array, jax.Array]
    places: Any
    pull: Any


def core_gradients(
    stages: Stages,
    options: CoreOptions,
    saved: Saved,
    directions: Directions,
    norm: Norm,
    ids: tuple[jax.Array, ...],
    out_bar: jax.Array,
    *,
    with_g: bool = False,
) -> tuple[jax.Array, Directions, Norm, Any, jax.Array | None]:
    """Return the gradients of xz, directions, norm and `middle`'s parameters, given the output's.

    The last result is the output once more if `with_g`, else None.
    """
    xz, skip, y, places, pull = saved
    weights = [directions, norm]
    # s, whose gradient is s_bar, is what the LayerNorm reads.
    # Cast the parameters, so that their gradients are summed over devices in float32 or wider.
    directions, norm = jax.tree.map(lambda w: w.astype(wide_dtype(w.dtype)), weights)
    back = stages.back_gradients_with_g if with_g else stages.back_gradients
    s_bar, xz_bar, y_bar, norm_bar, *g = back(xz, skip, y, norm, out_bar, ids, options)
    y_bar = tuple(bar.astype(side.dtype) for bar, side in zip(y_bar, y, strict=True))
    middle_bar, u_bar = pull(y_bar)
    xz_bar, directions_bar = stages.front_gradients(
        xz, s_bar, xz_bar, u_bar, places, directions, ids, options
    )
    directions_bar, norm_bar = match_types([directions_bar, norm_bar], weights)
    return match_types(xz_bar, xz), directions_bar, norm_bar, middle_bar, g[0] if g else None


_core.defvjp(_forward, _backward)

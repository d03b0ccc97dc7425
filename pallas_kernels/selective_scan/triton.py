"""The selective scan as Triton kernels, called through jax-triton: for NVIDIA GPUs older than Hopper.

Calls keep for their gradients the inputs and the state that enters each chunk of 8 steps (4 for scans of up to 4).
A program scans one sequence, channel by channel; where sequences and channels make too few programs, time is cut into
parts: their last states are computed first, from zero and side by side, then what enters each part, then the rest.

The module imports jax_triton, so import it only where `pallas_kernels.gpu.triton_missing()` is None. jax-triton has no
rule for `jax.vmap`: a mapped scan runs as XLA's associative scan, which is logged once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton

from pallas_kernels import gpu
from pallas_kernels.selective_scan import triton_kernels, xla_associative
from pallas_kernels.selective_scan.types import ScanForward, ScanInputs, ScanOptions

MAX_STATES = 32
CHANNELS = 32  # of one program: one warp, one channel per thread
LONGEST_CHUNK = 8  # unrolled, in registers
# Parts for 2048 programs were the fastest of 1, 512, 1024 and 2048 at (2, 16384, 384) on an H100 (benchmarks/NOTES.md).
ENOUGH_PROGRAMS = 2048
SHORTEST_PART = 8  # chunks


def unsupported(inputs: ScanInputs) -> str | None:
    """Return why the kernels cannot take these inputs, or None."""
    if gpu.interpreted():
        return "JAX's interpreter of kernels does not run Triton"
    for name, x in inputs._asdict().items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"{name} is {x.dtype}, and the kernels compute in float32"
    if not all(isinstance(size, int) for size in inputs.u.shape):
        return f"u {inputs.u.shape} has a symbolic size"
    if inputs.u.size == 0:
        return f"u {inputs.u.shape} is empty"
    states = inputs.A.shape[-1]
    if states > MAX_STATES:
        return f"it has {states} states, and the kernels hold at most {MAX_STATES}"
    width, groups = inputs.u.shape[-1], inputs.B.shape[-2]
    if groups > 1 and (width // groups) % CHANNELS:
        return f"groups of {width // groups} channels are not made of whole blocks of {CHANNELS}"
    return None


def chunk_length(inputs: ScanInputs) -> int:
    """Choose the steps between the states kept for the gradient: a power of two."""
    return min(LONGEST_CHUNK, max(4, 2 ** math.ceil(math.log2(inputs.u.shape[-2]))))


def forward(inputs: ScanInputs, options: ScanOptions) -> ScanForward:
    """See `types.Backend`."""
    return _unless_mapped(_forward, xla_associative.forward, options)(inputs)


def backward(
    inputs: ScanInputs,
    options: ScanOptions,
    boundaries: jax.Array | None,
    y_bar: jax.Array,
    last_state_bar: jax.Array | None,
) -> ScanInputs:
    """See `types.Backend`."""
    run = _unless_mapped(_backward, xla_associative.backward, options)
    return run(inputs, boundaries, y_bar, last_state_bar)


def _unless_mapped(kernel: Callable, other: Callable, options: ScanOptions) -> Callable[..., Any]:
    """Return `kernel` of arrays, which under `jax.vmap` is `other`."""

    def call(inputs, *more):
        arrays, structure = jax.tree.flatten((inputs, *more))

        def run(function, *arrays):
            inputs, *more = jax.tree.unflatten(structure, arrays)
            return function(inputs, options, *more)

        plain = jax.custom_batching.custom_vmap(functools.partial(run, kernel))

        @plain.def_vmap
        def mapped(axis_size, batched, *arrays):
            gpu.log_once(
                "selective_scan: under jax.vmap the associative scan of XLA runs and not the Triton kernels"
            )
            axes = tuple(0 if has else None for has in batched)
            out = jax.vmap(functools.partial(run, other), axes, axis_size=axis_size)(*arrays)
            return out, jax.tree.map(lambda _: True, out)

        return plain(*arrays)

    return call


def _forward(inputs: ScanInputs, options: ScanOptions) -> ScanForward:
    b, l, e = inputs.u.shape
    parts = _parts(inputs, options)
    if parts > 1:
        ends = _ends(_cut(inputs, parts, None), options, adjoint=False)
        decays = _decays(inputs, options, parts)
        start = _entering(decays, ends, inputs.initial_state, options.reverse)
        inputs = _cut(inputs, parts, start)
    run, length, e = inputs.u.shape
    n, chunks = inputs.A.shape[-1], math.ceil(length / options.chunk)
    keep = options.keep_boundaries and parts * chunks > 1
    y, last, entering = _call(
        triton_kernels.forward,
        inputs,
        options,
        (),
        {
            "y": (inputs.u.shape, inputs.u.dtype),
            "last": ((run, e, n), jnp.float32) if options.return_last_state else None,
            "entering": ((run, chunks, e, n), jnp.float32) if keep else None,
        },
        WRITE_LAST=options.return_last_state,
        KEEP=keep,
        WRITE_Y=True,
        ADJOINT=False,
    )
    if last is not None:  # that of the part visited last
        last = last.reshape(b, parts, e, n)[:, 0 if options.reverse else -1]
    if entering is not None:
        entering = entering.reshape(b, parts * chunks, e, n)
    return y.reshape(b, l, e), last, entering


def _parts(inputs: ScanInputs, options: ScanOptions) -> int:
    """Choose into how many parts of whole chunks time is cut."""
    b, l, e = inputs.u.shape
    if l % options.chunk:
        return 1
    chunks = l // options.chunk
    most = min(ENOUGH_PROGRAMS // (b * math.ceil(e / CHANNELS)), chunks // SHORTEST_PART)
    return max(d for d in range(1, max(most, 1) + 1) if chunks % d == 0)


def _cut(inputs: ScanInputs, parts: int, start: jax.Array | None) -> ScanInputs:
    """Return the parts of every sequence as sequences, which begin with the states `start` (`b p e n`)."""

    def cut(x):
        if x is None:
            return None
        return x.reshape(x.shape[0] * parts, x.shape[1] // parts, *x.shape[2:])

    streamed = {name: cut(getattr(inputs, name)) for name in ("u", "delta", "B", "C", "z")}
    start = None if start is None else jax.lax.collapse(start, 0, 2)
    return inputs._replace(**streamed, initial_state=start)


def _decays(inputs: ScanInputs, options: ScanOptions, parts: int) -> jax.Array:
    """Return by what each part multiplies the state that enters it, `b p e n`."""
    b, l, e = inputs.u.shape
    step = inputs.delta.astype(jnp.float32)
    if inputs.delta_bias is not None:
        step += inputs.delta_bias.astype(jnp.float32)
    if options.delta_softplus:
        step = jax.nn.softplus(step)
    step = step.reshape(b, parts, l // parts, e).sum(2)
    return jnp.exp(step[..., None] * inputs.A.astype(jnp.float32))


def _ends(inputs: ScanInputs, options: ScanOptions, *, adjoint: bool) -> jax.Array:
    """Return the last state of each scan from zero, of the recurrence or of its adjoint."""
    b, _, e = inputs.u.shape
    _, last, _ = _call(
        triton_kernels.forward,
        inputs._replace(D=None, z=None, initial_state=None),
        options,
        (),
        {"y": None, "last": ((b, e, inputs.A.shape[-1]), jnp.float32), "entering": None},
        WRITE_LAST=True,
        KEEP=False,
        WRITE_Y=False,
        ADJOINT=adjoint,
    )
    return last


def _entering(
    decays: jax.Array, ends: jax.Array, start: jax.Array | None, reverse: bool
) -> jax.Array:
    """Return the state that enters each part, `b p e n`, from what each one does with a state of zero."""
    ends = ends.reshape(decays.shape)
    start = jnp.zeros_like(ends[:, 0]) if start is None else start.astype(ends.dtype)
    first = -1 if reverse else 0
    ends = ends.at[:, first].add(decays[:, first] * start)
    then = lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1])  # noqa: E731
    _, after = jax.lax.associative_scan(then, (decays, ends), axis=1, reverse=reverse)
    before = [after[:, 1:], start[:, None]] if reverse else [start[:, None], after[:, :-1]]
    return jnp.concatenate(before, axis=1)


def _backward(
    inputs: ScanInputs,
    options: ScanOptions,
    boundaries: jax.Array | None,
    y_bar: jax.Array,
    last_state_bar: jax.Array | None,
) -> ScanInputs:
    whole, (b, l, e) = inputs, inputs.u.shape
    n, groups = inputs.A.shape[-1], inputs.B.shape[-2]
    blocks = math.ceil(e / CHANNELS)
    float32 = jnp.float32
    parts = _parts(inputs, options)
    if parts > 1:
        s_bar = y_bar.astype(float32)  # gradient of the ungated output
        if inputs.z is not None:
            s_bar *= jax.nn.silu(inputs.z.astype(float32))
        adjoint = _cut(inputs._replace(u=s_bar, B=inputs.C), parts, None)
        back = dataclasses.replace(options, reverse=not options.reverse)
        ends = _ends(adjoint, back, adjoint=True)
        decays = _decays(inputs, options, parts)
        bars = _entering(decays, ends, last_state_bar, back.reverse)
        last_state_bar = jax.lax.collapse(bars, 0, 2)
        # With states kept, the kernel asks only whether there is an initial one.
        start = None if inputs.initial_state is None else jnp.zeros_like(bars)
        inputs = _cut(inputs, parts, start)
        boundaries = boundaries.reshape(b * parts, -1, e, n)
        y_bar = y_bar.reshape(inputs.u.shape)
    run, length, _ = inputs.u.shape
    u, delta, A, B, C, D, z, bias, initial = _call(
        triton_kernels.backward,
        inputs,
        options,
        (boundaries, y_bar, last_state_bar),
        {
            "u": ((run, length, e), inputs.u.dtype),
            "delta": ((run, length, e), inputs.delta.dtype),
            "A": ((run, e, n), float32),
            "B": ((blocks, run, length, n), float32),
            "C": ((blocks, run, length, n), float32),
            "D": None if inputs.D is None else ((run, e), float32),
            "z": None if inputs.z is None else ((run, length, e), inputs.z.dtype),
            "delta_bias": None if inputs.delta_bias is None else ((run, e), float32),
            "initial_state": None if inputs.initial_state is None else ((run, e, n), float32),
        },
        HAS_LAST=last_state_bar is not None,
        KEPT=boundaries is not None,
    )
    of_groups = lambda x: jnp.moveaxis(x.reshape(groups, -1, b, l, n).sum(1), 0, 2)  # noqa: E731
    summed = lambda x: None if x is None else x.sum(0)  # noqa: E731
    uncut = lambda x: None if x is None else x.reshape(b, l, e)  # noqa: E731
    if initial is not None:  # that of the part visited first
        initial = initial.reshape(b, parts, e, n)[:, -1 if options.reverse else 0]
    gradients = ScanInputs(
        u=uncut(u),
        delta=uncut(delta),
        A=summed(A),
        B=of_groups(B),
        C=of_groups(C),
        D=summed(D),
        z=uncut(z),
        delta_bias=summed(bias),
        initial_state=initial,
    )
    return jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, whole)


def _call(
    kernel: Any,
    inputs: ScanInputs,
    options: ScanOptions,
    more: tuple[jax.Array | None, ...],
    results: dict[str, tuple[tuple[int, ...], Any] | None],
    **flags: bool,
) -> list[jax.Array | None]:
    """Run a kernel; absent operands and results are None, for which it gets a pointer that it does not use."""
    b, l, e = inputs.u.shape
    n = inputs.A.shape[1]
    wide = {
        name: None if x is None else x.astype(jnp.float32)
        for name, x in inputs._asdict().items()
        if name in ("A", "D", "delta_bias", "initial_state")
    }
    inputs = inputs._replace(**wide | {"A": wide["A"].T})
    operands = [inputs.u if x is None else x for x in (*inputs, *more)]
    shapes = [jax.ShapeDtypeStruct(*(r or ((1,), jnp.float32))) for r in results.values()]
    outs = jax_triton.triton_call(
        *operands,
        l,
        e,
        kernel=kernel,
        grid=(b, math.ceil(e / CHANNELS), 1),
        num_warps=1,
        num_stages=1,
        STATES=n,
        GROUPS=inputs.B.shape[-2],
        ROWS=2 ** math.ceil(math.log2(n)),
        CHANNELS=CHANNELS,
        CHUNK=options.chunk,
        REVERSE=options.reverse,
        SOFTPLUS=options.delta_softplus,
        HAS_D=inputs.D is not None,
        HAS_Z=inputs.z is not None,
        HAS_BIAS=inputs.delta_bias is not None,
        HAS_INITIAL=inputs.initial_state is not None,
        **flags,
        out_shape=shapes,
    )
    return [None if r is None else x for x, r in zip(outs, results.values(), strict=True)]

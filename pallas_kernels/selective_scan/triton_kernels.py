"""Define the Triton kernels of the selective scan and of its gradients.

One program scans one sequence over a block of channels. It walks along time in chunks of `CHUNK` steps. The state is
`n e` in registers, and one thread holds all steps of its channels. So a chunk of one state is a linear recurrence
inside a thread, without any exchange between threads. Only the sums over channels, for the gradients of B and C, go
across threads.

Layout: Triton spreads the last axis of a tile over threads first. Strides between steps are runtime numbers of unknown
divisibility. With known ones, Triton would give a thread four neighbouring channels, spread the steps over threads
and scan across them.

Steps past the end of the sequence have step size 0: they leave the state and the gradients unchanged.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _row(x, rows, i):
    """Return row i of the tile x. The other rows add -0.0, because LLVM removes `y + -0.0` but not `y + 0.0`."""
    return tl.sum(tl.where(rows[:, None] == i, x, -0.0), axis=0)


@triton.jit
@no_type_check
def _recurrence(a, b, h, rows, CHUNK: tl.constexpr, FROM_LAST: tl.constexpr, DECAYED: tl.constexpr):
    """Return all h <- a h + b of a chunk, `t e` (with DECAYED all a h instead), and the last h computed.

    Once Triton has placed the rows in one thread, all comparisons are of constants, so that CHUNK multiply-adds remain.
    (`tl.associative_scan` from the last row to the first would exchange rows between threads.)
    """
    x = b
    for i in tl.static_range(CHUNK):
        t = CHUNK - 1 - i if FROM_LAST else i
        decayed = _row(a, rows, t) * h
        h = decayed + _row(b, rows, t)
        kept = decayed if DECAYED else h
        x = tl.where(rows[:, None] == t, kept[None, :], x)
    return x, h


@triton.jit
@no_type_check
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _softplus(x):
    """Return softplus(x) to float32's accuracy, also where it is tiny."""
    small = tl.exp(-tl.abs(x))
    rounded = 1.0 + small  # log(rounded) * small / (rounded - 1) corrects for the rounding.
    log1p = tl.where(rounded == 1.0, small, tl.log(rounded) * (small / (rounded - 1.0)))
    return tl.maximum(x, 0.0) + tl.where(small == 0.0, 0.0, log1p)


@triton.jit
@no_type_check
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
@no_type_check
def _steps(raw, valid, SOFTPLUS: tl.constexpr):
    """Return the step sizes, 0 for steps that are not `valid`."""
    if SOFTPLUS:
        raw = _softplus(raw)
    return tl.where(valid, raw, 0.0)


@triton.jit
@no_type_check
def forward(
    u, delta, A, B, C, D, z, bias, initial,
    length, width,
    y, last, entering,
    STATES: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, WRITE_LAST: tl.constexpr, KEEP: tl.constexpr,
    WRITE_Y: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """Scan one sequence over one block of channels.

    u, delta, z and y are `b l e`, A is `n e`, initial and last are `b e n`, B and C are `b l g n`. entering is
    `b chunks e n`, the state that enters each chunk. ROWS is STATES rounded up to a power of two. Without WRITE_Y only
    the last state is computed. With ADJOINT the recurrence is that of the gradients, h <- exp(step A) (h + u B).
    """
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    group = (tl.program_id(1) * CHANNELS) // (width // GROUPS)
    inside = channel < width
    state = tl.arange(0, ROWS)
    of_state = channel[None, :] * STATES + state[:, None]
    tokens_start = sequence * length * width
    steps_start = sequence * length * GROUPS * STATES
    both = inside[None, :] & (state[:, None] < STATES)
    within = tl.arange(0, CHUNK)
    chunks = (length + CHUNK - 1) // CHUNK
    h = tl.zeros((ROWS, CHANNELS), tl.float32)
    if HAS_INITIAL:
        h = _load(initial + sequence * width * STATES + of_state, both)
    if HAS_D:
        skip = _load(D + channel, inside)
    if HAS_BIAS:
        shift = _load(bias + channel, inside)

    for visited in range(chunks):
        chunk = chunks - 1 - visited if REVERSE else visited
        if KEEP:
            at = (sequence * chunks + chunk) * width * STATES
            tl.store(entering + at + of_state, h, mask=both)
        t = chunk * CHUNK + within
        valid = (t < length)[:, None] & inside[None, :]
        at = tokens_start + (t[:, None] * width + channel[None, :])
        tokens = _load(u + at, valid)
        raw = _load(delta + at, valid)
        if HAS_BIAS:
            raw += shift[None, :]
        step = _steps(raw, valid, SOFTPLUS)
        v = step * tokens
        out = tl.zeros((CHUNK, CHANNELS), tl.float32)
        if HAS_D:
            out = skip[None, :] * tokens
        of_step = (
            steps_start
            + (chunk * CHUNK * GROUPS + group) * STATES
            + (within * GROUPS * STATES)[:, None]
        )
        exists = (t < length)[:, None]
        for n in range(STATES):
            rate = _load(A + n * width + channel, inside)
            a = tl.exp(step * rate[None, :])
            if ADJOINT:
                b = a * tokens * _load(B + of_step + n, exists)
            else:
                b = v * _load(B + of_step + n, exists)
            x, after = _recurrence(a, b, _row(h, state, n), within, CHUNK, REVERSE, False)
            if WRITE_Y:
                out += x * _load(C + of_step + n, exists)
            h = tl.where(state[:, None] == n, after[None, :], h)
        if HAS_Z:
            gate = _load(z + at, valid)
            out *= gate * _sigmoid(gate)
        if WRITE_Y:
            tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)
    if WRITE_LAST:
        tl.store(last + sequence * width * STATES + of_state, h, mask=both)


@triton.jit
@no_type_check
def backward(
    u, delta, A, B, C, D, z, bias, initial, entering, y_bar, last_bar,
    length, width,
    u_bar, delta_bar, A_bar, B_bar, C_bar, D_bar, z_bar, bias_bar, initial_bar,
    STATES: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_LAST: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one sequence over one block of channels, chunks in the opposite order.

    With g_t the gradient of h_t:  g_t = C_t s_t + exp(step_{t+1} A) g_{t+1},  where s is the gradient of the ungated
    output and t + 1 is the step visited after t. With KEPT the states of a chunk are computed again from `entering`;
    otherwise the scan is one chunk and starts from `initial`. A_bar is `b e n`, D_bar and bias_bar are `b e`, B_bar and
    C_bar are `blocks b l n`. These are partial sums, which the caller adds up over b or blocks.
    """
    sequence = tl.program_id(0).to(tl.int64)
    batch = tl.num_programs(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    group = (tl.program_id(1) * CHANNELS) // (width // GROUPS)
    inside = channel < width
    state = tl.arange(0, ROWS)
    of_state = channel[None, :] * STATES + state[:, None]
    tokens_start = sequence * length * width
    steps_start = sequence * length * GROUPS * STATES
    both = inside[None, :] & (state[:, None] < STATES)
    within = tl.arange(0, CHUNK)
    chunks = (length + CHUNK - 1) // CHUNK
    states = sequence * width * STATES
    share = (tl.program_id(1).to(tl.int64) * batch + sequence) * length
    g = tl.zeros((ROWS, CHANNELS), tl.float32)
    if HAS_LAST:
        g = _load(last_bar + states + of_state, both)
    rates_bar = tl.zeros((ROWS, CHANNELS), tl.float32)
    if HAS_D:
        skip = _load(D + channel, inside)
        skip_bar = tl.zeros((CHANNELS,), tl.float32)
    if HAS_BIAS:
        shift = _load(bias + channel, inside)
        shift_bar = tl.zeros((CHANNELS,), tl.float32)

    for visited in range(chunks):
        chunk = visited if REVERSE else chunks - 1 - visited
        t = chunk * CHUNK + within
        after = t - 1 if REVERSE else t + 1
        valid = (t < length)[:, None] & inside[None, :]
        # The step after the last one does not exist: there exp(0) passes on the last state's gradient.
        follows = ((after >= 0) & (after < length))[:, None] & inside[None, :]
        at = tokens_start + (t[:, None] * width + channel[None, :])
        at_after = tokens_start + (after[:, None] * width + channel[None, :])
        tokens = _load(u + at, valid)
        raw = _load(delta + at, valid)
        raw_after = _load(delta + at_after, follows)
        if HAS_BIAS:
            raw += shift[None, :]
            raw_after += shift[None, :]
        step = _steps(raw, valid, SOFTPLUS)
        step_after = _steps(raw_after, follows, SOFTPLUS)
        v = step * tokens
        out_bar = _load(y_bar + at, valid)
        s = out_bar
        if HAS_Z:
            gate = _load(z + at, valid)
            opened = _sigmoid(gate)
            s = out_bar * gate * opened
            out = tl.zeros((CHUNK, CHANNELS), tl.float32)
        v_bar = tl.zeros((CHUNK, CHANNELS), tl.float32)
        step_bar = tl.zeros((CHUNK, CHANNELS), tl.float32)
        exists = (t < length)[:, None]
        of_step = (
            steps_start
            + (chunk * CHUNK * GROUPS + group) * STATES
            + (within * GROUPS * STATES)[:, None]
        )
        of_share = (share + chunk * CHUNK) * STATES + within * STATES
        for n in range(STATES):
            rate = _load(A + n * width + channel, inside)
            before = tl.zeros((CHANNELS,), tl.float32)
            if KEPT:
                kept = (sequence * chunks + chunk) * width * STATES
                before = _load(entering + kept + channel * STATES + n, inside)
            elif HAS_INITIAL:
                before = _load(initial + states + channel * STATES + n, inside)
            b_n = _load(B + of_step + n, exists)
            c_n = _load(C + of_step + n, exists)
            a = tl.exp(step * rate[None, :])
            b = v * b_n
            # Not x - b, so that A's gradient is exactly 0 for the first step of a scan without an initial state.
            decayed, _ = _recurrence(a, b, before, within, CHUNK, REVERSE, True)
            x = decayed + b
            a = tl.exp(step_after * rate[None, :])
            x_bar, entered = _recurrence(
                a, c_n * s, _row(g, state, n), within, CHUNK, not REVERSE, False
            )
            if HAS_Z:
                out += x * c_n
            v_bar += x_bar * b_n
            through = x_bar * decayed
            step_bar += through * rate[None, :]
            rate_bar = tl.sum(through * step, axis=0)
            rates_bar += tl.where(state[:, None] == n, rate_bar[None, :], 0.0)
            b_bar = tl.sum(x_bar * v, axis=1)
            c_bar = tl.sum(x * s, axis=1)
            tl.store(B_bar + of_share + n, b_bar, mask=t < length)
            tl.store(C_bar + of_share + n, c_bar, mask=t < length)
            g = tl.where(state[:, None] == n, entered[None, :], g)
        step_bar += v_bar * tokens
        tokens_bar = v_bar * step
        if HAS_D:
            tokens_bar += skip[None, :] * s
            skip_bar += tl.sum(s * tokens, axis=0)
        if HAS_Z:
            if HAS_D:
                out += skip[None, :] * tokens
            gate_bar = out_bar * out * opened * (1.0 + gate * (1.0 - opened))
            tl.store(z_bar + at, gate_bar.to(z_bar.dtype.element_ty), mask=valid)
        if SOFTPLUS:
            step_bar *= _sigmoid(raw)
        step_bar = tl.where(valid, step_bar, 0.0)
        if HAS_BIAS:
            shift_bar += tl.sum(step_bar, axis=0)
        tl.store(u_bar + at, tokens_bar.to(u_bar.dtype.element_ty), mask=valid)
        tl.store(delta_bar + at, step_bar.to(delta_bar.dtype.element_ty), mask=valid)
    tl.store(A_bar + states + of_state, rates_bar, mask=both)
    if HAS_D:
        tl.store(D_bar + sequence * width + channel, skip_bar, mask=inside)
    if HAS_BIAS:
        tl.store(bias_bar + sequence * width + channel, shift_bar, mask=inside)
    if HAS_INITIAL:
        # g is the gradient of the first visited state, from which one decay leads to `initial`. With REVERSE and a
        # partial chunk the steps past the end were visited before it, and passed on the decayed gradient already.
        t = length - 1 if REVERSE else 0
        raw = _load(delta + tokens_start + t * width + channel, inside)
        if HAS_BIAS:
            raw += shift
        if REVERSE:
            inside = inside & (length % CHUNK == 0)
        rates = _load(A + state[:, None] * width + channel[None, :], both)
        decay = tl.exp(_steps(raw, inside, SOFTPLUS)[None, :] * rates)
        tl.store(initial_bar + states + of_state, decay * g, mask=both)

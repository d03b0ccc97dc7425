"""Gradients of the scan and the convolution in NumPy float64, one step at a time, and random arrays for both."""

from __future__ import annotations

import numpy as np

from tests.oracle import ops
from tests.oracle.ops import sigmoid

Arrays = dict[str, np.ndarray]
SEQUENCES = ("u", "delta", "B", "C", "z")


def flipped(arrays: Arrays, names: tuple[str, ...]) -> Arrays:
    return {k: x[:, ::-1] if k in names else x for k, x in arrays.items()}


def scan(arrays: Arrays, *, delta_softplus: bool, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return y and the last state."""
    given = flipped(arrays, SEQUENCES) if reverse else arrays
    y, last_state = ops.selective_scan(**given, delta_softplus=delta_softplus)
    return (y[:, ::-1] if reverse else y), last_state


def scan_gradients(
    arrays: Arrays, y_bar: np.ndarray, last_bar: np.ndarray, *, delta_softplus: bool, reverse: bool
) -> Arrays:
    """Return gradients of sum(y * y_bar) + sum(last_state * last_bar)."""
    if reverse:
        forward = flipped(arrays, SEQUENCES)
        bars = scan_gradients(
            forward, y_bar[:, ::-1], last_bar, delta_softplus=delta_softplus, reverse=False
        )
        return flipped(bars, SEQUENCES)
    u, delta, A, B, C = (arrays[k] for k in ("u", "delta", "A", "B", "C"))
    D, z = arrays.get("D"), arrays.get("z")
    b, length, e = u.shape
    groups = B.shape[2] if B.ndim == 4 else 1
    per_channel = [np.repeat(x.reshape(b, length, groups, -1), e // groups, axis=2) for x in (B, C)]
    raw = delta + arrays.get("delta_bias", 0.0)
    step = np.logaddexp(0, raw) if delta_softplus else raw

    states = [np.zeros((b, e, A.shape[1]))]
    for t in range(length):
        v = (step[:, t] * u[:, t])[..., None]
        states.append(np.exp(step[:, t, :, None] * A) * states[-1] + v * per_channel[0][:, t])
    s = np.stack([(states[t + 1] * per_channel[1][:, t]).sum(-1) for t in range(length)], axis=1)

    bars = {k: np.zeros_like(x) for k, x in arrays.items()}
    before_gate = s + (0 if D is None else D * u)
    if z is not None:
        gate = sigmoid(z)
        bars["z"] = y_bar * before_gate * gate * (1 + z * (1 - gate))
        y_bar = y_bar * z * gate
    if D is not None:
        bars["D"] = (y_bar * u).sum((0, 1))
        bars["u"] = y_bar * D
    step_bar = np.zeros_like(step)
    B_bar, C_bar = np.zeros_like(per_channel[0]), np.zeros_like(per_channel[1])
    h_bar = last_bar.copy()
    for t in reversed(range(length)):
        h_bar = h_bar + y_bar[:, t, :, None] * per_channel[1][:, t]
        C_bar[:, t] = y_bar[:, t, :, None] * states[t + 1]
        decay = np.exp(step[:, t, :, None] * A)
        B_bar[:, t] = h_bar * (step[:, t] * u[:, t])[..., None]
        v_bar = (h_bar * per_channel[0][:, t]).sum(-1)
        exponent_bar = h_bar * decay * states[t]
        bars["u"][:, t] += v_bar * step[:, t]
        step_bar[:, t] = v_bar * u[:, t] + (exponent_bar * A).sum(-1)
        bars["A"] += (exponent_bar * step[:, t, :, None]).sum(0)
        h_bar = decay * h_bar
    bars["delta"] = step_bar * sigmoid(raw) if delta_softplus else step_bar
    if "delta_bias" in bars:
        bars["delta_bias"] = bars["delta"].sum((0, 1))
    for name, x in (("B", B_bar), ("C", C_bar)):
        x = x.reshape(b, length, groups, e // groups, -1).sum(3)
        bars[name] = x.reshape(arrays[name].shape)
    return bars


def conv(arrays: Arrays, *, activation: str | None, reverse: bool) -> np.ndarray:
    x = arrays["x"][:, ::-1] if reverse else arrays["x"]
    y = ops.causal_conv1d(x, arrays["kernel"], arrays.get("bias"))
    y = y * sigmoid(y) if activation == "silu" else y
    return y[:, ::-1] if reverse else y


def conv_gradients(
    arrays: Arrays, y_bar: np.ndarray, *, activation: str | None, reverse: bool
) -> Arrays:
    """Return gradients of sum(y * y_bar)."""
    if reverse:
        bars = conv_gradients(
            flipped(arrays, ("x",)), y_bar[:, ::-1], activation=activation, reverse=False
        )
        return flipped(bars, ("x",))
    x, kernel = arrays["x"], arrays["kernel"]
    if activation == "silu":
        y = ops.causal_conv1d(x, kernel, arrays.get("bias"))
        gate = sigmoid(y)
        y_bar = y_bar * gate * (1 + y * (1 - gate))
    bars = {k: np.zeros_like(a) for k, a in arrays.items()}
    width = kernel.shape[0]
    for t in range(x.shape[1]):
        for j in range(width):
            source = t - (width - 1) + j
            if source >= 0:
                bars["x"][:, source] += y_bar[:, t] * kernel[j]
                bars["kernel"][j] += (y_bar[:, t] * x[:, source]).sum(0)
    if "bias" in bars:
        bars["bias"] = y_bar.sum((0, 1))
    return bars


def finite_difference(f, arrays: Arrays, bars: Arrays, seed: int) -> tuple[float, float]:
    """Return the slope of f along a random direction: by central differences, and by `bars`."""
    r = np.random.default_rng(seed)
    direction = {k: r.normal(size=x.shape) for k, x in arrays.items()}
    eps = 1e-5
    ends = [f({k: x + sign * eps * direction[k] for k, x in arrays.items()}) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * eps), sum(np.sum(bars[k] * direction[k]) for k in arrays)

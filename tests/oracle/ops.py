"""The functions around the scan, and the scan itself: NumPy, float64, one line of mathematics at a time.

Letters: b batch, l tokens, e inner width, n state size, k convolution width, g groups of channels sharing B and C.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    """Compute 1 / (1 + exp(-x)), without overflow on either side."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def silu(x: Array) -> Array:
    """Compute x * sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    """Compute log(1 + exp(x))."""
    return np.logaddexp(0.0, x)


def gelu(x: Array) -> Array:
    """Compute the exact form, x * Phi(x), with Phi the normal distribution function."""
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def softmax(x: Array, axis: int = -1) -> Array:
    """Compute exp(x) / sum(exp(x)) along one axis."""
    weights = np.exp(x - x.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


def linear(params: dict[str, Array], name: str, x: Array) -> Array:
    """Compute x @ kernel (+ bias, where the dictionary holds one); kernels are (in, out)."""
    y = x @ params[f"{name}.kernel"]
    bias = params.get(f"{name}.bias")
    return y if bias is None else y + bias


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """Compute (x - mean) / sqrt(variance + eps) * scale + bias over the last axis, with the biased variance."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * scale + bias


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Compute x / sqrt(mean(x^2) + eps) * scale over the last axis."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def norm(kind: str, params: dict[str, Array], name: str, x: Array, eps: float) -> Array:
    """Apply the norm of one of the two kinds, "rms" (scale only) or "layer" (scale and bias)."""
    if kind == "rms":
        return rms_norm(x, params[f"{name}.scale"], eps)
    return layer_norm(x, params[f"{name}.scale"], params[f"{name}.bias"], eps)


def causal_conv1d(x: Array, kernel: Array, bias: Array | None) -> Array:
    """Convolve every channel backwards in time: y_t = bias + sum_j kernel_j x_{t-(k-1)+j}.

    x is (b, l, e), kernel (k, e); tokens before the first are zero, the last tap sits on the current token.
    """
    width, length = kernel.shape[0], x.shape[1]
    y = np.zeros_like(x) if bias is None else np.zeros_like(x) + bias
    for t in range(length):
        for j in range(width):
            source = t - (width - 1) + j
            if source >= 0:
                y[:, t] += kernel[j] * x[:, source]
    return y


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    *,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = True,
) -> tuple[Array, Array]:
    """Compute state_t = exp(step_t A) state_{t-1} + step_t B_t u_t;  y_t = (state_t . C_t + D u_t) * silu(z_t).

    u, delta, z are (b, l, e); A (e, n); B, C (b, l, n), or (b, l, g, n) where consecutive blocks of e / g channels
    share a group; D, delta_bias (e,). Returns y (b, l, e) and the state after the last step (b, e, n).
    """
    batch, length, inner = u.shape
    step = delta if delta_bias is None else delta + delta_bias
    step = softplus(step) if delta_softplus else step
    if B.ndim == 3:
        B, C = B[:, :, None, :], C[:, :, None, :]
    B = np.repeat(B, inner // B.shape[2], axis=2)
    C = np.repeat(C, inner // C.shape[2], axis=2)
    state = np.zeros((batch, inner, A.shape[1]), u.dtype)
    y = np.zeros_like(u)
    for t in range(length):
        decay = np.exp(step[:, t, :, None] * A)
        state = decay * state + (step[:, t] * u[:, t])[:, :, None] * B[:, t]
        y[:, t] = (state * C[:, t]).sum(axis=-1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * silu(z)
    return y, state


def cubic(distance: float, a: float = -0.75) -> float:
    """Evaluate Keys' cubic convolution kernel."""
    s = abs(distance)
    if s <= 1.0:
        return (a + 2.0) * s**3 - (a + 3.0) * s**2 + 1.0
    if s < 2.0:
        return a * s**3 - 5.0 * a * s**2 + 8.0 * a * s - 4.0 * a
    return 0.0


def cubic_matrix(source: int, target: int) -> Array:
    """Return (target, source) weights: half-pixel centres, border taps clamped, no antialiasing."""
    weights = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        first = math.floor(centre) - 1
        for tap in range(first, first + 4):
            weights[i, min(max(tap, 0), source - 1)] += cubic(centre - tap)
    return weights


def resize_bicubic(table: Array, target: tuple[int, int]) -> Array:
    """Resample (rows, columns, d) to `target` rows and columns."""
    down = cubic_matrix(table.shape[0], target[0])
    across = cubic_matrix(table.shape[1], target[1])
    return np.einsum("ij,jkd,lk->ild", down, table, across)


def sincos_table(
    grid: tuple[int, int], width: int, *, class_token: bool = False, dtype: type = np.float32
) -> Array:
    """Compute the fixed table (rows * columns, width).

    Half of the channels stand for the column, half for the row; sines come first, then cosines.

    Evaluated in float32, as the released weights saw it, or for ViT in float64 (`dtype`), and rounded to float32.
    With a class token a row of zeros comes first.
    """
    frequency = dtype(1.0) / dtype(10000.0) ** (
        np.arange(width // 4, dtype=dtype) / dtype(width / 4)
    )
    rows, columns = (np.arange(n, dtype=dtype) for n in grid)

    def half(positions: Array) -> Array:
        angles = positions.reshape(-1)[:, None] * frequency
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    column_of, row_of = np.meshgrid(columns, rows)
    table = np.concatenate([half(column_of), half(row_of)], axis=1).astype(np.float32)
    return np.concatenate([np.zeros((1, width), np.float32), table]) if class_token else table

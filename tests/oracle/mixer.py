"""The bidirectional mixer: two branches over the same tokens, averaged, normed, gated and projected.

x, z      = split(in_proj(h))
branch    : c = silu(conv(x));  u = pool(c);  dt, B, C = split(x_proj(u))
            y = unpool(scan(u, softplus(dt_proj(dt)), A, B, C)) + D c
out       = out_proj(post_norm((forward + reversed backward) / 2) * silu(z)) * layer_scale
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from tests.oracle.ops import Array, causal_conv1d, linear, norm, selective_scan, silu
from tests.oracle.pooling import Steps, pool, reversed_steps, unpool


def branch(
    params: dict[str, Array], config: SimpleNamespace, x: Array, steps: Steps, class_at: int | None
) -> dict[str, Array]:
    """Run one direction over tokens already in that direction's order.

    Returns every inner value by name: conv (b l e), u, delta (before its bias), y_scan (b s e), B, C (b s n), and
    the branch's result y (b l e).
    """
    convolved = x
    if "conv.kernel" in params:
        convolved = causal_conv1d(x, params["conv.kernel"], params.get("conv.bias"))
    tokens = silu(convolved)
    scores = linear(params, "score", tokens) if config.pooling == "attention" else None
    u = pool(
        tokens, steps, config.pooling, class_at=class_at, scale=config.pool_scale, scores=scores
    )

    state_size = params["A_log"].shape[1]
    projected = linear(params, "x_proj", u)
    rank = projected.shape[-1] - 2 * state_size
    dt, B, C = np.split(projected, [rank, rank + state_size], axis=-1)
    delta = dt @ params["dt_proj.kernel"]
    A, D = -np.exp(params["A_log"]), params["D"]
    y_scan, _ = selective_scan(u, delta, A, B, C, delta_bias=params["dt_proj.bias"])
    if config.unpool == "after_skip":
        y = unpool(y_scan + D * u, steps)
    else:
        y = unpool(y_scan, steps) + D * tokens
    return {
        "conv": tokens,
        "u": u,
        "delta": delta,
        "B": B,
        "C": C,
        "A": A,
        "y_scan": y_scan,
        "y": y,
    }


def mixer(
    params: dict[str, Array],
    config: SimpleNamespace,
    hidden: Array,
    steps: Steps,
    class_at: int | None = None,
) -> tuple[Array, dict[str, dict[str, Array]]]:
    """Mix (b, l, d) -> (b, l, d).

    Also return the inner values of both branches, the backward ones in reversed order.
    """
    x, z = np.split(linear(params, "in_proj", hidden), 2, axis=-1)
    length = x.shape[1]
    forward = branch(subset(params, "forward"), config, x, steps, class_at)
    backward = branch(
        subset(params, "backward"),
        config,
        x[:, ::-1],
        reversed_steps(steps),
        None if class_at is None else length - 1 - class_at,
    )
    y = (forward["y"] + backward["y"][:, ::-1]) / 2
    if config.post_norm != "none":
        y = norm(config.post_norm, params, "post_norm", y, 1e-5)
    out = linear(params, "out_proj", y * silu(z))
    if "layer_scale" in params:
        out = out * params["layer_scale"]
    return out, {"forward": forward, "backward": backward}


def subset(params: dict[str, Array], prefix: str) -> dict[str, Array]:
    """Return the entries under one prefix, with the prefix taken off."""
    return {
        name[len(prefix) + 1 :]: value
        for name, value in params.items()
        if name.startswith(prefix + ".")
    }

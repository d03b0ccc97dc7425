"""Define the public function `causal_conv1d`: check its arguments, choose an implementation, run it."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.causal_conv1d import reference, xla
from pallas_kernels.checks import as_floats
from pallas_kernels.sharding import per_shard

IMPLEMENTATIONS: tuple[str, ...] = ("auto", "xla", "reference")
"""Every name that `causal_conv1d(..., implementation=...)` takes."""


def causal_conv1d(
    x: Float[Array, "b l e"],
    kernel: Float[Array, "k e"],
    bias: Float[Array, " e"] | None = None,
    *,
    activation: str | None = "silu",
    reverse: bool = False,
    implementation: str = "auto",
) -> Float[Array, "b l e"]:
    """Compute a depthwise causal convolution along l, channels last, with zeros before the first token.

        y_t = act(bias + sum over j < k of kernel_j x_{t - (k-1) + j})

    It can be differentiated with respect to every array. Sums are float32, or the widest dtype of x and kernel.

    Args:
        x: tokens, float of any width.
        kernel: taps; the last one multiplies the current token, in both directions.
        bias: added before the activation.
        activation: "silu", or None for none.
        reverse: look ahead instead of back. Equal to flipping x and y along l.
        implementation: "auto" (as "xla"), "xla" or "reference".

    Returns:
        y in x's dtype.

    Raises:
        ValueError: a shape, rank, dtype or name does not fit.
    """
    x = as_floats("causal_conv1d", "x", x, "b l e")
    kernel = as_floats("causal_conv1d", "kernel", kernel)
    bias = None if bias is None else as_floats("causal_conv1d", "bias", bias)
    channels = x.shape[2]
    if kernel.ndim != 2 or kernel.shape[1] != channels or kernel.shape[0] < 1:
        raise ValueError(
            f"causal_conv1d: kernel must have shape (width >= 1, {channels}) (k e) "
            f"to go with x {x.shape}, got {kernel.shape}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(
            f"causal_conv1d: bias must have shape ({channels},) (e) "
            f"to go with x {x.shape}, got {bias.shape}"
        )
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation must be 'silu' or None, got {activation!r}")
    if implementation not in IMPLEMENTATIONS:
        choices = ", ".join(repr(choice) for choice in IMPLEMENTATIONS)
        raise ValueError(
            f"causal_conv1d: implementation must be one of {choices}; got {implementation!r}"
        )
    run = reference.conv if implementation == "reference" else xla.conv
    return per_shard(
        lambda _, *arrays: run(*arrays, activation=activation, reverse=bool(reverse)),
        ("b l e", "k e", None if bias is None else "e"),
        "b l e",
        split="b e",
        opaque=False,
    )(x, kernel, bias)

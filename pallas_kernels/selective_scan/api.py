"""Define the public function `selective_scan`: check arguments, choose an implementation, run it."""

from __future__ import annotations

from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.checks import as_floats
from pallas_kernels.selective_scan import implementations
from pallas_kernels.selective_scan.chunks import chunk_length
from pallas_kernels.selective_scan.types import ScanInputs, ScanOptions

NAME = "selective_scan"


@overload
def selective_scan(
    u: Float[Array, "b l e"],
    delta: Float[Array, "b l e"],
    A: Float[Array, "e n"],
    B: Float[Array, "b l *g n"],
    C: Float[Array, "b l *g n"],
    *,
    D: Float[Array, " e"] | None = None,
    z: Float[Array, "b l e"] | None = None,
    delta_bias: Float[Array, " e"] | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
    return_last_state: Literal[False] = False,
    initial_state: Float[Array, "b e n"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "b l e"]: ...


@overload
def selective_scan(
    u: Float[Array, "b l e"],
    delta: Float[Array, "b l e"],
    A: Float[Array, "e n"],
    B: Float[Array, "b l *g n"],
    C: Float[Array, "b l *g n"],
    *,
    D: Float[Array, " e"] | None = None,
    z: Float[Array, "b l e"] | None = None,
    delta_bias: Float[Array, " e"] | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
    return_last_state: Literal[True],
    initial_state: Float[Array, "b e n"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "b l e"], Float[Array, "b e n"]]: ...


def selective_scan(
    u: Float[Array, "b l e"],
    delta: Float[Array, "b l e"],
    A: Float[Array, "e n"],
    B: Float[Array, "b l *g n"],
    C: Float[Array, "b l *g n"],
    *,
    D: Float[Array, " e"] | None = None,
    z: Float[Array, "b l e"] | None = None,
    delta_bias: Float[Array, " e"] | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
    return_last_state: bool = False,
    initial_state: Float[Array, "b e n"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "b l e"] | tuple[Float[Array, "b l e"], Float[Array, "b e n"]]:
    """Compute the selective state-space recurrence of Mamba (Gu and Dao 2023, equations 2-4), channels last.

    Per batch entry, channel and state, over the steps t in the order visited:

        step_t = softplus(delta_t + delta_bias)
        h_t    = exp(step_t A) h_{t-1} + step_t B_t u_t,     h_0 = initial_state or 0
        y_t    = (sum over n of C_t h_t  +  D u_t) SiLU(z_t)

    `jax.grad` works for every array, once. For higher derivatives choose an XLA implementation; for forward mode
    (`jax.jvp`, `jax.jacfwd`) choose "reference". The backward pass saves the inputs and one state per chunk of steps,
    and recomputes the other states, so that no array `b l e n` is stored. States, steps, A and all sums are float32, or
    the widest dtype of the inputs.

    Under a sharded `jit`, each device scans its part of b and e, split as u is. Weights that are split in another way
    are gathered. A program with the GPU kernels can be exported for one device only.

    Args:
        u: inputs, float of any width.
        delta: step sizes before bias and softplus.
        A: state matrix diagonals; negative for a decaying state.
        B: input weights, `b l n`, or `b l g n` with channels [i e/g, (i+1) e/g) in group i.
        C: output weights, shaped like B.
        D: skip weights; no skip if None.
        z: gate; no gate if None.
        delta_bias: added to delta.
        delta_softplus: whether steps are softplus(delta + delta_bias) or delta + delta_bias.
        reverse: visit the steps from last to first. Equal to flipping u, delta, B, C, z and y along l.
        return_last_state: also return the state after the last visited step.
        initial_state: the state before the first visited step; zero if None. To scan a sequence in pieces, pass the
            last state of one call to the next. The Pallas kernels do not accept it.
        implementation: "auto" (the fastest on the platform), "xla" (the faster of the next two),
            "xla_associative", "xla_sequential", "pallas" (Hopper GPUs), "triton" (NVIDIA GPUs from Ampere on, with the
            extra `triton`; `jax.vmap` and what its kernels do not cover run as "xla_associative", which is logged
            once), or "reference".

    Returns:
        y in u's dtype; with `return_last_state`, (y, last state), the latter float32 or wider.

    Raises:
        ValueError: a shape, rank or dtype does not fit, or the implementation's name is unknown.
        NotImplementedError: the named implementation does not support these arguments.
    """
    inputs = _inputs(u, delta, A, B, C, D, z, delta_bias, initial_state)
    u, A = inputs.u, inputs.A
    if u.shape[0] == 0:  # Kernels and loops do not accept an empty batch.
        y, last_state = jnp.zeros(u.shape, u.dtype), jnp.zeros((0, *A.shape), inputs.wide_dtype)
        return (y, last_state) if return_last_state else y
    run = implementations.get(implementation, inputs)
    options = ScanOptions(
        delta_softplus=bool(delta_softplus),
        reverse=bool(reverse),
        return_last_state=bool(return_last_state),
        chunk=chunk_length(u.shape[1]),
    )
    y, last_state = run(inputs, options)
    return (y, last_state) if return_last_state else y


def _inputs(u, delta, A, B, C, D, z, delta_bias, initial_state=None) -> ScanInputs:
    """Check ranks, shapes and dtypes; give B and C a group axis."""
    given = {
        "u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias,
        "initial_state": initial_state,
    }  # fmt: skip
    arrays = {
        name: None
        if x is None and name in ("D", "z", "delta_bias", "initial_state")
        else as_floats(NAME, name, x)
        for name, x in given.items()
    }
    u, A, B = arrays["u"], arrays["A"], arrays["B"]
    _expect_rank("u", u, "b l e", 3)
    _expect_rank("A", A, "e n", 2)
    b, length, e = u.shape
    n = A.shape[1]
    if min(length, e, n) < 1:
        raise ValueError(
            f"selective_scan: no axis but the batch may be empty, got u {u.shape} (b l e) and A {A.shape} (e n)"
        )
    if B.ndim not in (3, 4):
        raise ValueError(f"selective_scan: B must be `b l n` or `b l g n`, got shape {B.shape}")
    groups = B.shape[2] if B.ndim == 4 else 1
    if groups < 1 or e % groups:
        raise ValueError(
            f"selective_scan: the {e} channels of u do not split evenly into the {groups} groups "
            f"of B {B.shape} (b l g n)"
        )
    weights = (b, length, n) if B.ndim == 3 else (b, length, groups, n)
    letters = "b l n" if B.ndim == 3 else "b l g n"
    for name, letter, shape in (
        ("delta", "b l e", (b, length, e)),
        ("A", "e n", (e, n)),
        ("B", letters, weights),
        ("C", letters, weights),
        ("D", "e", (e,)),
        ("z", "b l e", (b, length, e)),
        ("delta_bias", "e", (e,)),
        ("initial_state", "b e n", (b, e, n)),
    ):
        x = arrays[name]
        if x is not None and x.shape != shape:
            raise ValueError(
                f"selective_scan: {name} must have shape {shape} ({letter}) "
                f"to go with u {u.shape} and A {A.shape}, got {x.shape}"
            )
    if B.ndim == 3:
        arrays["B"], arrays["C"] = B[:, :, None, :], arrays["C"][:, :, None, :]
    return ScanInputs(**arrays)


def _expect_rank(name: str, x: jax.Array, letters: str, rank: int) -> None:
    if x.ndim != rank:
        raise ValueError(
            f"selective_scan: {name} must have {rank} dimensions ({letters}), got shape {x.shape}"
        )

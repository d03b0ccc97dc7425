"""The scans that matter, as arguments for tests and benchmarks alike."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.dtypes import wide_dtype


@dataclasses.dataclass(frozen=True)
class ScanSpec:
    """The shape and options of one scan.

    groups None is the plain form, B and C `b l n`; an integer is `b l g n`.
    """

    batch: int
    length: int
    channels: int
    states: int = 16
    groups: int | None = None
    D: bool = True
    z: bool = False
    delta_bias: bool = True
    delta_softplus: bool = True
    reverse: bool = False

    @property
    def name(self) -> str:
        """Such as "b128_l14_e384_n16_reverse"."""
        options = [f"g{self.groups}"] if self.groups is not None else []
        options += ["z"] if self.z else []
        options += ["reverse"] if self.reverse else []
        sizes = f"b{self.batch}_l{self.length}_e{self.channels}_n{self.states}"
        return "_".join([sizes, *options])

    def arguments(
        self, seed: int, dtype: DTypeLike = jnp.float32
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Draw arrays, and return them with the static options, for `selective_scan(**arrays, **options)`.

        Sequences (u, delta, B, C, z) are of `dtype`, weights (A, D, delta_bias) of float32 or wider. Values
        are like a trained model's: steps between 0.001 and 0.5, A between -1 and -n and unequal.
        """
        keys = iter(jax.random.split(jax.random.key(seed), 8))
        wide = wide_dtype(dtype)
        sequence = (self.batch, self.length, self.channels)
        group = () if self.groups is None else (self.groups,)

        def normal(*shape: int) -> jax.Array:
            return jax.random.normal(next(keys), shape, wide).astype(dtype)

        arrays = {
            "u": normal(*sequence),
            "B": normal(self.batch, self.length, *group, self.states),
            "C": normal(self.batch, self.length, *group, self.states),
        }
        steps = jnp.exp(jax.random.uniform(next(keys), sequence, wide, jnp.log(1e-3), jnp.log(0.5)))
        bias = jax.random.normal(next(keys), (self.channels,), wide) * (
            0.5 if self.delta_bias else 0
        )
        if self.delta_softplus:
            arrays["delta"] = (jnp.log(jnp.expm1(steps)) - bias).astype(dtype)
        else:
            bias = 1e-3 * bias
            arrays["delta"] = (steps - bias).astype(dtype)
        spread = jax.random.uniform(next(keys), (self.channels, self.states), wide, 0.5, 1.0)
        arrays["A"] = -spread * jnp.arange(1, self.states + 1, dtype=wide)
        if self.D:
            arrays["D"] = jax.random.normal(next(keys), (self.channels,), wide)
        if self.z:
            arrays["z"] = normal(*sequence)
        if self.delta_bias:
            arrays["delta_bias"] = bias
        return arrays, {"delta_softplus": self.delta_softplus, "reverse": self.reverse}


# Inner width 384 is the Tiny size, 768 Small, 1536 Base.
TARGETS = (
    ScanSpec(128, 14, 384),
    ScanSpec(128, 196, 384),
    ScanSpec(32, 1024, 384),
    ScanSpec(2, 16384, 384),
)
"""The four shapes that kernels are measured by: FastVim at 224 pixels, Vim at 224, 512 and 2048."""

FASTVIM = (
    ScanSpec(64, 8, 128),
    ScanSpec(128, 14, 384, reverse=True),
    ScanSpec(128, 14, 1536),
    ScanSpec(32, 32, 384),
    ScanSpec(8, 64, 384),
    ScanSpec(2, 128, 768),
)
"""Pooled tokens: 8 of the digits example, then 14 to 128 for images of 224 to 2048 pixels."""

VIM = (
    ScanSpec(128, 197, 384, z=True),
    ScanSpec(128, 196, 1536),
    ScanSpec(8, 4096, 384),
    ScanSpec(1, 16384, 384, reverse=True),
)
"""One step per token."""

SMALL = (
    ScanSpec(2, 1, 6, states=16),
    ScanSpec(2, 7, 5, states=3, z=True),
    ScanSpec(1, 14, 33, states=16, D=False, reverse=True),
    ScanSpec(3, 14, 32, states=8, groups=2, delta_bias=False),
    ScanSpec(2, 65, 7, states=4, groups=1, z=True, reverse=True),
    ScanSpec(1, 130, 3, states=5, delta_softplus=False),
    ScanSpec(1, 131, 6, states=2, groups=3, D=False, z=True),
)
"""Odd and tiny ones, every option among them, for a CPU or an interpreter."""


def of_length(length: int, tokens: int, channels: int, states: int = 16) -> ScanSpec:
    """Describe a scan of about `tokens` steps in all sequences together, a power of two of them.

    Softplus and bias, no skip.
    """
    batch = 2 ** max(0, round(math.log2(tokens / length)))
    return ScanSpec(batch, length, channels, states, D=False)


LENGTHS = (7, 14, 32, 64, 128, 196, 1024, 4096, 16384)
"""From the pooled rows of a small image to all tokens of one of 2048 pixels."""

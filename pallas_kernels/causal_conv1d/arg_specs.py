"""The convolutions that matter, as arguments for tests and benchmarks alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.dtypes import wide_dtype


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """The shape and options of one convolution."""

    batch: int
    length: int
    channels: int
    width: int = 4
    bias: bool = True
    activation: str | None = "silu"
    reverse: bool = False

    @property
    def name(self) -> str:
        """Such as "b128_l196_e384_k4_reverse"."""
        sizes = f"b{self.batch}_l{self.length}_e{self.channels}_k{self.width}"
        return sizes + ("_reverse" if self.reverse else "")

    def arguments(
        self, seed: int, dtype: DTypeLike = jnp.float32
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Draw arrays, and return them with the static options, for `causal_conv1d(**arrays, **options)`.

        x is of `dtype`, the weights of float32 or wider.
        """
        keys = jax.random.split(jax.random.key(seed), 3)
        wide = wide_dtype(dtype)
        arrays = {
            "x": jax.random.normal(keys[0], (self.batch, self.length, self.channels), wide).astype(
                dtype
            ),
            "kernel": jax.random.normal(keys[1], (self.width, self.channels), wide),
        }
        if self.bias:
            arrays["bias"] = jax.random.normal(keys[2], (self.channels,), wide)
        return arrays, {"activation": self.activation, "reverse": self.reverse}


MODELS = (
    ConvSpec(64, 64, 128),
    ConvSpec(128, 196, 384),
    ConvSpec(128, 196, 384, reverse=True),
    ConvSpec(32, 1024, 384),
    ConvSpec(8, 4096, 384),
    ConvSpec(2, 16384, 384, reverse=True),
    ConvSpec(128, 196, 1536),
)
"""The digits example, then Tiny at 224 to 2048 pixels, then Base."""

SMALL = (
    ConvSpec(2, 1, 5),
    ConvSpec(2, 3, 5, reverse=True),
    ConvSpec(1, 9, 3, width=2, activation=None),
    ConvSpec(1, 9, 3, width=1, bias=False, reverse=True),
    ConvSpec(2, 4, 7, width=7, bias=False, activation=None, reverse=True),
)
"""Odd and tiny ones, every option among them."""

"""The scan under a sharded `jit`: every device scans its sequences (b) and its channels (e).

Where the devices share out the channels, each takes the groups of B and C that its own channels belong to.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan.types import Backend, ScanForward, ScanInputs, ScanOptions
from pallas_kernels.sharding import Shard, match_types, per_shard

# Letters in the place of arrays.
_STATE, _STATES = "b e n", "b c e n"  # the first or last one, and those entering the chunks c
_DIMS: Any = {"u": "b l e", "delta": "b l e", "A": "e n", "B": "b l g n", "C": "b l g n"}
_DIMS = ScanInputs(**_DIMS, D="e", z="b l e", delta_bias="e", initial_state=_STATE)  # type: ignore[arg-type]
_BIDIRECTIONAL = jax.tree.map(lambda dims: f"d {dims}", _DIMS)
# B and C are divided with the channels where whole groups go to every device.
_SPLIT: dict[str, Any] = {"split": "b e", "tied": {"g": "e"}}


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A backend on each device's share; `opaque`: it holds kernels, which XLA cannot split by itself."""

    backend: Backend
    opaque: bool

    def forward(self, inputs: ScanInputs, options: ScanOptions) -> ScanForward:
        """See `types.Backend`."""

        def run(shard, inputs):
            return self.backend.forward(_own_groups(inputs, shard), options)

        chunks = math.ceil(inputs.u.shape[-2] / options.chunk)
        dims, of_y, of_states = _dims(inputs)
        results = (
            of_y,
            _STATE if options.return_last_state else None,
            of_states if options.keep_boundaries and chunks > 1 else None,
        )
        operands = (_of(dims, inputs),)
        return per_shard(run, operands, results, opaque=self.opaque, **_SPLIT)(inputs)

    def backward(self, inputs, options, boundaries, y_bar, last_state_bar) -> ScanInputs:
        """See `types.Backend`."""

        def run(shard, inputs, boundaries, y_bar, last_state_bar):
            own = _own_groups(inputs, shard)
            bars = self.backend.backward(own, options, boundaries, y_bar, last_state_bar)
            if own is inputs:
                return bars
            groups = _groups(inputs, shard)
            back = lambda bar, x: jnp.zeros_like(x).at[..., groups, :].add(bar)  # noqa: E731
            return bars._replace(B=back(bars.B, inputs.B), C=back(bars.C, inputs.C))

        dims, of_y, of_states = _dims(inputs)
        dims = _of(dims, inputs)
        operands = (dims, *(_of(*pair) for pair in (
            (of_states, boundaries), (of_y, y_bar), (_STATE, last_state_bar)
        )))  # fmt: skip
        # Sums over devices are in the wide dtype.
        wide = {
            name: x if x is None else x.astype(inputs.wide_dtype)
            for name, x in inputs._asdict().items()
            if name not in ("u", "delta", "z")
        }
        bars = per_shard(run, operands, dims, opaque=self.opaque, **_SPLIT)(
            inputs._replace(**wide), boundaries, y_bar, last_state_bar
        )
        return match_types(bars, inputs)


def _dims(inputs: ScanInputs) -> tuple[Any, Any, str]:
    """Return the letters of the inputs, of y and of the saved states, for one direction or for both (d)."""
    if inputs.u.ndim == 3:
        return _DIMS, "b l e", _STATES
    return _BIDIRECTIONAL, ("b l e", "b l e"), f"d {_STATES}"


def _of(dims, arrays):
    """Return the dimensions of the arrays that are given."""
    if isinstance(dims, str):
        return None if arrays is None else dims
    if type(dims) is tuple:  # both directions' y
        return dims
    return type(dims)(*map(_of, dims, arrays))


def _own_groups(inputs: ScanInputs, shard: Shard) -> ScanInputs:
    """Return the inputs with B and C of this device's channels only."""
    if inputs.B.shape[-2] == 1 or shard.parts("e") == 1 or "g" in shard.axes:
        return inputs
    groups = _groups(inputs, shard)
    return inputs._replace(B=inputs.B[..., groups, :], C=inputs.C[..., groups, :])


def _groups(inputs: ScanInputs, shard: Shard) -> jax.Array:
    """Return the groups that this device's channels belong to, each as often as makes the device's groups equal."""
    whole, parts = inputs.B.shape[-2], shard.parts("e")
    fine = math.lcm(whole, parts)
    own = shard.index("e") * (fine // parts) + jnp.arange(fine // parts)
    return own * whole // fine

"""Compute the selective scan (Mamba's S6 recurrence), channels last.

Public functions, each in a file:

- `api`: `selective_scan`, one direction.
- `bidirectional`: `bidirectional_scan`, both directions of a mixer as one operation.
- `projected`: `projected_scan`, both directions with their projections to Δ, B and C.
- `known`: `known_scan`, whose gradient is that of `projected_scan` around what its kernel kept.

Read on in this order:

- `reference`: the definition.
- `implementations`: the names of implementations, and the rule behind `"auto"`.
- `vjp`: the derivative rule. `sharded`: the scan under a sharded `jit`.
- `xla_sequential`, `xla_associative`: backends for any platform. `chunks`: the chunk-by-chunk driver that they share.
  `bidirectional_xla`: both directions by these backends.
- `mosaic`, `mosaic_bidirectional`, `mosaic_projected`: GPU kernels of the three functions (Hopper and later).
- `triton`, `triton_kernels`: GPU kernels for GPUs before Hopper.
- `arg_specs`: shapes that tests and benches use.
"""

from pallas_kernels.selective_scan.api import selective_scan
from pallas_kernels.selective_scan.bidirectional import bidirectional_scan
from pallas_kernels.selective_scan.implementations import IMPLEMENTATIONS
from pallas_kernels.selective_scan.known import known_scan, known_scan_unsupported
from pallas_kernels.selective_scan.projected import (
    KEPT_STEPS,
    RANK_MULTIPLE,
    Known,
    ScanWeights,
    instead,
    projected_scan,
    projected_unsupported,
    scan_weights,
)

__all__ = [
    "IMPLEMENTATIONS",
    "KEPT_STEPS",
    "RANK_MULTIPLE",
    "Known",
    "ScanWeights",
    "bidirectional_scan",
    "instead",
    "known_scan",
    "known_scan_unsupported",
    "projected_scan",
    "projected_unsupported",
    "scan_weights",
    "selective_scan",
]

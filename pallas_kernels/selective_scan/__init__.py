"""The selective scan (Mamba's S6 recurrence), channels last.

`api` is the public function, `bidirectional` that of both directions of a mixer at once, `projected` the same with
the projections to Δ, B and C, `reference` the definition, `xla_sequential` and `xla_associative` the backends for any
platform, `chunks` the chunk-by-chunk driver they share, `bidirectional_xla` both directions by these backends,
`mosaic`, `mosaic_bidirectional` and `mosaic_projected` the GPU kernels of the three functions, `triton` and
`triton_kernels` those for GPUs before Hopper, `vjp` the derivative rule, `sharded` the scan under a sharded `jit`,
`implementations` the names and the rule behind `"auto"`, `arg_specs` the shapes that tests and bench use.
"""

from pallas_kernels.selective_scan.api import selective_scan
from pallas_kernels.selective_scan.bidirectional import bidirectional_scan
from pallas_kernels.selective_scan.implementations import IMPLEMENTATIONS
from pallas_kernels.selective_scan.projected import ScanWeights, projected_scan, scan_weights

__all__ = [
    "IMPLEMENTATIONS",
    "ScanWeights",
    "bidirectional_scan",
    "projected_scan",
    "scan_weights",
    "selective_scan",
]

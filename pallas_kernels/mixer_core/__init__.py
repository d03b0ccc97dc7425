"""The fused core of a mixer: convolution, pooling, skip, LayerNorm and gate around the scan.

`api` is the public function of mixers that pool and its derivative rule, `xla` the definition and the path of other
platforms, `mosaic` the Mosaic GPU kernels behind the same interface (`mosaic_front`, `mosaic_back`,
`mosaic_front_gradients`, cut into blocks by `grid`; `mosaic_ragged_front` where tokens are missing).
`block` adds in_proj (`mosaic_project_front`) and the output projection, the residual sum and the next block's norm
(`mosaic_back_project`). `sequence`, `sequence_xla` and `mosaic_sequence` are the same as `api`, `xla` and `mosaic` for
mixers that pool nothing.
"""

from pallas_kernels.mixer_core.api import mixer_core
from pallas_kernels.mixer_core.block import (
    Projection,
    Unprojected,
    block_unsupported,
    mixer_block,
)
from pallas_kernels.mixer_core.sequence import sequence_core
from pallas_kernels.mixer_core.sequence_xla import Convolutions
from pallas_kernels.mixer_core.types import Directions, Norm

__all__ = [
    "Convolutions",
    "Directions",
    "Norm",
    "Projection",
    "Unprojected",
    "block_unsupported",
    "mixer_block",
    "mixer_core",
    "sequence_core",
]

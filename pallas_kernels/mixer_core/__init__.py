"""The fused core of the FastVim mixer: convolution, pooling, skip, LayerNorm and gate around the scan.

`api` is the public function and its derivative rule, `xla` the definition and the path of other platforms,
`mosaic` the Mosaic GPU kernels behind the same interface (`mosaic_front`, `mosaic_back`,
`mosaic_front_gradients`, cut into blocks by `grid`).
"""

from pallas_kernels.mixer_core.api import mixer_core
from pallas_kernels.mixer_core.types import Directions, Norm

__all__ = ["Directions", "Norm", "mixer_core"]

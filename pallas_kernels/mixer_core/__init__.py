"""Compute the fused core of a mixer: convolution, pooling, skip, norm and gate around the scan.

Read in this order:

- `types`, then `xla`: defines what is computed. Platforms without kernels run it.
- `api`: `mixer_core`, the public function of mixers that pool, and its derivative rule.
- `mosaic`: runs the Mosaic GPU kernels behind the interface of `xla`. `grid` describes how they cut the tokens.
  Forward: `mosaic_front` and `mosaic_back`. Where tokens are missing, `mosaic_ragged_staged` takes the place of the
  former, or `mosaic_ragged_front` for long or few samples; both share `mosaic_ragged_common`. Backward:
  `mosaic_back_gradients`, and `mosaic_rolling_gradients` or `mosaic_front_gradients`. `mosaic_common` holds what they
  share.
- `block`: `mixer_block` adds in_proj (`mosaic_project_front`), out_proj, the residual sum and the next block's norm
  (`mosaic_back_project`; `mosaic_sum_norm` and `mosaic_norm_gradient` for sum and norm alone).
- `add_norm`: the residual sum and the next norm behind any other mixer, and behind attention and MLP.
- `sequence`, `sequence_xla`, `mosaic_sequence...`: the same as `api`, `xla` and `mosaic` for mixers that pool nothing.

Letters: b images, l tokens, s steps of the scan, e inner width, w = 2e, k taps of a convolution, d the two directions.
`x_bar`, in the kernels also dx, is the gradient of the loss with respect to x. s is also the norm's input.
"""

from pallas_kernels.mixer_core.add_norm import add_norm, add_norm_unsupported, norm_stream
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
from pallas_kernels.mixer_core.xla import add_to_residual

__all__ = [
    "Convolutions",
    "Directions",
    "Norm",
    "Projection",
    "Unprojected",
    "add_norm",
    "add_norm_unsupported",
    "add_to_residual",
    "block_unsupported",
    "mixer_block",
    "mixer_core",
    "norm_stream",
    "sequence_core",
]

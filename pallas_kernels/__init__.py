"""Array operations of state-space vision models, each with XLA implementations and, mostly, GPU kernels.

    causal_conv1d   depthwise causal convolution (XLA only)
    selective_scan  Mamba's recurrence, of one direction or of both (`bidirectional_scan`)
    mixer_core      everything of a mixer between its two projections, in a few kernels around the scan
    patch_embed     images to tokens: patches, their projection, positions, the first norm

The package knows neither models nor training. Every public function takes `implementation=...`; `"auto"` chooses the
fastest one for the platform that the program is lowered for. The environment variable FASTVIM_KERNELS=off turns all
GPU kernels off. Read each folder's `__init__` first: it says which file holds what.

In derivative rules `x_bar` is the gradient (cotangent) of x, and `pull` the function that `jax.vjp` returns.
"""

from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.mixer_core import Convolutions, Directions, Norm, mixer_core, sequence_core
from pallas_kernels.selective_scan import bidirectional_scan, selective_scan

__all__ = [
    "Convolutions",
    "Directions",
    "Norm",
    "bidirectional_scan",
    "causal_conv1d",
    "mixer_core",
    "selective_scan",
    "sequence_core",
]

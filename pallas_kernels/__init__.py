"""Array operations of state-space vision models, each with a reference, XLA backends and room for GPU kernels.

Knows nothing of models or training. Every public function takes `implementation=...`; `"auto"` picks
what is fastest where the program is lowered for. The environment variable FASTVIM_KERNELS=off turns all
GPU kernels off.
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

"""Array operations of state-space vision models, each with a reference, XLA backends and room for GPU kernels.

Knows nothing of models or training. Every public function takes `implementation=...`; `"auto"` picks
what is fastest where the program is lowered for.
"""

from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.selective_scan import selective_scan

__all__ = ["causal_conv1d", "selective_scan"]

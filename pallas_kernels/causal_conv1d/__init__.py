"""Depthwise causal convolution along tokens, channels last, with bias and SiLU."""

from pallas_kernels.causal_conv1d.api import IMPLEMENTATIONS, causal_conv1d

__all__ = ["IMPLEMENTATIONS", "causal_conv1d"]

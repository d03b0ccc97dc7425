"""List the peak FLOPs per second of known GPUs, from their makers' data sheets (dense, without sparsity).

Model FLOPs utilisation (MFU) is the share of this that a model's own multiply-adds reach. A backward pass costs
two forward passes; what remat computes again, norms and activations do not count.
"""

from __future__ import annotations

from jax.sharding import Mesh

from fastvim_jax.analysis.flops import gmacs
from fastvim_jax.models import AnyModelConfig

_T = 1e12
# Device kinds as JAX names them, longer names first: bfloat16 and TF32 on tensor cores, float32 on the other ones.
_PEAKS: dict[str, dict[str, float]] = {
    "NVIDIA H100 PCIe": {"bfloat16": 756 * _T, "tf32": 378 * _T, "float32": 51 * _T},
    "NVIDIA H100 NVL": {"bfloat16": 835 * _T, "tf32": 417.5 * _T, "float32": 60 * _T},
    "NVIDIA H100": {"bfloat16": 989.4 * _T, "tf32": 494.7 * _T, "float32": 66.9 * _T},
    "NVIDIA H200 NVL": {"bfloat16": 835 * _T, "tf32": 417.5 * _T, "float32": 60 * _T},
    "NVIDIA H200": {"bfloat16": 989.4 * _T, "tf32": 494.7 * _T, "float32": 66.9 * _T},
    "NVIDIA A100": {"bfloat16": 312 * _T, "tf32": 156 * _T, "float32": 19.5 * _T},
    "NVIDIA A30": {"bfloat16": 165 * _T, "tf32": 82 * _T, "float32": 10.3 * _T},
    "NVIDIA L40S": {"bfloat16": 362 * _T, "tf32": 183 * _T, "float32": 91.6 * _T},
    "NVIDIA L40": {"bfloat16": 181 * _T, "tf32": 90.5 * _T, "float32": 90.5 * _T},
    "NVIDIA L4": {"bfloat16": 121 * _T, "tf32": 60 * _T, "float32": 30.3 * _T},
}


def peak_flops(device_kind: str, dtype: str, matmul_precision: str = "highest") -> float | None:
    """Return the peak FLOPs per second of one device for matrix products of this kind, or None if unknown, as on a CPU.

    Args:
        device_kind: `jax.Device.device_kind`, e.g. "NVIDIA H100 80GB HBM3".
        dtype: the model's `dtype`.
        matmul_precision: its `matmul_precision`; `tf32` counts for float32 only.
    """
    kind = "tf32" if (dtype, matmul_precision) == ("float32", "tf32") else dtype
    for name, peaks in _PEAKS.items():
        if device_kind == name or device_kind.startswith((name + " ", name + "-")):
            return peaks.get(kind)
    return None


def peak_of(mesh: Mesh, config: AnyModelConfig) -> float | None:
    """Return the sum of `peak_flops` over all devices of a mesh, for the products of this model; None if unknown."""
    one = peak_flops(mesh.devices.flat[0].device_kind, config.dtype, config.matmul_precision)
    return None if one is None else one * mesh.size


def training_flops(config: AnyModelConfig) -> float:
    """Return a training step's FLOPs per image: 2 per multiply-add; the backward pass counts as two forward passes."""
    return 3 * 2 * 1e9 * gmacs(config)

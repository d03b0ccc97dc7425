"""Peaks by device and precision, and what a training step costs."""

import pytest

from fastvim_jax.analysis.flops import gmacs
from fastvim_jax.analysis.peaks import peak_flops, training_flops
from fastvim_jax.models import model_config


@pytest.mark.parametrize(
    ("kind", "dtype", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", "highest", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "float32", "tf32", 494.7e12),
        ("NVIDIA H100 80GB HBM3", "float32", "highest", 66.9e12),
        ("NVIDIA H100 PCIe", "bfloat16", "tf32", 756e12),
        ("NVIDIA H200", "bfloat16", "highest", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", "highest", 312e12),
        ("NVIDIA A100-PCIE-40GB", "float32", "tf32", 156e12),
        ("NVIDIA L40S", "bfloat16", "highest", 362e12),
        ("NVIDIA L4", "float32", "highest", 30.3e12),
        ("NVIDIA L400", "float32", "highest", None),
        ("NVIDIA H100 80GB HBM3", "float64", "highest", None),
        ("cpu", "float32", "highest", None),
    ],
)
def test_peaks(kind, dtype, precision, peak):
    assert peak_flops(kind, dtype, precision) == (peak and pytest.approx(peak))


def test_a_training_step_costs_six_flops_a_multiply_add():
    config = model_config("fastvim_tiny_patch16_224")
    assert training_flops(config) == pytest.approx(6e9 * gmacs(config))
    assert 6e9 < training_flops(config) < 8e9

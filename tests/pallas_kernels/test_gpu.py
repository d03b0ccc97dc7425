"""Which devices the kernels are for."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from pallas_kernels import gpu
from tests.pallas_kernels.mosaic_support import abstract_h100, needs_mosaic


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("8.0", "is older than Hopper"),
        (None, "is older than Hopper"),
        ("9.0", None),
        ("10.3", None),
        ("12.0", "has less shared memory than the 227 KB that the kernels are cut for"),
    ],
)
def test_compute_capabilities(monkeypatch, capability, reason):
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA X", compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    said = gpu._no_device.__wrapped__()
    expected = reason and f"NVIDIA X (compute capability {capability}) {reason}"
    assert said == expected


@needs_mosaic
def test_one_switch_turns_the_kernels_off(monkeypatch):
    monkeypatch.setenv("FASTVIM_KERNELS", "off")
    with abstract_h100():
        assert gpu.kernels_missing() == "FASTVIM_KERNELS=off"
        assert not gpu.choose("auto", "an operation", lambda: None)

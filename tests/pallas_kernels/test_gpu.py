"""Which devices the kernels are for."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from pallas_kernels import gpu


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

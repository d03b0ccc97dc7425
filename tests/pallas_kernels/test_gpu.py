"""Which devices the kernels are for."""

from __future__ import annotations

import sys
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


@pytest.mark.parametrize(
    ("implementation", "capabilities", "missing", "runs"),
    [
        ("auto", (8.0,), None, True),
        ("auto", (8.9, 8.9), None, True),
        ("auto", (8.9,), "it is not installed", False),
        ("auto", (9.0,), None, False),
        ("auto", (8.0, 9.0), None, False),
        ("auto", (), None, False),
        ("triton", (9.0,), None, True),
        ("xla", (8.0,), None, False),
        ("pallas", (8.0,), None, False),
    ],
)
def test_where_triton_runs(monkeypatch, implementation, capabilities, missing, runs):
    monkeypatch.setattr(gpu, "_capabilities", lambda: capabilities)
    monkeypatch.setattr(gpu, "_jax_triton_missing", lambda: missing)
    assert gpu.choose_triton(implementation, "an operation", lambda: None) == runs


def test_what_triton_does_not_cover_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(gpu, "triton_missing", lambda: None)
    gpu.log_once.cache_clear()
    for _ in range(2):
        assert not gpu.choose_triton("triton", "an operation", lambda: "it has 99 states")
    assert [r.message for r in caplog.records] == [
        "an operation: using XLA and not the Triton kernels, since it has 99 states"
    ]


@pytest.mark.parametrize(
    ("capabilities", "switch", "reason"),
    [
        ((), "", "there is no GPU"),
        ((7.5,), "", "compute capability 7.5 is older than Ampere's 8.0"),
        ((8.0,), "off", "FASTVIM_KERNELS=off"),
    ],
)
def test_triton_by_name_where_it_cannot_run(monkeypatch, capabilities, switch, reason):
    monkeypatch.setattr(gpu, "_capabilities", lambda: capabilities)
    monkeypatch.setenv("FASTVIM_KERNELS", switch)
    with pytest.raises(NotImplementedError, match=f"'triton' cannot run here: {reason}"):
        gpu.choose_triton("triton", "an operation", lambda: None)


def test_a_missing_jax_triton_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)  # importing it fails
    assert "pip install 'fastvim-jax[triton]'" in gpu._jax_triton_missing.__wrapped__()


def test_a_jax_triton_of_another_series_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace())
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "0.4.1")
    assert "jax-triton 0.4.1 is not of the series 0.3" in gpu._jax_triton_missing.__wrapped__()


@needs_mosaic
def test_the_interpreter_refuses_to_wait_for_ever(monkeypatch):
    from pallas_kernels.mosaic import interpret_params

    monkeypatch.setenv("PJRT_NPROC", "3")
    assert interpret_params(True, 2) is not None and interpret_params(False, 9) is None
    with pytest.raises(
        NotImplementedError, match="3 warpgroups need 4 threads of XLA, which has 3"
    ):
        interpret_params(True, 3)
    monkeypatch.setenv("PJRT_NPROC", "1")
    assert interpret_params(True) is not None

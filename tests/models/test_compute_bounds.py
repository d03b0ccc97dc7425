"""activations="compute" keeps its stated bounds where the fused core runs: by XLA, and in the interpreter."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.mixer_core import add_norm, mixer_core, sequence_core
from tests.models.compute_bounds import KINDS, hold_to_bounds
from tests.pallas_kernels.mosaic_support import abstract_h100, interpreted, needs_mosaic


@pytest.mark.drawn("models on kernels", one_in=20)
@pytest.mark.parametrize("in_fp32", [True, False])
@pytest.mark.parametrize("kind", ["fastvim", "vim"])
def test_fused_cores_by_xla(
    kind: str, in_fp32: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound the error of the fused core, which rounds where the kernels do; its stages are XLA's on this CPU."""
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    hold_to_bounds(kind, rng, depth=2, residual_in_fp32=in_fp32)


@contextlib.contextmanager
def _kernels() -> Iterator[None]:
    with abstract_h100(), interpreted():
        yield


@pytest.mark.drawn("models on kernels", one_in=20)
@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("in_fp32", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_kernels_in_the_interpreter(
    kind: str, in_fp32: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound the error of the fused kernels, scans included; two blocks, so that both poolings occur."""
    for name, core in (("mixer_core", mixer_core), ("sequence_core", sequence_core)):
        by_name = functools.partial(core, implementation="pallas")
        monkeypatch.setattr(f"fastvim_jax.layers.fused_core.{name}", by_name)
    # The kernels that end a block, too, which have no name to ask for them by.
    monkeypatch.setattr(
        sys.modules[add_norm.__module__], "on_cuda", lambda kernel, other, *arrays: kernel(*arrays)
    )
    options = {
        "depth": 2,
        "residual_in_fp32": in_fp32,
        "state_size": 4,
        "scan_implementation": "pallas",
    }
    hold_to_bounds(kind, rng, _kernels, **options)

"""How far `create_model(..., fast=True)` lies from the golden numbers: the bounds that docs/models.md states."""

from __future__ import annotations

from typing import Any

import pytest

from fastvim_jax.models.registry import FAST
from tests.parity.golden import folder, read
from tests.parity.models import compare_model

# (outputs, gradients), relative to the largest entry of each array.
BOUNDS = {
    "fastvim_default": (4e-2, 1e-1),
    "fastvim_max": (3e-2, 8e-1),
    "vim_midcls": (1e-1, 3e-1),
    "vit_cls": (2e-2, 5e-2),
}


@pytest.mark.drawn
@pytest.mark.slow
@pytest.mark.parametrize("name", list(BOUNDS))
def test_the_fast_mode_is_within_its_bounds(name: str, record_property: Any) -> None:
    root = folder()
    if root is None:
        pytest.skip("no golden numbers here: set FASTVIM_PARITY_DIR")
    options = {key: FAST[key] for key in ("activations", "residual_in_fp32")}
    golden = read(root / f"{name}.npz")
    errors = compare_model(golden, str(FAST["dtype"]), str(FAST["blocks"]), **options).errors
    outputs, gradients = (max(errors[kind].values()) for kind in ("output", "grad"))
    line = f"fast mode, {name}: outputs {outputs:.1e}, gradients {gradients:.1e}"
    record_property("summary", line)
    assert 0 < outputs < BOUNDS[name][0] and 0 < gradients < BOUNDS[name][1], line

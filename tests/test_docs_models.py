"""The code of docs/models.md, run from top to bottom."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import ROOT, assert_close


@pytest.mark.drawn("as a user types it")
def test_the_page_runs_from_top_to_bottom():
    text = (ROOT / "docs" / "models.md").read_text()
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "docs/models.md", "exec"), names)
    assert_close(names["same"], names["logits"], 1e-5)
    assert [layer.shape for layer in names["last_two"]] == [(4, 4, 4, 32)] * 2
    assert np.mean(names["losses"][-5:]) < 0.8 * names["losses"][0]
    assert names["fast"].config.dtype == "bfloat16"
    for one, of_both in zip((names["y"], names["backward"]), names["both"], strict=True):
        assert_close(of_both, one, 1e-5)
    assert jnp.isfinite(names["convolved"]).all()
    assert names["mixed"].shape == (2, 16, 8) and jnp.isfinite(names["mixed"]).all()

"""A run with channel sampling draws the same channels, and gives the same losses, on any number of devices."""

from __future__ import annotations

import numpy as np
import pytest

from fastvim_jax.data.cells import draw_channels
from fastvim_jax.training import read_metrics
from tests.distributed.test_many_devices import finish, launch


@pytest.mark.drawn("runs on several devices", one_in=20)
@pytest.mark.slow
def test_a_run_with_channel_sampling_is_the_same_on_two_devices(tmp_path):
    assert len({len(draw_channels(0, step, 2, "sorted")) for step in range(8)}) > 1
    finish(launch("channels.py", str(tmp_path), devices=2))
    one, two = (read_metrics(tmp_path / f"run{n}", "train") for n in (1, 2))
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "param_norm"):
            np.testing.assert_allclose(b[key], a[key], rtol=1e-8, err_msg=key)

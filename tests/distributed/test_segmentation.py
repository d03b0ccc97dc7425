"""Batch norm's statistics are those of all devices, and a run's scores do not depend on how many there are."""

from __future__ import annotations

import numpy as np
import pytest

from fastvim_jax.training import read_metrics
from tests.distributed.test_many_devices import finish, launch


@pytest.mark.drawn("processes and devices", one_in=6)
def test_a_step_of_the_head_is_the_same_on_two_devices(tmp_path):
    """Compare a step on two devices with one.

    The images differ in scale, so that statistics of one device's images alone would differ.
    """
    finish(launch("segmentation.py", "head", str(tmp_path / "out.npz"), devices=2))
    with np.load(tmp_path / "out.npz") as found:
        names = [name[2:] for name in found.files if name.startswith("1:")]
        assert any("var" in name for name in names)
        for name in names:
            one, two = found[f"1:{name}"], found[f"2:{name}"]
            np.testing.assert_allclose(two, one, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.drawn("runs on several devices", one_in=20)
@pytest.mark.slow
def test_a_run_is_the_same_on_two_devices(tmp_path):
    finish(launch("segmentation.py", "run", str(tmp_path), devices=2))
    for kind, rtol in (("train", 1e-8), ("eval", 0)):
        one, two = (read_metrics(tmp_path / f"run{n}", kind) for n in (1, 2))
        assert len(one) == len(two) > 0
        for a, b in zip(one, two, strict=True):
            for key in ("loss", "main_loss", "grad_norm", "raw_miou", "raw_aacc", "count"):
                if key in a:
                    np.testing.assert_allclose(b[key], a[key], rtol=rtol, err_msg=key)

"""Masked pre-training gives the same losses on any mesh: masks are drawn for the whole batch."""

from __future__ import annotations

import numpy as np
import pytest

from fastvim_jax.training import read_metrics
from tests.distributed.test_many_devices import finish, launch
from tests.training.tiny import STEPS_PER_EPOCH


@pytest.mark.drawn("runs on several devices", one_in=20)
@pytest.mark.slow
def test_pre_training_is_the_same_on_four_devices(tmp_path):
    finish(launch("masked.py", str(tmp_path), devices=4))
    for kind, keys in (("train", ("loss", "grad_norm", "param_norm")), ("eval", ("raw_loss",))):
        one, four = (read_metrics(tmp_path / name, kind) for name in ("one", "four"))
        assert len(one) == len(four) == (STEPS_PER_EPOCH if kind == "train" else 1)
        for a, b in zip(one, four, strict=True):
            for key in keys:
                np.testing.assert_allclose(b[key], a[key], rtol=1e-8, err_msg=key)

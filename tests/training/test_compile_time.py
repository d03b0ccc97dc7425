"""The compile-time report of a small model."""

from __future__ import annotations

from fastvim_jax.models import VisionMambaConfig
from fastvim_jax.training.compile_time import measure_train_step


def test_the_scanned_program_does_not_grow_with_depth():
    small = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "num_classes": 2}
    shallow, deep = (
        measure_train_step(VisionMambaConfig(**small, depth=depth), batch=2) for depth in (4, 12)
    )
    assert shallow.trace > 0 and shallow.compile > 0
    assert deep.lines < 1.1 * shallow.lines

"""Forward passes are timed on weights and images that take turns."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from fastvim_jax.bench import model as bench
from pallas_kernels import timing


class Taken(Exception):
    """The arguments are known; nothing needs to be compiled."""


def test_weights_take_turns_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that weights take turns with the images.

    Otherwise a small model's weights stay in the cache from call to call, and batch 1 seems too fast.
    """
    made: list[Any] = []

    def measured(function: Any, arguments: Any, **options: Any) -> None:
        made.extend(arguments(seed) for seed in range(3))
        raise Taken

    monkeypatch.setattr(timing, "Measured", measured)
    options = {"depth": 1, "embed_dim": 8, "patch_size": 8}
    ((_, case),) = bench.cases([("fastvim_tiny_patch16_224", 16, 1, "bf16")], **options)
    with pytest.raises(Taken):
        next(case)
    leaves = [jax.tree.leaves(arguments) for arguments in made]
    assert len({leaf.unsafe_buffer_pointer() for each in leaves for leaf in each}) == 3 * len(
        leaves[0]
    )
    for weights, images in made[1:]:
        jax.tree.map(np.testing.assert_array_equal, weights, made[0][0])
        assert (np.asarray(images) != np.asarray(made[0][1])).any()

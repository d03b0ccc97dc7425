"""A detector's backbone keeps every patch's position when its images are padded less."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fastvim_jax import create_model
from fastvim_jax.models.detection.positions import crop_positions


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fastvim_tiny_patch16_224", {}),
        ("fastvim_tiny_patch16_224", {"token_order": "column"}),
        ("vim_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {}),
        ("channelvim_tiny_patch16_224", {"channels": 3}),
    ],
)
def test_patches_keep_their_positions(name: str, options: dict) -> None:
    """Compare tokens of the top left part of an image with the same part of the whole image's tokens."""
    model = create_model(name, image_size=(64, 96), num_classes=0, depth=2, rngs=0, **options)
    image = jax.random.normal(jax.random.key(1), (1, 64, 96, 3))
    stored = (6, 4) if options.get("token_order") == "column" else (4, 6)
    whole, _ = model.embed(image)
    crop_positions(model, (64, 96))  # changes nothing
    np.testing.assert_array_equal(whole, model.embed(image)[0])
    crop_positions(model, (32, 64))
    part, grid = model.embed(image[:, :32, :64])
    cut = (4, 2) if stored == (6, 4) else (2, 4)
    assert tuple(grid[:2]) == cut

    def patches(tokens: jax.Array, grid: tuple[int, int]) -> np.ndarray:
        per = tokens.shape[1] // (grid[0] * grid[1])  # channels of a patch
        extra = tokens.shape[1] - grid[0] * grid[1] * per
        middle = getattr(model.config, "class_token", "head") == "middle"
        place = (tokens.shape[1] - 1) // 2 if middle else 0
        kept = np.delete(np.asarray(tokens), range(place, place + extra), axis=1)
        return kept.reshape(*grid, per, -1)

    np.testing.assert_allclose(
        patches(part, cut), patches(whole, stored)[: cut[0], : cut[1]], atol=1e-5
    )

"""Draw what a masked autoencoder reconstructs: original, masked, reconstructed and pasted images side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from fastvim_jax.training.masked.loss import patch_statistics, patchify, unpatchify
from fastvim_jax.typing import Images

COLUMNS = ("original", "masked", "reconstructed", "pasted")
GREY = 0.0  # in normalised images: the data set's mean
GAP = 2  # pixels between images


def make_reconstruct(
    graphdef: nnx.GraphDef, *, normalise: bool
) -> Callable[[Any, Images, jax.Array], tuple[Images, Images, Images]]:
    """Return `reconstruct(params, images, noise)`: the masked, the reconstructed and the pasted images, normalised.

    The pasted image has the kept patches of the original and the predicted ones elsewhere. If patches are predicted
    `normalise`d, mean and deviation come from the original patches, because the model does not predict them.
    """

    def reconstruct(params: Any, images: Images, noise: jax.Array) -> tuple[Images, Images, Images]:
        model = nnx.merge(graphdef, params)
        patch = model.config.patch
        grid = (images.shape[1] // patch[0], images.shape[2] // patch[1])
        out = model(images, noise=noise)
        original = patchify(images, patch)
        predicted = out.predicted
        if normalise:
            mean, deviation = patch_statistics(original)
            predicted = predicted * deviation + mean
        removed = out.masking.removed[:, :, None] > 0
        masked = jnp.where(removed, GREY, original)
        pasted = jnp.where(removed, predicted, original)
        together = (masked, predicted, pasted)
        return tuple(unpatchify(x.astype(images.dtype), grid, patch) for x in together)  # type: ignore[return-value]

    return reconstruct


def draw_grid(path: Path, columns: Sequence[np.ndarray]) -> None:
    """Write a PNG with one row per image and one column for each of `columns`.

    Args:
        path: the PNG file. An existing file is replaced in one step, so that readers never see half a file.
        columns: uint8 images `b h w c` of equal shape. With c other than 3, only the first channel is shown.
    """
    rows = []
    for images in zip(*columns, strict=True):
        cells = []
        for image in images:
            shown = image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)
            cells.append(np.pad(shown, ((0, GAP), (0, GAP), (0, 0)), constant_values=255))
        rows.append(np.concatenate(cells, axis=1))
    grid = np.concatenate(rows, axis=0)[:-GAP, :-GAP]
    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(grid).save(temporary, format="PNG")
    temporary.replace(path)

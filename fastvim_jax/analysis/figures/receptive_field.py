"""Draw the effective receptive field: which patches reach the centre token after so many blocks.

    field[p] = mean over inputs and random directions v of  Σ_pixels in patch p |∂⟨v, token_centre⟩ / ∂ pixel|

Parameters and inputs are random, so the figure shows what the architecture passes on, not what training makes of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from fastvim_jax.analysis.figures import Inputs
from fastvim_jax.analysis.figures.style import INK, new_figure
from fastvim_jax.models import VisionMambaConfig, build_model

_AFTER = (1, 2, 4, 8)
_GRID, _PATCH = 15, 4  # An odd grid has a centre.
KINDS: dict[str, dict[str, Any]] = {
    "alternating": {"pool_axes": "alternate"},
    "only columns": {"pool_axes": "columns"},
    "only rows": {"pool_axes": "rows"},
    "Vim, no pooling": {"pooling": "none"},
}
"""Options of the model by row of the figure."""


def receptive_fields(
    config: VisionMambaConfig,
    after: tuple[int, ...] = _AFTER,
    *,
    images: int = 16,
    directions: int = 4,
    seed: int = 0,
) -> Float[np.ndarray, "taps rows columns"]:
    """Compute the effective receptive field of the centre token after each number of blocks in `after`.

    Args:
        config: a model without a class token, of an odd number of rows and columns of patches.
        after: numbers of blocks, from 1 to the model's depth.
        images: number of random inputs.
        directions: number of random directions v for each input.
        seed: of parameters, inputs and directions.

    Returns:
        Mean absolute gradient of each patch's pixels.
    """
    rows, columns = config.grid
    model = build_model(config, rngs=seed)
    graphdef, params = nnx.split(model)
    pixels_key, directions_key = jax.random.split(jax.random.key(seed + 1))
    height, width = rows * config.patch[0], columns * config.patch[1]
    batch = jax.random.normal(pixels_key, (images, height, width, config.channels))
    towards = jax.random.normal(directions_key, (directions, images, config.embed_dim))
    taps = tuple(blocks - 1 for blocks in after)

    @jax.jit
    def field(params: Any, batch: Array, towards: Array) -> Array:
        def centres(batch: Array) -> Array:
            model = nnx.merge(graphdef, params)
            tokens, grid = model.embed(batch)
            _, outputs = model.encode(tokens, model.poolings(grid), output_blocks=taps)
            pairs = [outputs[tap] for tap in taps]
            return jnp.stack([(before + own)[:, tokens.shape[1] // 2] for before, own in pairs])

        out, pull = jax.vjp(centres, batch)

        def one(tap: Array, v: Array) -> Array:
            (gradient,) = pull(jnp.zeros_like(out).at[tap].set(v))
            cells = (images, rows, config.patch[0], columns, config.patch[1], config.channels)
            return jnp.abs(gradient).reshape(cells).mean((0, 2, 4, 5))

        every = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.arange(len(taps)), towards)
        return every.mean(1)

    return np.asarray(field(params, batch, towards))


def draw_receptive_field(inputs: Inputs) -> Figure:
    """Draw the receptive fields, one row per pooling and one column per number of blocks."""
    figure = new_figure(8, 7.6, "What reaches the centre token (random weights, random inputs)")
    panels: Any = figure.subplots(len(KINDS), len(_AFTER))
    norm = LogNorm(1e-7, 1)
    for axes, blocks in zip(panels[0], _AFTER, strict=True):
        axes.set_title(f"{blocks} block{'s' * (blocks > 1)}", loc="left", fontsize=10.5, color=INK)
    for row, (kind, options) in zip(panels, KINDS.items(), strict=True):
        config = VisionMambaConfig(
            image_size=_GRID * _PATCH, patch_size=_PATCH, embed_dim=64, depth=max(_AFTER),
            num_classes=0, pos_embed=False, **options,
        )  # fmt: skip
        for axes, field in zip(row, receptive_fields(config), strict=True):
            shown = axes.imshow(field / field.max(), norm=norm, cmap="magma")
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(kind, fontsize=10.5, color=INK)
    bar: Any = figure.colorbar(shown, ax=panels, fraction=0.03, extend="min")
    bar.set_label("mean |gradient| of a patch's pixels, 1: the centre")
    return figure

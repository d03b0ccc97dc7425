"""Draw what the scan selects on a photograph: step sizes Δ, and the sizes of B and C, at each patch.

Vim computes them for every patch, FastVim for every row or column of patches, from its mean.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from PIL import Image

from fastvim_jax.analysis.figures import Inputs
from fastvim_jax.analysis.figures.style import INK, new_figure
from fastvim_jax.errors import UserError
from fastvim_jax.models import VisionMambaConfig, build_model, model_config
from fastvim_jax.models.vision_mamba import VisionMamba

_SIDE = 384


@dataclasses.dataclass(frozen=True)
class Selection:
    """Hold what one block's forward scan selects, as maps over the grid of patches.

    Attributes:
        colours: the patches' mean colours, pooled as the block pools tokens.
        delta: mean over the channels of Δ after softplus.
        B, C: Euclidean norm over the states.
    """

    colours: Float[np.ndarray, "rows columns c"]
    delta: Float[np.ndarray, "rows columns"]
    B: Float[np.ndarray, "rows columns"]
    C: Float[np.ndarray, "rows columns"]


def selection_of(model: VisionMamba, image: Float[Array, "h w c"], block: int = 0) -> Selection:
    """Compute what the forward scan of one block selects.

    Args:
        model: a FastVim or Vim without a class token.
        image: normalised.
        block: index of the block.
    """
    graphdef, params = nnx.split(model)

    @jax.jit
    def select(params: Any, image: Array) -> tuple[Array, ...]:
        model = nnx.merge(graphdef, params)
        tokens, grid = model.embed(image[None])
        poolings = model.poolings(grid)
        pooling = poolings[block % len(poolings)]
        _, outputs = model.encode(tokens, poolings, output_blocks=(block,))
        split, stacked = nnx.split(model.blocks)
        one = nnx.merge(split, jax.tree.map(lambda leaf: leaf[block], stacked))
        xz = one.mixer.in_proj(one.norm(outputs[block][0]))
        direction = one.mixer.forward
        c = direction.convolve(pooling.to_scan_order(xz[..., : xz.shape[-1] // 2]))
        scores = None if direction.score is None else direction.score(c)
        delta, B, C = direction.select(pooling.pool(c, scores))
        delta = jax.nn.softplus(delta + direction.dt_proj.bias[...])
        sizes = (delta.mean(-1), jnp.linalg.norm(B, axis=-1), jnp.linalg.norm(C, axis=-1))

        def as_map(steps: Array) -> Array:
            tokens = pooling.from_scan_order(pooling.unpool(steps))
            return tokens.reshape(*grid, -1)

        height, width = model.config.patch
        cut = image[: grid[0] * height, : grid[1] * width]
        colours = cut.reshape(grid[0], height, grid[1], width, -1).mean((1, 3))
        colours = pooling.to_scan_order(colours.reshape(1, -1, colours.shape[-1]))
        maps = (as_map(size[..., None])[..., 0] for size in sizes)
        return as_map(pooling.pool(colours, scores)), *maps

    return Selection(*(np.asarray(each) for each in select(params, jnp.asarray(image))))


def open_photograph(file: Path | None, side: int = _SIDE) -> np.ndarray:
    """Read a photograph, cut its middle square and resize it: uint8 `side side 3`.

    Args:
        file: None: `flower.jpg` of scikit-learn (dany13, CC BY 2.0).
        side: height and width of the result in pixels.

    Raises:
        UserError: the file is no image that Pillow can read.
    """
    if file is None:
        from sklearn.datasets import load_sample_image

        picture = Image.fromarray(load_sample_image("flower.jpg"))
    else:
        if not file.is_file():  # Opening a FIFO would wait for a writer.
            raise UserError(f"{file} cannot be read as an image: there is no such file.")
        try:
            # Named formats only: Pillow would start Ghostscript on a file that holds PostScript.
            picture = Image.open(file, formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF")).convert(
                "RGB"
            )
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{file} cannot be read as an image: {error}") from error
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    square = picture.crop((left, top, left + short, top + short))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))


def draw_selection(inputs: Inputs) -> Figure:
    """Draw the pooled patches and their Δ, B and C, for the given model or for Vim and FastVim with random weights."""
    pixels = open_photograph(inputs.image)
    if inputs.model is None:
        options: dict[str, Any] = {"image_size": _SIDE, "depth": 2, "num_classes": 0}
        fastvim = build_model(model_config("fastvim_tiny_patch16_224", **options), rngs=0)
        vim = build_model(
            model_config("vim_tiny_patch16_224", class_token="none", **options), rngs=0
        )
        rows = {
            "Vim: every patch": (vim, 0),
            "FastVim, even blocks: rows": (fastvim, 0),
            "FastVim, odd blocks: columns": (fastvim, 1),
        }
        title = "What the scan reads of a photograph (random weights)"
    else:
        _require_grid_tokens(inputs.model)
        blocks = range(min(2, inputs.model.config.depth))
        rows = {f"block {block}": (inputs.model, block) for block in blocks}
        title = "What the scan reads of a photograph"
    figure = new_figure(10, 2.2 * len(rows) + 0.5, title)
    panels: Any = figure.subplots(len(rows), 4, squeeze=False)
    mean, std = np.array(inputs.mean), np.array(inputs.std)
    normalised = (pixels / 255 - mean) / std
    for axes, (name, (model, block)) in zip(panels, rows.items(), strict=True):
        selection = selection_of(model, jnp.asarray(normalised, jnp.float32), block)
        colours = selection.colours * std + mean
        axes[0].imshow(np.clip(colours, 0, 1), interpolation="nearest")
        axes[0].set_title("patches, pooled" if _in_first_row(axes[0]) else "", fontsize=10.5)
        axes[0].set_ylabel(name, fontsize=9.5, color=INK)
        for cell, values, label in zip(
            axes[1:], (selection.delta, selection.B, selection.C), ("Δ", "‖B‖", "‖C‖"), strict=True
        ):
            shown = cell.imshow(values, cmap="viridis", interpolation="nearest")
            bar: Any = figure.colorbar(shown, ax=cell, fraction=0.046)
            bar.ax.tick_params(labelsize=7.5)
            cell.set_title(label if _in_first_row(cell) else "", fontsize=10.5)
        for cell in axes:
            cell.set_xticks([])
            cell.set_yticks([])
    return figure


def _in_first_row(cell: Any) -> bool:
    return cell.get_subplotspec().is_first_row()


def _require_grid_tokens(model: Any) -> None:
    config: Any = getattr(model, "config", None)
    fits = type(config) is VisionMambaConfig and config.channels == 3
    if not fits or config.class_token != "none" or config.out_indices:
        raise UserError(
            "the figure `selection` draws a FastVim or Vim classifier of RGB images without a class token; "
            f"the given model is a {type(model).__name__} of another kind."
        )

"""Evaluate the reconstruction loss, with the same mask for an image at every evaluation, and draw a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from fastvim_jax.data import BatchIterator
from fastvim_jax.data.device_transforms import make_preprocess
from fastvim_jax.distributed import (
    is_first_process,
    on_every_device,
    on_mesh,
    place_batch,
)
from fastvim_jax.errors import UserError
from fastvim_jax.training.evaluators import Evaluation, Evaluator
from fastvim_jax.training.masked.config import PretrainConfig
from fastvim_jax.training.masked.loss import patch_errors
from fastvim_jax.training.masked.pictures import draw_grid, make_reconstruct
from fastvim_jax.training.steps import Batch, TrainState, gather_outside_blocks

PICTURE = "reconstructions.png"
_SEED = 2**31 - 1  # of the evaluation's masks, the same in every run


def make_evaluator(
    graphdef: nnx.GraphDef,
    batches: BatchIterator,
    config: PretrainConfig,
    mesh: Mesh,
    folder: Path,
) -> Evaluator:
    """Return an evaluator named `eval`. It reports `count` (images), `raw_loss` and, with an average, `ema_loss`.

    Args:
        graphdef: graph definition of the masked autoencoder.
        batches: one pass over the evaluation images; rewound after each evaluation.
        config: config of the run.
        mesh: devices on which the model runs.
        folder: the run folder, for the picture.
    """
    step = on_mesh(mesh, make_eval_step(graphdef, config))
    reconstruct = jax.jit(make_reconstruct(graphdef, normalise=config.normalise_pixels))

    def run(state: TrainState, at: int) -> Evaluation:
        weights = {"raw": state.params} | ({} if state.ema is None else {"ema": state.ema})
        totals = dict.fromkeys(weights, 0.0)
        count, shown = 0, None
        for number, batch in enumerate(batches):
            if shown is None:
                shown = np.asarray(batch["image"][: config.pictures])
            placed = place_batch(mesh, {k: batch[k] for k in ("image", "valid")})
            for name, params in weights.items():
                loss, images = jax.device_get(step(params, placed, number))
                totals[name] += float(loss)
            count += int(images)
        batches.rewind()
        if not count:
            raise UserError(
                "there is no valid image to evaluate: check data.eval_split and data.path."
            )
        scores = {"count": count, **{f"{k}_loss": v / count for k, v in totals.items()}}
        return Evaluation(scores, draw(weights, shown))

    def draw(weights: Any, shown: np.ndarray | None) -> Path | None:
        # Each of several processes may hold a part of the weights. A picture is not worth gathering them.
        if not config.pictures or shown is None or jax.process_count() > 1:
            return None
        params = jax.device_put(weights.get("ema", weights["raw"]), jax.local_devices()[0])
        images = make_preprocess(config.data)(jnp.asarray(shown))
        noise = _noise(graphdef, params, 0, len(shown))
        parts = jax.device_get(reconstruct(params, images, noise))
        path = folder / PICTURE
        if is_first_process():
            draw_grid(path, [shown, *(to_pixels(config, part) for part in parts)])
        return path

    return Evaluator("eval", run, config.evaluate_every_epochs, batches.steps_per_epoch)


def make_eval_step(
    graphdef: nnx.GraphDef, config: PretrainConfig
) -> Callable[[Any, Batch, int], tuple[jax.Array, jax.Array]]:
    """Compile `step(params, batch, number)`: it returns the sum of the images' losses and the number of valid images.

    `number` is the batch's position in the pass. It seeds the masks.
    """
    preprocess = make_preprocess(config.data)

    @jax.jit
    def step(params: Any, batch: Batch, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = preprocess(batch["image"])
        noise = _noise(graphdef, params, number, len(images))
        out = nnx.merge(graphdef, gather_outside_blocks(params))(images, noise=noise)
        removed = out.masking.removed
        errors = patch_errors(
            images, out.predicted, config.model.patch, normalise=config.normalise_pixels
        )
        of_image = jnp.sum(errors * removed, axis=1) / jnp.sum(removed, axis=1)
        valid = batch["valid"]
        return on_every_device((jnp.where(valid, of_image, 0).sum(), valid.sum(dtype=jnp.int32)))

    return step


def to_pixels(config: PretrainConfig, images: Float[Array, "b h w c"] | np.ndarray) -> np.ndarray:
    """Turn normalised images back into pixels from 0 to 255, uint8."""
    scaled = np.asarray(images) * np.asarray(config.data.std) + np.asarray(config.data.mean)
    return np.clip(np.rint(scaled * 255), 0, 255).astype(np.uint8)


def _noise(graphdef: nnx.GraphDef, params: Any, number: Any, batch: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(_SEED), number)
    return nnx.merge(graphdef, params).draw_noise(key, batch)

"""Pre-train a masked autoencoder, from top to bottom.

The order is: mesh, data, run folder, model, optimizer, state, step, evaluation, loop. Targets and masks are made on the
devices: a step takes pixels and returns scalars.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from fastvim_jax.analysis.headline import Headline
from fastvim_jax.analysis.peaks import peak_of, training_flops
from fastvim_jax.data import make_eval_iterator, make_train_iterator
from fastvim_jax.data.device_transforms import make_augment
from fastvim_jax.data.prefetch import DevicePrefetch
from fastvim_jax.distributed import check_batch, make_mesh, on_mesh, place_batch, round_up
from fastvim_jax.errors import UserError
from fastvim_jax.interop import read_weights_file
from fastvim_jax.models import MaskedAutoencoderConfig, build_model
from fastvim_jax.models.pretrained import is_pretrained, read_model_config
from fastvim_jax.training.clock import Clock
from fastvim_jax.training.loop import begin_or_resume, run_loop
from fastvim_jax.training.masked.config import PretrainConfig
from fastvim_jax.training.masked.evaluation import make_evaluator
from fastvim_jax.training.masked.loss import pixel_loss
from fastvim_jax.training.optimizer import learning_rate_schedule, make_optimizer
from fastvim_jax.training.run_folder import CONFIG_FILE, read_config
from fastvim_jax.training.runs import RunResult, TrainCall, open_run
from fastvim_jax.training.steps import (
    Batch,
    Draw,
    LossOf,
    TrainState,
    init_state,
    make_train_step,
    require_normalised,
    state_shapes,
)

HEADLINE = Headline(
    "loss",
    label="reconstruction loss",
    title="Reconstruction of evaluation images",
    percent=False,
    higher_is_better=False,
    loss="reconstruction loss",
)


def pretrain(config: PretrainConfig, call: TrainCall) -> RunResult:
    """Pre-train a masked autoencoder; `fastvim_jax.training.train` calls this for a `PretrainConfig`."""
    if config.init is not None:
        require_masked(config.init)

    # Mesh
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.data.batch_size, config.accumulate)
    place = partial(place_batch, mesh)
    this_process: dict[str, Any] = {
        "process_index": jax.process_index(), "process_count": jax.process_count()
    }  # fmt: skip

    # Data
    host_batches = make_train_iterator(config.data, seed=config.seed, mesh=mesh, **this_process)
    batches = DevicePrefetch(host_batches, place)
    eval_size = round_up(config.data.eval_batch_size or config.data.batch_size, mesh)
    eval_batches = make_eval_iterator(config.data, batch_size=eval_size, **this_process)
    call.opened.callback(batches.close)
    call.opened.callback(eval_batches.close)

    # Run folder
    run = open_run(call, config)

    # Model
    def build() -> nnx.Module:
        return build_model(config.model, rngs=nnx.Rngs(config.seed))

    graphdef, params = nnx.split(
        nnx.eval_shape(build)
    )  # Shapes only; `begin` below builds the weights.

    # Optimizer
    learning_rate = learning_rate_schedule(
        config.optimizer,
        batch_size=config.data.batch_size,
        steps_per_epoch=batches.steps_per_epoch,
        epochs=config.epochs,
    )
    optimizer = make_optimizer(
        config.optimizer,
        params,
        learning_rate=learning_rate,
        total_steps=config.epochs * batches.steps_per_epoch,
    )

    # State: built or restored directly on its devices
    def begin() -> TrainState:
        return init_state(nnx.state(build()), optimizer, ema=config.ema_decay is not None)

    shapes = state_shapes(mesh, begin)
    state, records = begin_or_resume(begin, shapes, run, batches)

    # Step
    train_step = make_train_step(
        make_loss(graphdef, config),
        optimizer,
        draw=make_draw(graphdef),
        augment=make_augment(config.data, num_classes=1),
        ema_decay=config.ema_decay,
        seed=config.seed,
        accumulate=config.accumulate,
        shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
        reduction=config.mesh.reduction,
        by_device=config.runs_by_device,
    )

    # Evaluation
    evaluator = make_evaluator(graphdef, eval_batches, config, mesh, run.folder)

    # Loop
    return run_loop(
        state,
        on_mesh(mesh, train_step),
        batches,
        config=config,
        run=run,
        records=records,
        evaluators=[evaluator],
        headline=HEADLINE,
        learning_rate=learning_rate,
        clock=Clock(
            config.data.batch_size,
            image_flops=training_flops(config.model),
            peak_flops=peak_of(mesh, config.model),
        ),
    )


def require_masked(source: Path | str) -> None:
    """Raise a `UserError` if `source` is a run, a saved model or a file of weights without a decoder."""
    needed = "which has no decoder: a masked pre-training run or a saved masked autoencoder is needed here."
    if is_pretrained(source):
        model = read_model_config(source)
        if not isinstance(model, MaskedAutoencoderConfig):
            raise UserError(f"{source} holds the model of a {type(model).__name__}, {needed}")
        return
    folder = Path(source).expanduser()
    if folder.is_file():
        # Both our names and the authors' of a decoder's weights begin with this word, but for mask_token.
        if not any(name.startswith("decoder") for name in read_weights_file(folder).arrays):
            raise UserError(f"{folder} holds the weights of a model {needed}")
        return
    if not (folder / CONFIG_FILE).is_file():
        return
    found = read_config(folder)
    if not isinstance(found, PretrainConfig):
        raise UserError(f"{folder} is a run of a {type(found).__name__}, {needed}")


def make_draw(graphdef: nnx.GraphDef) -> Draw:
    """Return the `draw` of `make_train_step`: noise `b l`. The patches with the smallest values are kept."""

    def draw(params: Any, key: jax.Array, batch: Batch) -> jax.Array:
        return nnx.merge(graphdef, params).draw_noise(key, len(batch["image"]))

    return draw


def make_loss(graphdef: nnx.GraphDef, config: PretrainConfig) -> LossOf:
    """Return the `loss_of` of `make_train_step`: the error of the patches that the drawn noise removes."""

    def loss_of(params: Any, batch: Batch, drawn: jax.Array) -> jax.Array:
        images = require_normalised(batch["image"])
        out = nnx.merge(graphdef, params)(images, noise=drawn)
        return pixel_loss(
            images,
            out.predicted,
            out.masking.removed,
            config.model.patch,
            normalise=config.normalise_pixels,
        )

    return loss_of

"""Train a segmenter, top to bottom: mesh, data, run folder, model, optimizer, state, step, evaluation, loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastvim_jax.analysis.peaks import peak_of
from fastvim_jax.analysis.segmentation_flops import segmentation_gmacs
from fastvim_jax.data.prefetch import DevicePrefetch
from fastvim_jax.data.segmentation import EvaluationImages, make_train_iterator, normalise
from fastvim_jax.distributed import check_batch, make_mesh, on_mesh, place_batch
from fastvim_jax.errors import UserError, counted
from fastvim_jax.models import build_model
from fastvim_jax.models.upernet import SegmentationDraws
from fastvim_jax.training.accumulation import batch_first, batch_last
from fastvim_jax.training.clock import Clock
from fastvim_jax.training.loop import begin_or_resume, run_loop
from fastvim_jax.training.optimizer import learning_rate_schedule, make_optimizer
from fastvim_jax.training.pool_scale import with_scale_of_init
from fastvim_jax.training.runs import RunResult, TrainCall, open_run
from fastvim_jax.training.segmentation.config import SegmentationConfig
from fastvim_jax.training.segmentation.evaluation import HEADLINE, make_evaluator, make_predict
from fastvim_jax.training.segmentation.losses import pixel_accuracy, pixel_loss
from fastvim_jax.training.steps import (
    Batch,
    Draw,
    Loss,
    LossOf,
    TrainState,
    init_state,
    make_train_step,
    state_shapes,
)


def train(config: SegmentationConfig, call: TrainCall) -> RunResult:
    """Train a segmentation model; `fastvim_jax.training.train` calls this for a `SegmentationConfig`."""
    config = with_scale_of_init(config, call.run_dir)

    # Mesh
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.data.batch_size, config.accumulate)
    place = partial(place_batch, mesh)
    this_process: dict[str, Any] = {
        "process_index": jax.process_index(), "process_count": jax.process_count()
    }  # fmt: skip

    # Data
    batches = DevicePrefetch(
        make_train_iterator(config.data, seed=config.seed, **this_process), place
    )
    call.opened.callback(batches.close)
    eval_images = EvaluationImages(config.data)
    call.opened.callback(eval_images.close)
    class_names = batches.source.class_names
    if config.model.num_classes != len(class_names):
        raise UserError(
            f"model.num_classes is {config.model.num_classes}, but the data have "
            f"{counted(len(class_names), 'class', 'classes')}: set "
            f"model.num_classes={len(class_names)}."
        )

    # Run folder
    run = open_run(call, config, class_names)
    source: Any = batches.source  # a MaskFolderSource
    run.messages.extend((*source.notes, *config.data.notes))

    # Model: weights, and the running statistics of batch norms
    def build() -> nnx.Module:
        return build_model(config.model, rngs=nnx.Rngs(config.seed))

    graphdef, *states = nnx.split(
        nnx.eval_shape(build), nnx.Param, nnx.BatchStat
    )  # Shapes only; `begin` below builds the weights.
    params = states[0]

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
        model = build()
        statistics = nnx.state(model, nnx.BatchStat)
        return init_state(nnx.state(model, nnx.Param), optimizer, ema=False, model_state=statistics)

    shapes = state_shapes(mesh, begin)
    state, records = begin_or_resume(begin, shapes, run, batches)

    # Step
    def augment(key: jax.Array, batch: Batch) -> Batch:
        mean, std = config.data.mean, config.data.std
        return {**batch, "image": normalise(batch["image"], batch["size"], mean, std)}

    train_step = make_train_step(
        make_loss(graphdef, config),
        optimizer,
        draw=make_draw(graphdef, shapes.model_state),
        augment=augment,
        seed=config.seed,
        accumulate=config.accumulate,
        shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
    )

    # Evaluation
    evaluator = make_evaluator(
        make_predict(graphdef, config, mesh),
        eval_images,
        config,
        mesh,
        run.folder,
        progress=call.progress,
    )

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
            # Two FLOPs a multiply-add, and a backward pass of twice the forward one.
            image_flops=6e9 * sum(segmentation_gmacs(config.model, train=True).values()),
            peak_flops=peak_of(mesh, config.model.backbone),
        ),
    )


def make_draw(graphdef: nnx.GraphDef, model_state: Any) -> Draw:
    """Return the `draw` of `make_train_step`: what drop path and dropout drop, the images first."""

    def draw(params: Any, key: jax.Array, batch: Batch) -> SegmentationDraws:
        model = nnx.merge(graphdef, params, model_state)
        drawn = model.draw(key, len(batch["label"]))
        return drawn._replace(drop_path=batch_first(drawn.drop_path))

    return draw


def make_loss(graphdef: nnx.GraphDef, config: SegmentationConfig) -> LossOf:
    """Return the `loss_of` of `make_train_step`: both heads' cross entropy, and the new running statistics."""

    def loss_of(params: Any, batch: Batch, drawn: SegmentationDraws, model_state: Any) -> Loss:
        # Copied, since only variables made inside the gradient's trace can be changed there.
        model = nnx.merge(graphdef, params, jax.tree.map(jnp.copy, model_state))
        label = batch["label"].astype(jnp.int32)
        drawn = drawn._replace(drop_path=batch_last(drawn.drop_path))
        logits = model(batch["image"], train=True, drawn=drawn)
        main = pixel_loss(logits.main, label, divisor=config.loss_divisor)
        loss, metrics = main, {"main_loss": main, "accuracy": pixel_accuracy(logits.main, label)}
        if logits.auxiliary is not None:
            auxiliary = pixel_loss(logits.auxiliary, label, divisor=config.loss_divisor)
            loss += config.auxiliary_weight * auxiliary
            metrics["auxiliary_loss"] = auxiliary
        return Loss(loss, metrics, nnx.state(model, nnx.BatchStat))

    return loss_of

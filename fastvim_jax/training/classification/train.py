"""Train a classifier, from top to bottom: mesh, data, run folder, model, optimizer, state, step, evaluation, loop."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
from flax import nnx

from fastvim_jax.analysis.peaks import peak_of, training_flops
from fastvim_jax.data import make_eval_iterator, make_train_iterator
from fastvim_jax.data.labelled import make_augment, make_preprocess
from fastvim_jax.data.prefetch import DevicePrefetch
from fastvim_jax.distributed import check_batch, make_mesh, on_mesh, place_batch, round_up
from fastvim_jax.errors import UserError, counted
from fastvim_jax.models import build_model
from fastvim_jax.models.channels import channel_inputs
from fastvim_jax.training.accumulation import batch_first, batch_last
from fastvim_jax.training.classification.config import TrainConfig
from fastvim_jax.training.classification.evaluation import (
    HEADLINE,
    make_eval_step,
    make_evaluator,
)
from fastvim_jax.training.classification.losses import classification_loss
from fastvim_jax.training.clock import Clock
from fastvim_jax.training.loop import begin_or_resume, run_loop
from fastvim_jax.training.optimizer import learning_rate_schedule, make_optimizer
from fastvim_jax.training.pool_scale import with_scale_of_init
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


def train(config: TrainConfig, call: TrainCall) -> RunResult:
    """Train a classifier; `fastvim_jax.training.train` calls this for a `TrainConfig`."""
    config = with_scale_of_init(config, call.run_dir)

    # Mesh
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.data.batch_size, config.accumulate)
    place = partial(place_batch, mesh)
    this_process: dict[str, Any] = {
        "process_index": jax.process_index(), "process_count": jax.process_count()
    }  # fmt: skip

    # Data
    config = dataclasses.replace(config, data=config.data.resolved())
    host_batches = make_train_iterator(config.data, seed=config.seed, mesh=mesh, **this_process)
    batches = DevicePrefetch(host_batches, place)
    eval_size = round_up(config.data.eval_batch_size or config.data.batch_size, mesh)
    eval_batches = make_eval_iterator(config.data, batch_size=eval_size, **this_process)
    call.opened.callback(batches.close)
    call.opened.callback(eval_batches.close)
    class_names = batches.source.class_names
    _check_classes(config, class_names, eval_batches.source.class_names)

    # Run folder
    run = open_run(call, config, class_names)
    run.messages.extend((*getattr(batches.source, "notes", ()), *config.data.notes))

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
        make_loss(graphdef, label_smoothing=config.label_smoothing),
        optimizer,
        draw=make_draw(graphdef),
        augment=make_augment(
            config.data, config.model.num_classes, label_smoothing=config.label_smoothing
        ),
        ema_decay=config.ema_decay,
        seed=config.seed,
        accumulate=config.accumulate,
        shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
        reduction=config.mesh.reduction,
        by_device=config.runs_by_device,
    )

    # Evaluation
    eval_step = on_mesh(mesh, make_eval_step(graphdef, preprocess=make_preprocess(config.data)))
    evaluator = make_evaluator(
        eval_step, eval_batches, place, every_epochs=config.evaluate_every_epochs
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
            image_flops=training_flops(config.model),
            peak_flops=peak_of(mesh, config.model),
        ),
    )


def make_draw(graphdef: nnx.GraphDef) -> Draw:
    """Return the `draw` of `make_train_step`: the drop-path masks of all blocks and images, the images first."""

    def draw(params: Any, key: jax.Array, batch: Batch) -> Any:
        return batch_first(nnx.merge(graphdef, params).draw_drop_path(key, len(batch["label"])))

    return draw


def make_loss(graphdef: nnx.GraphDef, *, label_smoothing: float = 0.0) -> LossOf:
    """Return the `loss_of` of `make_train_step`: cross entropy with integer labels `b` or soft targets `b classes`.

    Args:
        graphdef: of a classifier.
        label_smoothing: mass of integer labels spread evenly over all classes.
    """

    def loss_of(params: Any, batch: Batch, drawn: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        inputs = channel_inputs(model, require_normalised(batch["image"]), batch)
        logits = model(**inputs, drop_path_keep=batch_last(drawn))
        return classification_loss(logits, batch["label"], label_smoothing=label_smoothing)

    return loss_of


def _check_classes(
    config: TrainConfig, class_names: tuple[str, ...], evaluated_names: tuple[str, ...]
) -> None:
    data = config.data
    if class_names != evaluated_names:
        missing = [name for name in class_names if name not in evaluated_names][:5]
        more = [name for name in evaluated_names if name not in class_names][:5]
        raise UserError(
            f"data.train_split={data.train_split!r} has {counted(len(class_names), 'class', 'classes')}, "
            "data.eval_split="
            f"{data.eval_split!r} {len(evaluated_names)} (only in the first: {', '.join(missing) or 'none'}; only in "
            f"the second: {', '.join(more) or 'none'}), so their numbers mean different classes: give both the same "
            "classes in the same order, an empty folder for one without images, or a list of all in data.class_list."
        )
    if config.model.num_classes != len(class_names):
        raise UserError(
            f"model.num_classes is {config.model.num_classes}, but data.source={config.data.source!r} has "
            f"{len(class_names)} classes: set model.num_classes={len(class_names)}."
        )

"""Train a detector, from top to bottom: mesh, data, run folder, model, optimizer, state, step, evaluation, loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastvim_jax.data.detection import describe_eval_sizes, make_eval_iterator, make_train_iterator
from fastvim_jax.data.device_transforms import make_preprocess
from fastvim_jax.data.prefetch import DevicePrefetch
from fastvim_jax.distributed import check_batch, make_mesh, on_mesh, place_batch, round_up
from fastvim_jax.errors import UserError, counted
from fastvim_jax.models import build_model
from fastvim_jax.training.accumulation import batch_first, batch_last
from fastvim_jax.training.clock import Clock
from fastvim_jax.training.detection.config import DetectionConfig
from fastvim_jax.training.detection.evaluation import HEADLINE, make_detect, make_evaluator
from fastvim_jax.training.detection.losses import Objects, detection_loss, draw_priorities
from fastvim_jax.training.loop import begin_or_resume, run_loop
from fastvim_jax.training.optimizer import learning_rate_schedule, make_optimizer
from fastvim_jax.training.pool_scale import with_scale_of_init
from fastvim_jax.training.runs import RunResult, TrainCall, open_run
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


def train(config: DetectionConfig, call: TrainCall) -> RunResult:
    """Train a detector; `fastvim_jax.training.train` calls this for a `DetectionConfig`."""
    config = with_scale_of_init(config, call.run_dir)

    # Mesh
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.data.batch_size, config.accumulate)
    place = partial(place_batch, mesh)
    this_process: dict[str, Any] = {
        "process_index": jax.process_index(), "process_count": jax.process_count()
    }  # fmt: skip

    # Data
    data = config.data
    batches = DevicePrefetch(make_train_iterator(data, seed=config.seed, **this_process), place)
    call.opened.callback(batches.close)
    eval_size = round_up(data.eval_batch_size or data.batch_size, mesh)
    splits = {"eval": data.eval_split} | (
        {"train_ap": data.train_split} if config.evaluate_train else {}
    )
    eval_batches = {
        name: make_eval_iterator(data, split=split, batch_size=eval_size, **this_process)
        for name, split in splits.items()
    }
    for each in eval_batches.values():
        call.opened.callback(each.close)
    source: Any = batches.source  # a CocoSource
    class_names = source.class_names
    _check_classes(config, class_names, eval_batches["eval"].source.class_names)

    # Run folder
    run = open_run(call, config, class_names, source.category_ids)
    run.messages.extend((*source.notes, *data.notes, *describe_eval_sizes(data)))

    # Model
    def build() -> nnx.Module:
        return build_model(config.model, rngs=nnx.Rngs(config.seed))

    graphdef, params = nnx.split(
        nnx.eval_shape(build)
    )  # Shapes only; `begin` below builds the weights.

    # Optimizer
    learning_rate = learning_rate_schedule(
        config.optimizer,
        batch_size=data.batch_size,
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
    preprocess = make_preprocess(data)

    def augment(key: jax.Array, batch: Batch) -> Batch:
        return {**batch, "image": preprocess(batch["image"])}

    train_step = make_train_step(
        make_loss(graphdef),
        optimizer,
        draw=make_draw(graphdef),
        augment=augment,
        ema_decay=config.ema_decay,
        seed=config.seed,
        accumulate=config.accumulate,
        shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
    )

    # Evaluation
    detect = on_mesh(mesh, make_detect(graphdef, preprocess))
    evaluators = [
        make_evaluator(
            detect,
            each,
            place,
            run.folder,
            name=name,
            masks=config.model.masks,
            every_epochs=config.evaluate_every_epochs,
            pictures=config.pictures,
            progress=call.progress,
        )
        for name, each in eval_batches.items()
    ]

    # Loop
    return run_loop(
        state,
        on_mesh(mesh, train_step),
        batches,
        config=config,
        run=run,
        records=records,
        evaluators=evaluators,
        headline=HEADLINE,
        learning_rate=learning_rate,
        clock=Clock(data.batch_size),
    )


def make_draw(graphdef: nnx.GraphDef) -> Draw:
    """Return the `draw` of `make_train_step`: drop-path masks, and the priorities of anchors and boxes."""

    def draw(params: Any, key: jax.Array, batch: Batch) -> Any:
        model = nnx.merge(graphdef, params)
        drop_key, sample_key = jax.random.split(key)
        images, objects = batch["image"].shape, batch["boxes"].shape[1]
        count = model.count_anchors((images[1], images[2]))
        priorities = draw_priorities(sample_key, model.config, images[0], count, objects)
        return batch_first(model.backbone.draw_drop_path(drop_key, images[0])), priorities

    return draw


def make_loss(graphdef: nnx.GraphDef) -> LossOf:
    """Return the `loss_of` of `make_train_step`: the sum of all losses, which are logged one by one, too."""

    def loss_of(params: Any, batch: Batch, drawn: Any) -> Loss:
        keep, priorities = drawn
        objects = Objects(batch["boxes"], batch["label"], batch["present"], batch.get("masks"))
        losses = detection_loss(
            nnx.merge(graphdef, params),
            batch["image"],
            objects,
            priorities,
            drop_path_keep=batch_last(keep),
        )
        left_out = jnp.mean(batch["left_out"].astype(jnp.float32))
        total = jnp.sum(jnp.stack(list(losses.values())))
        return Loss(
            total, {f"{k}_loss": v for k, v in losses.items()} | {"objects_left_out": left_out}
        )

    return loss_of


def _check_classes(
    config: DetectionConfig, class_names: tuple[str, ...], evaluated: tuple[str, ...]
) -> None:
    if class_names != evaluated:
        raise UserError(
            f"data.train_split={config.data.train_split!r} has "
            f"{counted(len(class_names), 'category', 'categories')}, data.eval_split="
            f"{config.data.eval_split!r} {len(evaluated)}, or other names: their labels would mean different classes. "
            "List the same categories in both files."
        )
    if config.model.num_classes != len(class_names):
        raise UserError(
            f"model.num_classes is {config.model.num_classes}, but the data have "
            f"{counted(len(class_names), 'category', 'categories')}: set "
            f"model.num_classes={len(class_names)}."
        )

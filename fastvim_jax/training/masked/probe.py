"""Train a linear probe, top to bottom: mesh, data, run folder, backbone, features, head, step, evaluation, loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from flax import nnx

from fastvim_jax.analysis.headline import Headline
from fastvim_jax.data import make_eval_iterator, make_train_iterator
from fastvim_jax.data.prefetch import DevicePrefetch
from fastvim_jax.distributed import (
    check_batch,
    make_mesh,
    on_mesh,
    place_batch,
    place_whole,
    replicated,
    round_up,
)
from fastvim_jax.errors import UserError, counted
from fastvim_jax.models import build_model
from fastvim_jax.training.clock import Clock
from fastvim_jax.training.course import require_same_weights
from fastvim_jax.training.evaluators import Evaluation, Evaluator
from fastvim_jax.training.loop import Batches, begin_or_resume, run_loop
from fastvim_jax.training.masked.config import ProbeConfig
from fastvim_jax.training.masked.features import (
    FeatureBatches,
    compute_features,
    make_augmented_extract,
    make_extract,
    padded_batches,
    require_same_features,
)
from fastvim_jax.training.masked.probe_head import (
    ProbeHead,
    make_counts,
    make_probe_loss,
    make_probe_optimizer,
)
from fastvim_jax.training.optimizer import learning_rate_schedule
from fastvim_jax.training.pool_scale import with_scale_of_init
from fastvim_jax.training.runs import RunResult, TrainCall, open_run
from fastvim_jax.training.start_from import load_weights
from fastvim_jax.training.steps import (
    Batch,
    TrainState,
    build_state,
    init_state,
    make_train_step,
    state_shapes,
)

HEADLINE = Headline("top1", label="top-1", title="Linear probe")


def probe(config: ProbeConfig, call: TrainCall) -> RunResult:
    """Train a linear probe; `fastvim_jax.training.train` calls this for a `ProbeConfig`."""
    config = with_scale_of_init(config, call.run_dir)
    # Mesh
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.data.batch_size, 1)
    place = partial(place_batch, mesh)
    this_process: dict[str, Any] = {
        "process_index": jax.process_index(), "process_count": jax.process_count()
    }  # fmt: skip

    # Data
    eval_size = round_up(config.data.eval_batch_size or config.data.batch_size, mesh)
    eval_images = make_eval_iterator(config.data, batch_size=eval_size, **this_process)
    call.opened.callback(eval_images.close)
    class_names = eval_images.source.class_names
    if config.model.num_classes != len(class_names):
        raise UserError(
            f"model.num_classes is {config.model.num_classes}, but data.source={config.data.source!r} has "
            f"{len(class_names)} classes: set model.num_classes={len(class_names)}."
        )

    # Run folder
    run = open_run(call, config, class_names)

    # Backbone: frozen, in evaluation mode
    backbone = build_model(config.model, rngs=nnx.Rngs(config.seed))
    report = load_weights(
        backbone, str(config.init), weights=config.init_weights, allow=config.init_allow
    )
    run.messages.append(report.in_words())
    backbone_graph, backbone_params = nnx.split(backbone)
    require_same_weights(backbone_params)
    backbone_params = place_whole(backbone_params, replicated(mesh))
    extract = on_mesh(mesh, make_extract(backbone_graph, config.data))

    # Features: cached where they fit
    train_images = make_eval_iterator(
        config.data, split=config.data.train_split, batch_size=eval_size, **this_process
    )
    call.opened.callback(train_images.close)
    images = len(train_images.source) + len(eval_images.source)
    needed = images * config.model.embed_dim * 4 / 2**30
    cached = needed <= config.cache_gigabytes and jax.process_count() == 1
    batches: Batches
    if cached:
        run.messages.append(
            f"Features of {images} images are computed once, without augmentation, and kept in {needed:.2g} GB."
        )
        features = compute_features(extract, backbone_params, train_images, place)
        eval_features = compute_features(extract, backbone_params, eval_images, place)
        if len(features.label) < config.data.batch_size:
            raise UserError(
                f"data.batch_size is {config.data.batch_size}, but only "
                f"{counted(len(features.label), 'image is', 'images are')} readable."
            )
        batches = FeatureBatches(
            features, batch_size=config.data.batch_size, seed=config.seed, place=place
        )
    else:
        reason = (
            f"need {needed:.2g} GB, more than cache_gigabytes={config.cache_gigabytes:g}"
            if jax.process_count() == 1
            else "belong to several processes"
        )
        run.messages.append(
            f"Features {reason}: they are not cached but computed in every epoch, from augmented images."
        )
        stream = DevicePrefetch(
            make_train_iterator(config.data, seed=config.seed, **this_process), place
        )
        call.opened.callback(stream.close)
        batches = stream

    # Head and its optimizer
    def build() -> nnx.Module:
        return ProbeHead(
            config.model.embed_dim,
            config.model.num_classes,
            precision=config.model.precision,
            rngs=nnx.Rngs(config.seed),
        )

    head_graph, *_ = nnx.split(nnx.eval_shape(build), nnx.Param, nnx.BatchStat)
    learning_rate = learning_rate_schedule(
        config.optimizer,
        batch_size=config.data.batch_size,
        steps_per_epoch=batches.steps_per_epoch,
        epochs=config.epochs,
    )
    optimizer = make_probe_optimizer(config, learning_rate)

    # State
    def begin() -> TrainState:
        head = build()
        statistics = nnx.state(head, nnx.BatchStat)
        return init_state(nnx.state(head, nnx.Param), optimizer, ema=False, model_state=statistics)

    shapes = state_shapes(mesh, begin)
    records: list[dict[str, Any]] = []
    if run.checkpoints.latest_for_all() is None:
        state = build_state(begin, shapes)  # `init` is the backbone's, not the head's
    else:
        require_same_features(run.folder, run.checkpoints.read_meta()["data"], cached=cached)
        state, records = begin_or_resume(begin, shapes, run, batches)

    # Step
    train_step = on_mesh(
        mesh,
        make_train_step(
            make_probe_loss(head_graph),
            optimizer,
            seed=config.seed,
            shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
        ),
    )
    augmented = on_mesh(mesh, make_augmented_extract(backbone_graph, config.data, config.seed))

    def streamed_step(state: TrainState, batch: Batch, *, norms: bool) -> Any:
        return train_step(state, augmented(backbone_params, batch, state.step), norms=norms)

    # Evaluation
    counts = on_mesh(mesh, make_counts(head_graph))

    def evaluate(state: TrainState, at: int) -> Evaluation:
        totals: dict[str, float] = {}
        for batch in padded_batches(eval_features, eval_size) if cached else eval_images:
            placed = place({k: v for k, v in batch.items() if k != "corrupt"})
            if not cached:
                placed = {**placed, "feature": extract(backbone_params, placed)}
                del placed["image"]
            found = jax.device_get(counts(state.params, state.model_state, placed))
            totals = {k: totals.get(k, 0) + v.item() for k, v in found.items()}
        if not cached:
            eval_images.rewind()
        if not totals.get("count"):
            raise UserError(
                "there is no valid image to evaluate: check data.eval_split and data.path."
            )
        shares = {f"raw_{k}": totals[k] / totals["count"] for k in ("top1", "top5", "loss")}
        return Evaluation({"count": totals["count"], **shares})

    # Loop
    return run_loop(
        state,
        train_step if cached else streamed_step,
        batches,
        config=config,
        run=run,
        records=records,
        evaluators=[
            Evaluator("eval", evaluate, config.evaluate_every_epochs, eval_images.steps_per_epoch)
        ],
        headline=HEADLINE,
        learning_rate=learning_rate,
        clock=Clock(config.data.batch_size),
    )

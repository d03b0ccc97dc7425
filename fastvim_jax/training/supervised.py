"""Supervised training, from top to bottom: mesh, data, model, optimizer, step, checkpoint, loop, evaluation.

A run is decided by its config alone. It resumes from its latest checkpoint, which holds the weights, their
average, the optimizer, the position in the data and the metrics of the log's open window; on a CPU the resumed
run ends in the same bits as an uninterrupted one. How many devices and processes share the work changes only the
rounding, and a run may go on with other ones.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from fastvim_jax.analysis.peaks import peak_of, training_flops
from fastvim_jax.data import make_eval_iterator, make_train_iterator
from fastvim_jax.data.device_transforms import make_augment, make_preprocess
from fastvim_jax.data.prefetch import DevicePrefetch
from fastvim_jax.distributed import (
    check_batch,
    make_mesh,
    on_mesh,
    place_batch,
    round_up,
    union,
    wait,
)
from fastvim_jax.errors import UserError
from fastvim_jax.models import build_model
from fastvim_jax.training.checkpoints import Checkpoints
from fastvim_jax.training.clock import Clock
from fastvim_jax.training.config import TrainConfig
from fastvim_jax.training.evaluation import evaluate_state, in_words
from fastvim_jax.training.health import Window
from fastvim_jax.training.metrics import RunLog, evaluated, open_sinks, read_metrics
from fastvim_jax.training.norms import parameter_names
from fastvim_jax.training.optimizer import learning_rate_schedule, make_optimizer
from fastvim_jax.training.profiling import Profiler, ProfileSteps
from fastvim_jax.training.run_folder import CHECKPOINTS, start_run
from fastvim_jax.training.steps import (
    TrainState,
    build_state,
    init_state,
    make_eval_step,
    make_train_step,
    state_shapes,
)
from fastvim_jax.training.stopping import Stopped, StopRequest
from fastvim_jax.training.summary import SummaryPicture


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        run_dir: the run folder.
        step: updates made.
        metrics: the last evaluation's record: `raw_top1`, `ema_top1`, ... as shares from 0 to 1.
        seconds: duration of this process's part.
    """

    run_dir: Path
    step: int
    metrics: dict[str, Any]
    seconds: float


def train(
    config: TrainConfig,
    run_dir: Path | str,
    *,
    progress: bool = True,
    profile: ProfileSteps | None = None,
    wandb: str | None = None,
) -> RunResult:
    """Train, or go on training, in a run folder, which belongs to this process meanwhile.

    Args:
        config: the run.
        run_dir: a new folder, or one that holds an unfinished or finished run of the same config.
        progress: show a progress bar on standard error.
        profile: trace these steps into the folder `profile` of the run folder.
        wandb: a project of Weights & Biases that gets the numbers too.

    Raises:
        UserError: bad input, found before any compute; a damaged checkpoint; a file that cannot be written.
        NonFiniteError: a loss, gradient or update that is not finite.
        Stopped: SIGTERM or SIGINT came; the run is saved as it was after the step then under way.
    """
    with ExitStack() as opened:
        return _train(config, run_dir, opened, progress=progress, profile=profile, wandb=wandb)


def _train(
    config: TrainConfig,
    run_dir: Path | str,
    opened: ExitStack,
    *,
    progress: bool,
    profile: ProfileSteps | None,
    wandb: str | None,
) -> RunResult:
    started = time.perf_counter()

    # Mesh
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.data.batch_size, config.accumulate)
    place = partial(place_batch, mesh)
    share: dict[str, Any] = {
        "process_index": jax.process_index(), "process_count": jax.process_count()
    }  # fmt: skip

    # Data
    batches = DevicePrefetch(make_train_iterator(config.data, seed=config.seed, **share), place)
    eval_size = round_up(config.data.eval_batch_size or config.data.batch_size, mesh)
    eval_batches = make_eval_iterator(config.data, batch_size=eval_size, **share)
    opened.callback(batches.close)
    opened.callback(eval_batches.close)
    class_names = batches.source.class_names
    _check_classes(config, class_names, eval_batches.source.class_names)
    steps_per_epoch = batches.steps_per_epoch
    total_steps = config.epochs * steps_per_epoch

    # Run folder
    folder = opened.enter_context(start_run(run_dir, config, class_names))
    checkpoints = opened.enter_context(
        Checkpoints(folder / CHECKPOINTS, keep=config.keep_checkpoints)
    )
    stop = opened.enter_context(StopRequest())

    # Model
    def build() -> nnx.Module:
        return build_model(config.model, rngs=nnx.Rngs(config.seed))

    graphdef, params = nnx.split(nnx.eval_shape(build))  # Only shapes.

    # Optimizer
    learning_rate = learning_rate_schedule(
        config.optimizer,
        batch_size=config.data.batch_size,
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
    )
    optimizer = make_optimizer(
        config.optimizer, params, learning_rate=learning_rate, total_steps=total_steps
    )

    # State: built, or restored, where it lies
    def begin() -> TrainState:
        return init_state(nnx.state(build()), optimizer, ema=config.ema_decay is not None)

    state = state_shapes(mesh, begin)

    # Step
    train_step = make_train_step(
        graphdef,
        optimizer,
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema_decay,
        seed=config.seed,
        augment=make_augment(
            config.data, config.model.num_classes, label_smoothing=config.label_smoothing
        ),
        accumulate=config.accumulate,
        shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    train_step = on_mesh(mesh, train_step)
    eval_step = on_mesh(mesh, make_eval_step(graphdef, preprocess=make_preprocess(config.data)))

    # Checkpoint
    window = Window(config)
    if checkpoints.latest() is None:
        state = build_state(begin, state)
    else:
        meta = checkpoints.read_meta()
        state = checkpoints.restore_state(state)
        batches.set_state(meta["data"])
        window = Window(config, meta["window"])
    first_step = int(state.step)

    # Log
    sinks = open_sinks(wandb, folder, config)
    log = opened.enter_context(
        RunLog(folder, step=first_step, total_steps=total_steps, progress=progress, sinks=sinks)
    )
    parameters = parameter_names(params)
    clock = Clock(
        config.data.batch_size,
        image_flops=training_flops(config.model),
        peak_flops=peak_of(mesh, config.model),
    )
    profiler = opened.enter_context(Profiler(profile, folder / "profile", first_step + 1))
    picture = SummaryPicture(folder, total_steps)

    def save() -> None:
        records = window.fetch(checkpoints.describe_latest)
        position = batches.get_state() | {"corrupt": sorted(union(batches.corrupt))}
        checkpoints.save(state, {"data": position, "window": records})

    def stop_after(step: int) -> Stopped:
        save()
        checkpoints.wait()
        return Stopped(f"{stop.reason}", step, total_steps)

    # Evaluation
    def evaluate_at(step: int) -> None:
        window.fetch(checkpoints.describe_latest)
        scores = evaluate_state(eval_step, state, eval_batches, place)
        if corrupt := union(eval_batches.corrupt):
            scores["corrupt_records"] = len(corrupt)
        log.write("eval", step, {"epoch": step / steps_per_epoch, **scores})
        log.say(f"epoch {step / steps_per_epoch:g}: {in_words(scores)}")
        picture.draw()

    def evaluation_due(step: int) -> bool:
        epoch, rest = divmod(step, steps_per_epoch)
        return step == total_steps or (rest == 0 and _due(epoch, config.evaluate_every_epochs))

    # Loop
    if (left := (config.ema_decay or 0.0) ** total_steps) > 0.01:
        log.say(
            f"After {total_steps} steps the average (ema) will still be {left:.0%} the initial weights: judge the raw "
            f"ones, or set an ema_decay below {config.ema_decay}."
        )
    if first_step:
        log.say(f"Resuming at step {first_step} of {total_steps}.")
        if evaluation_due(first_step) and not evaluated(folder, first_step):
            evaluate_at(first_step)  # The run was stopped between saving and evaluating.
    for step in range(first_step + 1, total_steps + 1):
        with profiler.begin(step):
            with clock.timed("data_wait"):
                batch = stop.next_of(batches)
            if batch is None:
                raise stop_after(step - 1)
            with clock.timed("dispatch"):
                state, metrics = train_step(state, batch)
        with clock.timed("device_wait"):
            window.add(step, metrics)
        clock.step()
        log.advance()
        last = step == total_steps
        stopping = stop.agreed(step)

        if step == first_step + 1:
            jax.block_until_ready(metrics)
            clock.first_step()
        if trace := profiler.end(step, metrics):
            log.say(f"The trace is in {trace}: show it with xprof or TensorBoard's profile plugin.")
        if step % config.log_every_steps == 0 or last:
            with clock.timed("device_wait"):
                scalars = window.summarise(checkpoints.describe_latest)
            scalars |= {"epoch": step / steps_per_epoch}
            scalars |= {"learning_rate": float(learning_rate(step - 1))}
            if corrupt := union(batches.corrupt):
                scalars["corrupt_records"] = len(corrupt)
            log.write("train", step, scalars | clock.lap())
            log.show(loss=scalars["loss"], lr=scalars["learning_rate"])
        if last or step % steps_per_epoch == 0:
            log.write("norms", step, {"epoch": step / steps_per_epoch, **window.norms(parameters)})
        if stopping and not last:
            raise stop_after(step)
        if last or _due(step, config.checkpoint_every_steps or steps_per_epoch):
            with clock.timed("checkpoint_seconds"):
                save()
        if evaluation_due(step):
            with clock.timed("evaluation_seconds"):
                evaluate_at(step)
        checkpoints.check()
    checkpoints.wait()
    picture.draw(at_once=True)
    wait("log")
    scores = read_metrics(folder, "eval")[-1]
    return RunResult(folder, total_steps, scores, time.perf_counter() - started)


def _check_classes(
    config: TrainConfig, class_names: tuple[str, ...], evaluated_names: tuple[str, ...]
) -> None:
    data = config.data
    if class_names != evaluated_names:
        missing = [name for name in class_names if name not in evaluated_names][:5]
        more = [name for name in evaluated_names if name not in class_names][:5]
        raise UserError(
            f"data.train_split={data.train_split!r} has {len(class_names)} classes, data.eval_split="
            f"{data.eval_split!r} {len(evaluated_names)} (only in the first: {', '.join(missing) or 'none'}; only in "
            f"the second: {', '.join(more) or 'none'}), so their numbers mean different classes: give both the same "
            "classes in the same order, an empty folder for one without images, or a list of all in data.class_list."
        )
    if config.model.num_classes != len(class_names):
        raise UserError(
            f"model.num_classes is {config.model.num_classes}, but data.source={config.data.source!r} has "
            f"{len(class_names)} classes: set model.num_classes={len(class_names)}."
        )


def _due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0

"""Run the training loop that all trainers share: steps, log, checkpoints, evaluations, and stops on request.

The loop knows steps and states, but no task. A run resumes from its latest checkpoint, which holds the weights, their
average, the optimizer's state, the position in the data, and the metrics of the steps since the last line of the log
(the *open window*). On a CPU, a resumed run ends in the same bits as an uninterrupted one. The number of devices and
processes changes only the rounding, so a run may resume on another number of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from fastvim_jax.analysis.headline import Headline
from fastvim_jax.data.stream import WorkersEnded, describe_shared_memory
from fastvim_jax.distributed import (
    all_gather_set,
    arrays_of_first_process,
    barrier,
    connect,
    describe_idle,
)
from fastvim_jax.errors import UserError
from fastvim_jax.training.clock import Clock
from fastvim_jax.training.config import RunConfig
from fastvim_jax.training.corrupt import count_corrupt
from fastvim_jax.training.course import require_same_course
from fastvim_jax.training.evaluators import Evaluator
from fastvim_jax.training.feed import PROBED, FeedMeter
from fastvim_jax.training.health import Window
from fastvim_jax.training.metrics import RunLog, evaluated, open_sinks, read_metrics
from fastvim_jax.training.parameter_norms import parameter_names
from fastvim_jax.training.profiling import Profiler
from fastvim_jax.training.run_folder import INIT_FILE, write_record
from fastvim_jax.training.runs import OpenRun, RunResult
from fastvim_jax.training.schedules import Schedule
from fastvim_jax.training.start_from import start_state
from fastvim_jax.training.steps import Metrics, TrainState, build_state, measures_norms
from fastvim_jax.training.stopping import Stopped
from fastvim_jax.training.summary import SummaryPicture


@runtime_checkable
class Batches(Protocol):
    """Endless training batches, as `data.prefetch.DevicePrefetch` yields them.

    Attributes:
        steps_per_epoch: batches in one pass over the data.
        corrupt: indices of the records found unreadable so far.
    """

    steps_per_epoch: int
    corrupt: set[int]

    def __iter__(self) -> Iterator[Batch]:
        """Return itself."""

    def __next__(self) -> Batch:
        """Return the next batch, on the devices."""

    def seconds_per_batch(self) -> float | None:
        """Return the mean time to make a batch since the last call, without waiting for the step; None if none was."""

    def get_state(self) -> dict[str, Any]:
        """Return the position after the last batch taken, as JSON-able values."""

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue at the position `state`, a result of `get_state`."""


def begin_or_resume(
    begin: Callable[[], TrainState], shapes: TrainState, run: OpenRun, batches: Batches
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Restore the run's latest checkpoint and the position in the data. Without a checkpoint, build a new state.

    A new state gets the weights that `config.init` names. `init.json` then tells which parameters were loaded.

    Args:
        begin: builds the state before the first step; called only if the run has no checkpoint.
        shapes: shapes and shardings of this state, from `state_shapes`.
        run: the run folder.
        batches: the training data; moved to the position of the checkpoint.

    Returns:
        The state, and the records of the open window, for `run_loop`.
    """
    if run.checkpoints.latest_for_all() is None:
        state = build_state(begin, shapes)
        if run.config.init is not None:
            state, report = start_state(state, run.config, run.class_names)
            write_record(run.folder / INIT_FILE, report.to_dict())
            run.messages.append(report.in_words())
        return state, []
    meta = run.checkpoints.read_meta()
    state = run.checkpoints.restore_state(shapes)
    try:
        batches.set_state(meta["data"])
        return state, meta["window"]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"its position in the data cannot be used ({type(error).__name__}: {error})"
        raise run.checkpoints.damaged(meta["step"], reason) from error


def run_loop(
    state: TrainState,
    train_step: Callable[..., tuple[TrainState, Metrics]],
    batches: Batches,
    *,
    config: RunConfig,
    run: OpenRun,
    records: Sequence[dict[str, Any]],
    evaluators: Sequence[Evaluator],
    headline: Headline,
    learning_rate: Schedule,
    clock: Clock,
) -> RunResult:
    """Train from `state` to the last epoch's end.

    Every step calls `train_step` on the next batch. Every `config.log_every_steps` steps, the loop logs the means of
    the metrics since the last line as a record of kind `train`. After every epoch, it logs the norms of all parameters
    as a record of kind `norms`. It saves a checkpoint every `config.checkpoint_every_steps` steps. Each evaluator runs
    at its own interval and after the last step, and logs its scores under its own name. A batch of new shapes is
    announced, because the step is compiled again for them.

    Args:
        state: the state to start from, from `begin_or_resume`.
        train_step: from `make_train_step`, under the mesh (`distributed.on_mesh`); called with `norms`.
        batches: the training data.
        config: configuration of the run.
        run: the run folder, held open.
        records: the records of the open window, from `begin_or_resume`.
        evaluators: evaluators of the run, the most important first. The scores of the first are `RunResult.metrics`.
        headline: which of the first evaluator's scores sums up the run.
        learning_rate: the learning rate by step, for the log.
        clock: a clock started before the first step, so that it times compilation.

    Raises:
        DecodeError: all processes together met more undecodable records than `data.max_corrupt`.
        NonFiniteError: a loss, gradient or update that is not finite.
        Stopped: a signal came. The loop finished the step under way and saved its state.
        UserError: a file cannot be written.
    """
    steps_per_epoch = batches.steps_per_epoch
    total_steps = config.epochs * steps_per_epoch
    first_step = int(state.step)
    require_same_course(
        {"": config},
        run.class_names,
        steps_per_epoch=steps_per_epoch,
        step_to_start_from=first_step,
        **{f"batches_of_{each.name}": each.batches for each in evaluators},
    )
    connect(state.step.sharding)
    folder, checkpoints, stop, call = run.folder, run.checkpoints, run.stop, run.call
    window = Window(config, records)
    parameters = parameter_names(state.params)
    main = evaluators[0].name if evaluators else "eval"
    feed = FeedMeter(clock.batch_size, getattr(config, "data", None))
    picture = SummaryPicture(folder, total_steps, headline, main)
    sinks = open_sinks(call.wandb, folder, config)
    log = call.opened.enter_context(
        RunLog(
            folder, step=first_step, total_steps=total_steps, progress=call.progress, sinks=sinks
        )
    )
    profiler = call.opened.enter_context(Profiler(call.profile, folder / "profile", first_step + 1))

    def save() -> None:
        records = window.fetch(checkpoints.describe_latest)
        position = batches.get_state() | {"corrupt": sorted(all_gather_set(batches.corrupt))}
        checkpoints.save(state, {"data": position, "window": records})

    def stop_after(step: int) -> Stopped:
        save()
        checkpoints.wait()
        return Stopped(f"{stop.reason}", step, total_steps)

    def evaluate_at(step: int, due: Sequence[Evaluator]) -> None:
        window.fetch(checkpoints.describe_latest)
        for evaluator in due:
            try:
                scores, drawn = evaluator.run(state, step)
            except WorkersEnded as error:  # Only the evaluation failed: save the training.
                if jax.process_count() > 1:
                    raise
                stop.ask(str(error))
                raise stop_after(step) from error
            log.write(evaluator.name, step, {"epoch": step / steps_per_epoch, **scores})
            words = headline.in_words(scores) or ", ".join(
                f"{k} {v:.4g}" for k, v in scores.items()
            )
            log.say(f"epoch {step / steps_per_epoch:g}: {words}")
            if drawn is not None:
                log.say(f"A picture of it is in {drawn}.")
        picture.draw()

    def due_at(step: int) -> list[Evaluator]:
        return [each for each in evaluators if each.due(step, steps_per_epoch, total_steps)]

    initial_share = (
        config.ema_decay or 0.0
    ) ** total_steps  # of the initial weights in the last average
    if initial_share > 0.01:
        log.say(
            f"After {total_steps} steps the average (ema) will still hold {initial_share:.0%} of the initial weights: "
            f"judge the raw ones, or set an ema_decay below {config.ema_decay}."
        )
    for message in (*run.messages, describe_idle(config.mesh), describe_shared_memory()):
        if message:
            log.say(message)
    if first_step:
        log.say(f"Resuming at step {first_step} of {total_steps}.")
        # Make up for evaluations of a run that stopped between saving and evaluating.
        due = due_at(first_step)
        if missed := list(itertools.compress(due, _missed(folder, first_step, due))):
            evaluate_at(first_step, missed)
    stop.before_start(total_steps, first_step)
    every = config.checkpoint_every_steps or steps_per_epoch

    def saved_at(step: int) -> bool:
        due = bool(config.keep_best and due_at(step))
        return step == total_steps or step % every == 0 or due

    def logged_at(step: int) -> bool:
        return step == total_steps or step % config.log_every_steps == 0

    def closes_epoch(step: int) -> bool:
        return step == total_steps or step % steps_per_epoch == 0

    compiled_for: list[tuple[dict[str, tuple[int, ...]], bool]] = []
    for step in range(first_step + 1, total_steps + 1):
        with profiler.begin(step):
            # 1) Take a batch. Without one the run ends, because a data worker died; the state is that of the last step.
            with clock.timed("data_wait"):
                batch = stop.next_of(batches)
            if batch is None:
                raise stop_after(step - 1)
            # A line of the log and a checkpoint want all norms, which another program measures on GPUs. The first step
            # measures them to tell an update that overflows from a loss that does. With channel sampling all steps do:
            # two programs for each number of channels would take twice as long to compile.
            read = step == 1 or logged_at(step) or saved_at(step) or closes_epoch(step)
            norms = measures_norms(read or config.samples_channels)
            shapes = {name: jax.numpy.shape(values) for name, values in batch.items()}
            compiles = (shapes, norms) not in compiled_for
            if compiles and compiled_for:  # Channel sampling gives batches of other shapes.
                words = (f"{k} {'x'.join(map(str, shape))}" for k, shape in shapes.items())
                what = f"for batches of {', '.join(words)}"
                if any(shapes == known for known, _ in compiled_for):
                    what = f"{'with' if norms else 'without'} the norms of all parameters"
                log.say(f"Step {step} compiles the program {what}.")
            if compiles:
                compiled_for.append((shapes, norms))
            # 2) Make the update. Only the probed steps wait for the device.
            with clock.timed("compile_seconds" if compiles else "dispatch"):
                begun = time.perf_counter()
                state, metrics = train_step(state, batch, norms=norms)
                if step - first_step in PROBED:
                    jax.block_until_ready((state, metrics))
                    feed.add_step(time.perf_counter() - begun)
        # 3) Note the metrics, and ask all processes whether to stop after this step.
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
        # 4) Log.
        if logged_at(step):
            with clock.timed("device_wait"):
                scalars = window.summarise(checkpoints.describe_latest)
            scalars |= {"epoch": step / steps_per_epoch}
            scalars |= {"learning_rate": float(learning_rate(step - 1))}
            if corrupt := count_corrupt(batches.corrupt, getattr(config, "data", None)):
                scalars["corrupt_records"] = corrupt
            timing = clock.lap() | feed.lap(batches.seconds_per_batch())
            log.write("train", step, scalars | timing)
            if advice := feed.message(timing):
                log.say(advice)
            log.show(loss=scalars["loss"], lr=scalars["learning_rate"])
        if closes_epoch(step):
            log.write("norms", step, {"epoch": step / steps_per_epoch, **window.norms(parameters)})
        # 5) Stop, or save and then evaluate. A run that ends during an evaluation makes up for it when it resumes.
        if stopping and not last:
            raise stop_after(step)
        due = due_at(step)
        if saved_at(step):
            with clock.timed("checkpoint_seconds"):
                save()
        if due:
            with clock.timed("evaluation_seconds"):
                evaluate_at(step, due)
        checkpoints.check()
    checkpoints.wait()
    picture.draw(at_once=True)
    barrier("log")
    evaluations = read_metrics(folder, main)
    scores = evaluations[-1] if evaluations else {}
    seconds = time.perf_counter() - call.started
    return RunResult(folder, total_steps, scores, seconds, headline.in_words(scores))


def _missed(folder: Path, step: int, evaluators: Sequence[Evaluator]) -> list[bool]:
    """Return for each evaluator whether the first process's log lacks its record of `step`."""

    def look() -> dict[str, np.ndarray]:
        return {"missed": np.asarray([not evaluated(folder, step, e.name) for e in evaluators])}

    return arrays_of_first_process(look)["missed"].tolist()

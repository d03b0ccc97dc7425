"""The loop that every trainer ends in: steps, log, checkpoints, evaluations, and stopping when asked to.

The loop knows steps and states, and nothing of a task. A run resumes from its latest checkpoint, which holds the
weights, their average, the optimizer, the position in the data and the metrics of the log's open window; on a CPU the
resumed run ends in the same bits as an uninterrupted one. How many devices and processes share the work changes only
the rounding, and a run may go on with other ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from fastvim_jax.analysis.headline import Headline
from fastvim_jax.data.stream import WorkersEnded
from fastvim_jax.distributed import union, wait
from fastvim_jax.training.clock import Clock
from fastvim_jax.training.config import RunConfig
from fastvim_jax.training.evaluators import Evaluator
from fastvim_jax.training.health import Window
from fastvim_jax.training.metrics import RunLog, evaluated, open_sinks, read_metrics
from fastvim_jax.training.parameter_norms import parameter_names
from fastvim_jax.training.profiling import Profiler
from fastvim_jax.training.run_folder import INIT_FILE, write_record
from fastvim_jax.training.runs import OpenRun, RunResult
from fastvim_jax.training.schedules import Schedule
from fastvim_jax.training.start_from import start_state
from fastvim_jax.training.steps import Batch, Metrics, TrainState, build_state
from fastvim_jax.training.stopping import Stopped
from fastvim_jax.training.summary import SummaryPicture


@runtime_checkable
class Batches(Protocol):
    """Training batches without end, as `data.prefetch.DevicePrefetch` gives them.

    Attributes:
        steps_per_epoch: batches in one pass over the data.
        corrupt: records that could not be read so far.
    """

    steps_per_epoch: int
    corrupt: set[int]

    def __iter__(self) -> Iterator[Batch]:
        """Return itself."""

    def __next__(self) -> Batch:
        """Return the next batch, on the devices."""

    def get_state(self) -> dict[str, Any]:
        """Return the position behind the last batch taken, JSON-able."""

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""


def begin_or_resume(
    begin: Callable[[], TrainState], shapes: TrainState, run: OpenRun, batches: Batches
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Build the state before the first step or, if the run has a checkpoint, restore the latest; place the data alike.

    A new state gets the weights that `config.init` names; what became of each parameter is in `init.json`.

    Args:
        begin: builds the state before the first step; not called when a checkpoint is there.
        shapes: shapes and places of this state, from `state_shapes`.
        run: the run folder.
        batches: the training data; moved to where the checkpoint was taken.

    Returns:
        The state, and the records of the log's open window, for `run_loop`.
    """
    if run.checkpoints.latest() is None:
        state = build_state(begin, shapes)
        if run.config.init is not None:
            state, report = start_state(state, run.config, run.class_names)
            write_record(run.folder / INIT_FILE, report.to_dict())
            run.messages.append(report.in_words())
        return state, []
    meta = run.checkpoints.read_meta()
    state = run.checkpoints.restore_state(shapes)
    batches.set_state(meta["data"])
    return state, meta["window"]


def run_loop(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
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

    Every step calls `train_step` on the next batch. Every `config.log_every_steps` the means of its metrics since the
    last line are logged as a record of kind `train`; every epoch the norms of all parameters as `norms`. Checkpoints
    are saved every `config.checkpoint_every_steps`. Each evaluator runs at its own interval and after the last step,
    and logs its scores under its own name.

    Args:
        state: where to begin, from `begin_or_resume`.
        train_step: from `make_train_step`, under the mesh (`distributed.on_mesh`).
        batches: the training data.
        config: the run.
        run: the run folder, held open.
        records: the log's open window, from `begin_or_resume`.
        evaluators: what judges the run, the most important first; `RunResult.metrics` are this one's scores.
        headline: which of the first evaluator's scores the run is known by.
        learning_rate: the learning rate by step, for the log.
        clock: made before the first step, so that it times compilation.

    Raises:
        NonFiniteError: a loss, gradient or update that is not finite.
        Stopped: a signal came; the run is saved as it was after the step then under way.
        UserError: a file cannot be written.
    """
    steps_per_epoch = batches.steps_per_epoch
    total_steps = config.epochs * steps_per_epoch
    first_step = int(state.step)
    folder, checkpoints, stop, call = run.folder, run.checkpoints, run.stop, run.call
    window = Window(config, records)
    parameters = parameter_names(state.params)
    main = evaluators[0].name if evaluators else "eval"
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
        position = batches.get_state() | {"corrupt": sorted(union(batches.corrupt))}
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
            except WorkersEnded as error:  # The training itself is sound: save it.
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

    if (left := (config.ema_decay or 0.0) ** total_steps) > 0.01:
        log.say(
            f"After {total_steps} steps the average (ema) will still be {left:.0%} the initial weights: judge the raw "
            f"ones, or set an ema_decay below {config.ema_decay}."
        )
    for message in run.messages:
        log.say(message)
    if first_step:
        log.say(f"Resuming at step {first_step} of {total_steps}.")
        # A run may have been stopped between saving and evaluating.
        missed = [e for e in due_at(first_step) if not evaluated(folder, first_step, e.name)]
        if missed:
            evaluate_at(first_step, missed)
    stop.before_start(total_steps, first_step)
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
        due = due_at(step)
        every = config.checkpoint_every_steps or steps_per_epoch
        if last or step % every == 0 or (config.keep_best and due):
            with clock.timed("checkpoint_seconds"):
                save()
        if due:
            with clock.timed("evaluation_seconds"):
                evaluate_at(step, due)
        checkpoints.check()
    checkpoints.wait()
    picture.draw(at_once=True)
    wait("log")
    found = read_metrics(folder, main)
    scores = found[-1] if found else {}
    seconds = time.perf_counter() - call.started
    return RunResult(folder, total_steps, scores, seconds, headline.in_words(scores))

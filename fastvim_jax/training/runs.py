"""Start a run of any task: `train` finds the task's trainer, and `open_run` holds the run folder while it trains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.listing import listing_by
from fastvim_jax.data.turbo import chosen_decoder
from fastvim_jax.distributed import arrays_of_first_process
from fastvim_jax.training.checkpoints import Checkpoints
from fastvim_jax.training.choice import best_step
from fastvim_jax.training.config import RunConfig
from fastvim_jax.training.profiling import ProfileSteps
from fastvim_jax.training.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    has_checkpoint,
    read_config,
    start_run,
)
from fastvim_jax.training.stopping import StopRequest
from fastvim_jax.training.tasks import trainer_of


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        run_dir: the run folder.
        step: updates made.
        metrics: the last record of the first evaluator, for a classifier `raw_top1`, `ema_top1`, ... as shares from
            0 to 1; empty without one.
        seconds: duration of this process's part.
        headline: the scores the run is known by, in words.
    """

    run_dir: Path
    step: int
    metrics: dict[str, Any]
    seconds: float
    headline: str = ""


@dataclass(frozen=True)
class TrainCall:
    """What `train` was called with besides the config.

    Attributes:
        run_dir: the run folder.
        progress: whether to show a progress bar.
        profile: steps to trace, or None.
        wandb: a project of Weights & Biases, or None.
        opened: exit stack; contexts that are entered into it are closed when the run ends, even by an error.
        started: `time.perf_counter()` at the call.
        stop: notes signals that ask the run to stop, from the first second on.
    """

    run_dir: Path
    progress: bool
    profile: ProfileSteps | None
    wandb: str | None
    opened: ExitStack
    started: float
    stop: StopRequest


@dataclass(frozen=True)
class OpenRun:
    """A run folder that this process holds.

    Attributes:
        call: what `train` was called with.
        config: the run.
        class_names: names of the classes by number; empty where the task has none.
        folder: the run folder.
        checkpoints: its checkpoints.
        stop: notes signals that ask the run to stop.
        messages: lines to show when the loop begins.
    """

    call: TrainCall
    config: RunConfig
    class_names: tuple[str, ...]
    folder: Path
    checkpoints: Checkpoints
    stop: StopRequest
    messages: list[str] = field(default_factory=list)


def train(
    config: RunConfig,
    run_dir: Path | str,
    *,
    progress: bool = True,
    profile: ProfileSteps | None = None,
    wandb: str | None = None,
) -> RunResult:
    """Train a run, or continue it, in a run folder. No other process can train in the folder at the same time.

    Args:
        config: the run; its class says which task it is.
        run_dir: a new folder, or one that holds an unfinished or finished run of the same config.
        progress: show a progress bar on standard error.
        profile: trace these steps into the folder `profile` of the run folder.
        wandb: a project of Weights & Biases that gets the numbers too.

    Raises:
        UserError: bad input (found before any compute), a damaged checkpoint, or a file that cannot be written.
        NonFiniteError: a loss, gradient or update that is not finite.
        Stopped: a signal came, or a data worker died. The step under way was finished and the run saved.
    """
    started = time.perf_counter()
    trainer = trainer_of(config)
    config = _with_decoder(config, Path(run_dir))
    with StopRequest() as stop, ExitStack() as opened, listing_by(arrays_of_first_process):
        call = TrainCall(Path(run_dir), progress, profile, wandb, opened, started, stop)
        result: RunResult = trainer.train(config, call)
    return result


def _with_decoder(config: Any, run_dir: Path) -> Any:
    """Replace data.decoder="auto" by the decoder that the run began with, or in a new run by the one installed here.

    The stored config then names a decoder. So the run continues with the same pixels on a machine where "auto" would
    choose another decoder. Data of other tasks are always read by Pillow.
    """
    data = getattr(config, "data", None)
    if not isinstance(data, ClassificationData) or data.decoder != "auto":
        return config
    begun = (run_dir / CONFIG_FILE).is_file() and has_checkpoint(run_dir)
    found: Any = read_config(run_dir).data.decoder if begun else "auto"
    data = replace(data, decoder=found)
    return replace(config, data=replace(data, decoder=chosen_decoder(data)))


def open_run(
    call: TrainCall,
    config: RunConfig,
    class_names: Sequence[str] | None = None,
    class_ids: Sequence[int] | None = None,
) -> OpenRun:
    """Create the run folder, or check that an existing one holds the same run, and lock it until the call ends.

    Args:
        call: what `train` was called with.
        config: the run.
        class_names: names of the classes by number, where the task has classes.
        class_ids: ids of the classes in the data set, where it numbers them itself.

    Raises:
        UserError: see `run_folder.start_run`.
    """
    enter = call.opened.enter_context
    folder = enter(start_run(call.run_dir, config, class_names, class_ids))
    checkpoints = enter(
        Checkpoints(
            folder / CHECKPOINTS,
            keep=config.keep_checkpoints,
            keep_every=config.keep_every_steps,
            best=partial(best_step, folder, config) if config.keep_best else None,
        )
    )
    names = tuple(class_names or ())
    return OpenRun(call, config, names, folder, checkpoints, call.stop)

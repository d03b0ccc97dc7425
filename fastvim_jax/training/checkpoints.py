"""Write checkpoints in the background through Orbax, atomically, and check the files of a checkpoint before use.

A checkpoint holds the items `params`, `ema` and `model_state` (if the state has them), `optimizer` and `meta` (JSON:
step, position in the data, dtypes and shapes of the parameters, whatever the trainer adds). Arrays are stored flat
under the dotted names of the *stored* parameters. These names are the same for scanned and unrolled models, and reading
a checkpoint needs no class of this package. Beside the folder `checkpoints`, `checksums/<step>.json` lists size and
digest of every file.

A save copies the state to the host and returns. A thread then writes the copy to a temporary folder, writes the
checksums and, last, renames the folder to its step. So a folder whose name is a step is always a complete checkpoint,
however the process ends. To delete a checkpoint, its folder is first renamed into `checkpoints/deleted`, which is
emptied afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp  # type: ignore[import-untyped]

from fastvim_jax.distributed import arrays_of_first_process, is_first_process, on_first_process
from fastvim_jax.errors import UserError, counted
from fastvim_jax.training.checksums import find_damage, write_checksums
from fastvim_jax.training.disk import GO_ON, why_not_written
from fastvim_jax.training.flat_trees import abstract, flatten, signature, unflatten
from fastvim_jax.training.late_results import drop_late_results
from fastvim_jax.training.steps import TrainState

FORMAT = 1

_DELETED = "deleted"
_LAST_SAVE = 300.0
"""Seconds in which one of several processes that has failed may still save: gigabytes on a slow disk take minutes."""
# Orbax adds the time of the commit to this file last, after the checksums are written.
_CHANGES_LAST = frozenset({"_CHECKPOINT_METADATA"})
# Orbax finds its files with glob patterns that contain the whole path, so the path must hold no special character.
_GLOB = re.compile(r"[\[\]*?\\]")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Preservation(ocp.checkpoint_managers.PreservationPolicy):
    """Tell Orbax, after every save, which checkpoints to keep; see the arguments of `Checkpoints`."""

    keep: int
    every: int | None
    best: Callable[[Sequence[int]], int | None] | None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [each.step for each in checkpoints]
        best = self.best(steps) if self.best is not None else None
        return [
            step in steps[-self.keep :]
            or step == best
            or (self.every is not None and step % self.every == 0)
            for step in steps
        ]


def _wait_for_others(*, key: str, timeout_ms: int) -> None:
    """Wait for the threads of the other processes that write the same checkpoint. After an error, wait for nobody.

    Orbax tells all processes when a save has ended, even if it failed in one process alone. There the others do not
    come: they wait for that process's files. So it would wait 20 minutes before `check` could raise the error.
    """
    if sys.exception() is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def step_folders(directory: Path) -> list[str]:
    """List the names of the finished checkpoints' folders; [] without a directory. Other files may lie there."""
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return [
        name for name in names if name.isascii() and name.isdecimal() and str(int(name)) == name
    ]


def _is_meta(meta: Any) -> bool:
    """Tell whether the parts of a checkpoint's `meta` have their types; without checksums, a damaged one gets here."""
    if not isinstance(meta, dict) or not isinstance(meta.get("parameters"), dict):
        return False
    records = meta.get("window", [])
    return (
        isinstance(meta.get("data", {}), dict)
        and isinstance(records, list)
        and all(isinstance(record, dict) for record in records)
        and all(isinstance(value, int | float) for record in records for value in record.values())
    )


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, damaged, of another model, or cannot be written."""


class Checkpoints:
    """Save and restore the checkpoints of one run. As a context manager, wait for a save under way on exit.

    The first checkpoint that this object saves is read back at once. Otherwise a run whose checkpoints cannot be
    restored could go on for days.

    Args:
        directory: the folder that holds one folder per step. It is made if it is missing, unless `read_only`.
        keep: number of latest checkpoints to keep.
        keep_every: also keep the checkpoints whose step is a multiple of this.
        best: function that picks one of the given steps, or None; the checkpoint of this step is also kept.
        read_only: never write and never clean up, for evaluation.

    Raises:
        CheckpointError: `read_only` is set and the folder is missing; or the path holds a character that Orbax reads
            as part of a glob pattern.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        best: Callable[[Sequence[int]], int | None] | None = None,
        read_only: bool = False,
    ) -> None:
        self.directory = Path(directory).absolute()
        if found := _GLOB.search(str(self.directory)):
            raise CheckpointError(
                f"checkpoints cannot lie in {self.directory}: the checkpoint library takes {found[0]!r} in a path for "
                "a pattern and would not find its own files again. Choose a run folder whose whole path has none of "
                "[ ] * ? \\."
            )
        self._verified: set[tuple[int, str]] = set()
        self._read_back = False
        self._checksums = self.directory.parent / "checksums"
        self._saving: int | None = None
        if read_only and not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory} does not exist: this run has no checkpoint yet."
            )
        writing: dict[str, Any] = {
            "preservation_policy": _Preservation(keep, keep_every, best),
            "todelete_subdir": _DELETED,
            "async_options": ocp.options.AsyncOptions(
                post_finalization_callback=self._complete, barrier_sync_fn=_wait_for_others
            ),
            "cleanup_tmp_directories": True,
        }
        options = ocp.CheckpointManagerOptions(
            create=not read_only, **({} if read_only else writing)
        )
        if not read_only:
            drop_late_results()
        self._read_only = read_only
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._clean_up()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and jax.process_count() > 1 and not self._saved_soon():
            _log.error("the checkpoint of step %s is left unfinished", self._saving)
            return
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            _log.error("%s", failure)  # The error that came first is the one to raise.

    def _saved_soon(self) -> bool:
        """Wait `_LAST_SAVE` seconds at most for the save under way, and return whether it has ended.

        If another process failed, too, its part of the checkpoint never comes, and it may wait for the end of this one.
        """
        end = time.monotonic() + _LAST_SAVE
        while self._saving is not None and self._manager.is_saving_in_progress():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def steps(self) -> list[int]:
        """List the steps of the finished checkpoints, ascending."""
        return sorted(map(int, step_folders(self.directory)))

    def latest(self) -> int | None:
        """Return the last finished checkpoint's step, or None."""
        return max(self.steps(), default=None)

    def latest_for_all(self) -> int | None:
        """Return `latest` of the first process. All processes must call this.

        A shared file system may show a new checkpoint to another host later, which would begin at another step.
        """
        found = arrays_of_first_process(lambda: {"steps": np.asarray(self.steps()[-1:], np.int64)})
        return max(found["steps"].tolist(), default=None)

    def describe_latest(self) -> str:
        """Wait for a save under way, and describe the last finished checkpoint for a message."""
        with contextlib.suppress(CheckpointError):  # The caller is reporting another error.
            self.wait()
        step = self.latest()
        return "none yet" if step is None else f"step {step} in {self.directory / str(step)}"

    def save(self, state: TrainState, meta: Mapping[str, Any]) -> int:
        """Start to save `state` and the JSON-able `meta` as the checkpoint of step `state.step`, and return this step.

        The state is copied before this method returns, so its buffers may be donated. One save is under way at a time:
        the next save waits for it. Saving the same step again does nothing.

        Raises:
            CheckpointError: this save or the previous one failed.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps():
            return step
        meta = {"format": FORMAT, "step": step, "parameters": signature(state.params), **meta}
        params = flatten(state.params)
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(params),
            "optimizer": ocp.args.StandardSave(flatten(state.optimizer)),
            "meta": ocp.args.JsonSave(meta),
        }
        for name in ("ema", "model_state"):
            if (tree := getattr(state, name)) is not None:
                items[name] = ocp.args.StandardSave(flatten(tree))
        self._saving = step
        self._shapes = abstract(params)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._failed(error) from error
        return step

    def check(self) -> None:
        """Raise if a save in the background has failed. Do not wait for a save that is still under way.

        Raises:
            CheckpointError: the save failed. The message names the cause and the last good checkpoint.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way has finished.

        Raises:
            CheckpointError: see `check`.
        """
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore raise many kinds.
            raise self._failed(error) from error
        step, self._saving = self._saving, None
        if not self._read_back:
            self._read_params(step)
            self._read_back = True

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """Check the file of a checkpoint's `meta` and read it; by default that of the latest checkpoint.

        Raises:
            CheckpointError: the checkpoint does not exist, or is incomplete or damaged.
        """
        step = self._existing(step)
        self._verify(step, "meta")
        meta = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        if not _is_meta(meta):
            raise self.damaged(step, "its file meta/metadata is not what training writes")
        if meta.get("format") != FORMAT:
            raise CheckpointError(
                f"{self._name(step)} has format {meta.get('format')!r}; this version reads {FORMAT}: "
                "use the version of fastvim-jax that environment.json names."
            )
        if meta.get("step") != step:
            raise self.damaged(
                step, f"it is the checkpoint of step {meta.get('step')}, moved or copied"
            )
        return meta

    def restore_state(self, template: TrainState, step: int | None = None) -> TrainState:
        """Restore the whole train state with the shapes and shardings of `template`, whose values are not read.

        Raises:
            CheckpointError: see `read_meta`; or the checkpoint is of another model or optimizer.
        """
        step = self._existing(step)
        meta = self.read_meta(step)
        self._refuse_other_model(step, meta, template.params)
        names = ("params", "optimizer", "ema", "model_state")
        trees = {name: getattr(template, name) for name in names}
        trees = {name: tree for name, tree in trees.items() if tree is not None}
        restored = self._restore(step, trees)
        made = np.asarray(meta["step"], np.int32)
        count = jax.make_array_from_callback((), template.step.sharding, lambda index: made)
        return TrainState(
            step=count,
            params=restored["params"],
            optimizer=restored["optimizer"],
            ema=restored.get("ema"),
            model_state=restored.get("model_state"),
        )

    def restore_weights(self, params: Any, *, weights: str, step: int | None = None) -> Any:
        """Restore only the weights, `raw` or averaged (`ema`), with the shardings of `params`.

        Raises:
            CheckpointError: see `restore_state`.
        """
        step = self._existing(step)
        self._refuse_other_model(step, self.read_meta(step), params)
        item = "params" if weights == "raw" else "ema"
        if not (self.directory / str(step) / item).is_dir():
            raise CheckpointError(
                f"{self._name(step)} holds no average of the weights: ask for weights='raw'."
            )
        return self._restore(step, {item: params})[item]

    def restore_model_state(self, model_state: Any, *, step: int | None = None) -> Any:
        """Restore the model's other state, such as running statistics, with the shardings of `model_state`.

        Raises:
            CheckpointError: see `restore_state`.
        """
        if not flatten(model_state):
            return model_state
        return self._restore(self._existing(step), {"model_state": model_state})["model_state"]

    def close(self) -> None:
        """Wait until the save under way has finished, and close Orbax's manager.

        Raises:
            CheckpointError: see `check`.
        """
        try:
            self.wait()
        finally:
            self._manager.close()
        self._clean_up()

    def _existing(self, step: int | None) -> int:
        """Return the number of a finished checkpoint, by default of the latest one, as the first process finds it."""
        self.wait()
        found = arrays_of_first_process(lambda: {"step": np.asarray(self._find(step), np.int64)})
        return int(found["step"])

    def _find(self, step: int | None) -> int:
        steps = self.steps()
        if step is None:
            if not steps:
                raise CheckpointError(f"{self.directory} holds no finished checkpoint.")
            return steps[-1]
        if step not in steps:
            known = f"finished are {', '.join(map(str, steps))}" if steps else "none is finished"
            unfinished = any(self.directory.glob(f"{step}.*tmp*"))
            what = "was never finished" if unfinished else "does not exist"
            raise CheckpointError(f"{self._name(step)} {what}; {known}.")
        return step

    def _restore(self, step: int, trees: Mapping[str, Any]) -> dict[str, Any]:
        self._verify(step, *trees)
        shapes = {item: abstract(flatten(tree)) for item, tree in trees.items()}
        flat = self._read(
            step, **{item: ocp.args.StandardRestore(tree) for item, tree in shapes.items()}
        )
        return {item: unflatten(tree, flat[item]) for item, tree in trees.items()}

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many kinds of errors for damage.
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        first = str(error).strip().splitlines()[:1]
        return self.damaged(step, f"{type(error).__name__}: {''.join(first)}")

    def _read_params(self, step: int) -> None:
        """Read the parameters back as they lie on this process's devices, without a word to the other processes.

        The manager's own `restore` makes all devices wait for each other. Processes end a save in the background at
        different steps, so the one that came first would wait for a device that waits for its next step: both forever.
        """
        item = self.directory / str(step) / "params"
        try:
            ocp.StandardCheckpointHandler().restore(
                item, args=ocp.args.StandardRestore(self._shapes)
            )
        except Exception as error:  # as in `_read`
            raise self._unreadable(step, error) from error

    def _refuse_other_model(self, step: int, meta: Mapping[str, Any], params: Any) -> None:
        saved, ours = meta["parameters"], signature(params)
        if saved == ours:
            return
        lines = [f"{name}: this model has none" for name in saved if name not in ours]
        lines += [f"{name}: not in the checkpoint" for name in ours if name not in saved]
        lines += [
            f"{name}: checkpoint {saved[name]}, this model {ours[name]}"
            for name in ours
            if name in saved and saved[name] != ours[name]
        ]
        shown = "\n  ".join(lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else []))
        raise CheckpointError(
            f"{self._name(step)} is of another model; "
            f"{counted(len(lines), 'parameter differs', 'parameters differ')}:\n  {shown}\n"
            "Use the model that the run folder's config.json describes, or another run folder."
        )

    def damaged(self, step: int, reason: str) -> CheckpointError:
        """Return the error to raise for a damaged checkpoint. It offers the previous one."""
        earlier = [s for s in self.steps() if s < step]
        offer = (
            f"The previous one is step {earlier[-1]}: evaluate it with step={earlier[-1]}, or delete "
            f"{self.directory / str(step)} to resume the run from it."
            if earlier
            else "There is no earlier one."
        )
        return CheckpointError(f"{self._name(step)} is damaged: {reason}. {offer}")

    def _name(self, step: int) -> str:
        return f"The checkpoint {self.directory / str(step)}"

    def _complete(self) -> None:
        """Write the checksums of the checkpoint that is being saved.

        Orbax's thread calls this when all files are written, just before it renames the folder to the step. So every
        checkpoint has its file of checksums. A file of checksums may have no checkpoint until the next save removes it.
        """
        (folder,) = self.directory.glob(f"{self._saving}.*tmp*")
        record = self._checksums / f"{self._saving}.json"
        write_checksums(folder, record, leave_out=_CHANGES_LAST)
        self._clean_up()

    def _clean_up(self) -> None:
        """Remove deleted checkpoints, and the checksums of checkpoints that no longer exist."""
        if self._read_only or not is_first_process():
            return
        shutil.rmtree(self.directory / _DELETED, ignore_errors=True)
        known = {str(step) for step in (*self.steps(), self._saving)}
        for record in self._checksums.glob("*.json"):
            if record.stem not in known:
                record.unlink(missing_ok=True)

    def _failed(self, error: BaseException) -> CheckpointError:
        """Delete the partial files of a failed save, to free disk space, and return the error to raise.

        With several processes, only the first one deletes them. A save that failed in another one is still under way in
        the first, which would report that its files have gone; the next start deletes them.
        """
        step, self._saving = self._saving, None
        for folder in self.directory.glob(f"{step}.*tmp*"):
            if is_first_process():
                shutil.rmtree(folder, ignore_errors=True)
        self._manager.reload()  # Orbax counts the save as done and the oldest checkpoint as deleted.
        return CheckpointError(
            f"The checkpoint of step {step} could not be written: {why_not_written(error, self.directory)}. "
            f"Last good checkpoint: {self.describe_latest()}. {GO_ON}"
        )

    def _verify(self, step: int, *items: str) -> None:
        """Compare the files of `items` with their checksums: once per item, and on the first process only."""
        new = {item for item in items if (step, item) not in self._verified}
        if not new:
            return
        folder, record = self.directory / str(step), self._checksums / f"{step}.json"

        def compare() -> None:
            try:
                reason = find_damage(folder, record, new)
            except FileNotFoundError:
                _log.warning(
                    "%s is used unchecked: its record of checksums, %s, is missing.",
                    self._name(step), record,
                )  # fmt: skip
                return
            if reason is not None:
                raise self.damaged(step, reason)

        on_first_process(compare)
        self._verified |= {(step, item) for item in new}

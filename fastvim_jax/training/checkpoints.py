"""Checkpoints: written atomically by Orbax, checked file by file before they are trusted.

A checkpoint holds the items `params`, `ema` (if kept), `optimizer` and `meta` (JSON: step, seeds, position in
the data, shapes, whatever the trainer adds). Arrays are stored flat under the dotted names of the *stored*
parameters, which are the same for scanned and unrolled models, so no class of this package is needed to read
one. Beside the folder, `checksums/<step>.json` lists size and digest of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp  # type: ignore[import-untyped]
from jax.tree_util import DictKey, KeyPath

from fastvim_jax.errors import UserError
from fastvim_jax.training.steps import TrainState

FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, damaged or of another model; the message offers another one."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: the folder that holds a folder per step; made when it is missing, unless read only.
        keep: how many of the latest are kept.
        read_only: never write or clean up, as evaluation should not.
    """

    def __init__(self, directory: Path, *, keep: int = 3, read_only: bool = False) -> None:
        self.directory = Path(directory).absolute()
        self._checksums = self.directory.parent / "checksums"
        if read_only and not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory} does not exist: this run has no checkpoint yet."
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The last finished checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: Mapping[str, Any]) -> int:
        """Write `state`, and the JSON-able `meta`, under the number of updates made so far; returns it."""
        step = int(state.step)
        meta = {"format": FORMAT, "step": step, "parameters": _signature(state.params), **meta}
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(flatten(state.params)),
            "optimizer": ocp.args.StandardSave(flatten(state.optimizer)),
            "meta": ocp.args.JsonSave(meta),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(flatten(state.ema))
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._manager.wait_until_finished()
        self._write_checksums(step)
        return step

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """The `meta` of a checkpoint, the latest by default, after its files were checked.

        Raises:
            CheckpointError: when there is none, or it is incomplete or damaged.
        """
        step = self._existing(step)
        self._verify(step)
        meta = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        if meta.get("format") != FORMAT:
            raise CheckpointError(
                f"{self._name(step)} has format {meta.get('format')!r}; this version reads {FORMAT}: "
                "use the version of fastvim-jax that environment.json names."
            )
        return meta

    def restore_state(self, template: TrainState, step: int | None = None) -> TrainState:
        """The whole train state, placed like `template`, whose own values do not matter.

        Raises:
            CheckpointError: see `read_meta`; or the checkpoint is of another model or optimizer.
        """
        step = self._existing(step)
        meta = self.read_meta(step)
        self._refuse_other_model(step, meta, template.params)
        trees = {"params": template.params, "optimizer": template.optimizer}
        if template.ema is not None:
            trees["ema"] = template.ema
        restored = self._restore(step, trees)
        count = jax.device_put(np.int32(meta["step"]), template.step.sharding)
        return TrainState(
            step=count,
            params=restored["params"],
            optimizer=restored["optimizer"],
            ema=restored.get("ema"),
        )

    def restore_weights(self, params: Any, *, weights: str, step: int | None = None) -> Any:
        """Only the `raw` or the `ema` weights, placed like `params`.

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

    def close(self) -> None:
        """Finish what is being written."""
        self._manager.close()

    def _existing(self, step: int | None) -> int:
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
        abstract = {item: _abstract(flatten(tree)) for item, tree in trees.items()}
        flat = self._read(
            step, **{item: ocp.args.StandardRestore(tree) for item, tree in abstract.items()}
        )
        return {item: unflatten(tree, flat[item]) for item, tree in trees.items()}

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many kinds for what is damaged.
            first = str(error).strip().splitlines()[:1]
            raise self._damaged(step, f"{type(error).__name__}: {''.join(first)}") from error

    def _refuse_other_model(self, step: int, meta: Mapping[str, Any], params: Any) -> None:
        saved, ours = meta["parameters"], _signature(params)
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
            f"{self._name(step)} is of another model; {len(lines)} parameters differ:\n  {shown}\n"
            "Use the model that the run folder's config.json describes, or another run folder."
        )

    def _damaged(self, step: int, reason: str) -> CheckpointError:
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

    def _write_checksums(self, step: int) -> None:
        """Record every file of a finished checkpoint, and forget those of deleted ones."""
        self._checksums.mkdir(exist_ok=True)
        root = self.directory / str(step)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        listing = {path.relative_to(root).as_posix(): _fingerprint(path) for path in files}
        temporary = self._checksums / f"{step}.json.tmp"
        temporary.write_text(json.dumps(listing, indent=1))
        os.replace(temporary, self._checksums / f"{step}.json")
        kept = {str(s) for s in self.steps()}
        for old in self._checksums.glob("*.json"):
            if old.stem not in kept:
                old.unlink()

    def _verify(self, step: int) -> None:
        """Compare every file with the record made after it was written.

        A run killed between the two has a finished checkpoint without a record; Orbax's own checks remain.
        """
        record = self._checksums / f"{step}.json"
        if not record.is_file():
            return
        for name, (size, digest) in json.loads(record.read_text()).items():
            path = self.directory / str(step) / name
            if not path.is_file():
                raise self._damaged(step, f"the file {name} is missing")
            found_size, found_digest = _fingerprint(path)
            if found_size != size:
                raise self._damaged(step, f"the file {name} has {found_size} of {size} bytes")
            if found_digest != digest:
                raise self._damaged(step, f"the file {name} has changed since it was written")


def flatten(tree: Any) -> dict[str, Any]:
    """The arrays of a pytree under dotted names, e.g. `blocks.mixer.in_proj.kernel`."""
    return {_dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(template: Any, flat: Mapping[str, Any]) -> Any:
    """The inverse of `flatten`, in the structure of `template`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    return jax.tree_util.tree_unflatten(structure, [flat[_dotted(path)] for path, _ in paths])


def _dotted(path: KeyPath) -> str:
    # A variable of NNX adds a key of its own below its dictionary, whose name is Flax's affair.
    if len(path) > 1 and isinstance(path[-2], DictKey) and not isinstance(path[-1], DictKey):
        path = path[:-1]
    parts = (getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path)
    return ".".join(map(str, parts))


def _abstract(flat: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in flat.items()
    }


def _signature(params: Any) -> dict[str, str]:
    return {
        name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for name, leaf in flatten(params).items()
    }


def _fingerprint(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "blake2b").hexdigest()]

"""Write and read run folders, which hold all that evaluation, prediction and a resumed run need.

config.json        the run's config, model included       classes.json      class names, in order (none: [])
class_ids.json     ids of the classes in the data set, in order; only if it numbers them itself, as COCO does
environment.json   versions, devices, git commit of each start
init.json          which parameters were loaded from `config.init`; only if the run started from other weights
checkpoints/ checksums/                                    metrics.jsonl tensorboard/
lock               locked by the process that trains in this folder
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.data.labelled import load_image, make_preprocess
from fastvim_jax.data.sources.channel_files import split_pattern
from fastvim_jax.distributed import on_first_process, share_folder
from fastvim_jax.errors import UserError
from fastvim_jax.json_text import parse_json
from fastvim_jax.lock import LOCK_FILE, locked
from fastvim_jax.models import build_model
from fastvim_jax.models.pretrained import HUB, is_pretrained
from fastvim_jax.models.saving import check_class_names
from fastvim_jax.regular_file import read_regular_file
from fastvim_jax.serialise import to_dict
from fastvim_jax.training.checkpoints import Checkpoints, step_folders
from fastvim_jax.training.choice import best_step, better_weights
from fastvim_jax.training.config import RunConfig
from fastvim_jax.training.disk import explain_write_errors, keep_damaged, replace_file
from fastvim_jax.training.tasks import config_from_json

_LATEST_LOOK = 20.0  # seconds: a network file system may show a new file late
_log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
CLASSES_FILE = "classes.json"
CLASS_IDS_FILE = "class_ids.json"
ENVIRONMENT_FILE = "environment.json"
INIT_FILE = "init.json"
CHECKPOINTS = "checkpoints"

# Settings that may change when a run is resumed, because they do not affect the weights, except by rounding.
_FREE = frozenset(
    {
        "data.workers",
        "data.path",
        "data.decoder",
        "data.max_corrupt",
        "data.eval_batch_size",
        "data.eval_sizes",
        "keep_best",
        "keep_checkpoints",
        "keep_every_steps",
        "checkpoint_every_steps",
        "evaluate_every_epochs",
        "log_every_steps",
        "model.blocks",
        "model.remat",
        "model.backbone.blocks",
        "model.backbone.remat",
        "eval_windows",
        "pictures",
        "mesh.data",
        "mesh.fsdp",
        "accumulate",
    }
)
_PACKAGES = (
    "fastvim-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
    "pillow", "simplejpeg", "cykooz-resizer",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A trained model, loaded from its run folder.

    Attributes:
        model: the NNX model, holding the chosen weights.
        config: the run's configuration.
        class_names: names of the classes, in order of their numbers; empty if the task has no classes.
        step: the checkpoint's step.
        weights: `raw` or `ema`.
        class_ids: ids of the classes in the data set that the run was trained on; None if it does not number them.
    """

    model: nnx.Module
    config: RunConfig
    class_names: tuple[str, ...]
    step: int
    weights: str
    class_ids: tuple[int, ...] | None = None

    def preprocess(self, images: Any) -> jax.Array:
        """Turn image files or pixels into the model's input, exactly as the run's evaluation does.

        Args:
            images: one or several image files, which are decoded, resized and cropped; or uint8 pixels, `b h w c` or
                `h w c`, of the run's image size.

        Returns:
            Normalised images `b h w c`, float32.

        Raises:
            UserError: a file cannot be read, or pixels have another dtype or size.
        """
        data = self.config.data
        if isinstance(images, str | os.PathLike):
            images = [images]
        if not hasattr(images, "dtype"):
            pixels = np.stack([load_image(Path(file), data) for file in images])
        else:
            pixels = np.asarray(images)
            pixels = pixels[None] if pixels.ndim == 3 else pixels
            expected = (*data.height_width, data.channels)
            if pixels.dtype != np.uint8 or pixels.shape[1:] != expected:
                raise UserError(
                    f"the pixels have shape {pixels.shape} and dtype {pixels.dtype}: give uint8 of "
                    f"{' x '.join(map(str, expected))} each, or name files, which are resized and cropped."
                )
        return make_preprocess(data)(jnp.asarray(pixels))


def load_run(
    run_dir: Path | str,
    *,
    weights: str | None = None,
    step: int | Literal["best"] | None = None,
    place: jax.sharding.Sharding | None = None,
    class_names: Sequence[str] | None = None,
) -> Run:
    """Load a trained model. Nothing but its run folder is needed.

    Args:
        run_dir: the run folder.
        weights: `raw` or `ema` (averaged). By default the averaged weights, if the run kept them. If the log says that
            the raw weights score better at this step, as they do early in a run, the default is `raw`, and a line says
            so.
        step: number of a checkpoint, or `best` for the one with the best score in the log; by default the latest.
        place: sharding of the weights, by default this process's first device. It need not match the mesh of the
            training.
        class_names: those of the data. They take the place of class names that cannot be read in the run folder, as
            they do when the run is resumed; by default such a folder is refused.

    Raises:
        UserError: the folder is no run folder, or that of a linear probe, or the checkpoint is missing, damaged or of
            another model.
    """
    config = read_config(run_dir)
    if not config.saves_model:
        raise UserError(
            f"{run_dir} is a linear probe, whose checkpoints hold the head and not the backbone ({config.init}): its "
            "scores are in metrics.jsonl; fine-tune with --init for a classifier."
        )
    class_names = _names_of_run(run_dir, class_names)
    check_class_names(class_names, config.model, f" by {Path(run_dir) / CLASSES_FILE}")
    if weights not in ("raw", "ema", None):
        raise UserError(f"weights={weights!r}: use 'raw' or 'ema'.")
    checkpoints = Checkpoints(Path(run_dir) / CHECKPOINTS, read_only=True)
    try:
        # Build shapes only: the weights come from the checkpoint, so drawing initial ones would be waste.
        shapes = nnx.eval_shape(lambda: build_model(config.model, rngs=nnx.Rngs(0)))
        graphdef, *states = nnx.split(shapes, nnx.Param, ...)
        place = place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        params, model_state = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place), states
        )
        if step == "best":
            step = best_step(run_dir, config, checkpoints.steps())
            if step is None:
                raise UserError(f"no checkpoint in {run_dir} was evaluated: name a step.")
        meta = checkpoints.read_meta(step)
        if weights is None:
            weights = better_weights(run_dir, config, meta["step"])
            if weights == "raw" and config.ema_decay is not None:
                _log.warning(
                    "%s: the trained weights of step %d are taken, because they score better than their average does "
                    "yet. Choose the weights ema to take the average.", run_dir, meta["step"],
                )  # fmt: skip
        params = checkpoints.restore_weights(params, weights=weights, step=meta["step"])
        model_state = checkpoints.restore_model_state(model_state, step=meta["step"])
    finally:
        checkpoints.close()
    model = nnx.merge(graphdef, params, model_state)
    ids = _read_class_ids(run_dir, len(class_names))
    return Run(model, config, class_names, meta["step"], weights, ids)


@contextlib.contextmanager
def start_run(
    run_dir: Path | str,
    config: RunConfig,
    class_names: Sequence[str] | None,
    class_ids: Sequence[int] | None = None,
) -> Iterator[Path]:
    """Make the run folder, or check that an existing one is of the same run. Lock the folder and record this start.

    With several processes, the first does all this and the others wait for it.

    Raises:
        UserError: the folder holds a run with another config or other classes, another process trains in the folder,
            the folder cannot be written, or the processes do not share it.
    """
    folder = Path(run_dir)
    config = _with_absolute_paths(config)
    with contextlib.ExitStack() as held:

        def begin() -> None:
            with explain_write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                _refuse_other_files(folder)
                held.enter_context(locked(folder))
                _record_start(folder, config, class_names, class_ids)

        on_first_process(begin)
        if not share_folder(folder, patience=_LATEST_LOOK):
            raise UserError(
                f"{folder} is not the same folder for all processes: give --run-dir, in full, a folder on a disk that "
                "all hosts share."
            )
        yield folder


def _refuse_other_files(folder: Path) -> None:
    """Raise if the folder holds anything but a run.

    The folder of a run that was killed before it wrote config.json is accepted.
    """
    if (folder / CONFIG_FILE).is_file():
        return
    ours = {
        LOCK_FILE,
        *(
            name + end
            for name in (CONFIG_FILE, CLASSES_FILE, CLASS_IDS_FILE)
            for end in ("", ".tmp")
        ),
    }
    if any(path.name not in ours for path in folder.iterdir()):
        raise UserError(
            f"{folder} is not empty and holds no {CONFIG_FILE}: choose another run folder."
        )


def _record_start(
    folder: Path,
    config: RunConfig,
    class_names: Sequence[str] | None,
    class_ids: Sequence[int] | None,
) -> None:
    # A run without a checkpoint may start again with another config, because it has nothing to resume.
    if (folder / CONFIG_FILE).is_file() and has_checkpoint(folder):
        _refuse_other_run(folder, config)
        if tuple(class_names or ()) != _classes_or_damaged(folder, class_names):
            raise UserError(
                f"{folder} was trained on other classes than data.source={config.data.source!r} has now: "
                "use its data, or another run folder."
            )
    names = json.dumps(list(class_names or ()), indent=1, ensure_ascii=False)
    replace_file(folder / CLASSES_FILE, names)
    if class_ids is not None:
        replace_file(folder / CLASS_IDS_FILE, json.dumps(list(class_ids)))
    replace_file(folder / CONFIG_FILE, config.to_json())
    starts = [*_earlier_starts(folder / ENVIRONMENT_FILE), environment()]
    replace_file(folder / ENVIRONMENT_FILE, json.dumps({"starts": starts}, indent=1))


def _earlier_starts(path: Path) -> list[Any]:
    """Read the earlier starts of the run.

    A damaged file is renamed and a new list begun, because training does not depend on this list.
    """
    if not path.is_file():
        return []
    try:
        return list(parse_json(path.read_bytes())["starts"])
    except (ValueError, KeyError, TypeError):
        kept = keep_damaged(path)
        _log.warning("%s cannot be read: it is now %s, and a new one is begun.", path, kept)
        return []


def _classes_or_damaged(folder: Path, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Read the class names. If the file is damaged, rename it and return `class_names`, those of the data."""
    try:
        return read_class_names(folder)
    except UserError as error:
        path = folder / CLASSES_FILE
        kept = keep_damaged(path) if path.is_file() else None
        _log.warning("%s. It is written anew%s.", error, f"; the old one is {kept}" if kept else "")
        return tuple(class_names or ())


def read_config(run_dir: Path | str) -> RunConfig:
    """Read the config saved in a run folder.

    Raises:
        UserError: the folder is no run folder, or its config is damaged.
    """
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        hub = f", or {HUB}{run_dir} for a model of the hub" if not Path(run_dir).exists() else ""
        raise UserError(
            f"{run_dir} is no run folder: it has no {CONFIG_FILE}. Name the folder that training wrote{hub}."
        )
    if is_pretrained(run_dir):
        raise UserError(
            f"{run_dir} holds a saved model and is no run folder. Name the folder that training wrote."
        )
    try:
        return config_from_json(read_regular_file(path).decode())
    except (UserError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def read_class_names(run_dir: Path | str) -> tuple[str, ...]:
    """Read the class names saved in a run folder; empty if the task has no classes.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = Path(run_dir) / CLASSES_FILE
    try:
        names = parse_json(read_regular_file(path))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("it is no list of names")
        return tuple(names)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the class names in {path}: {error}") from error


def _names_of_run(run_dir: Path | str, of_data: Sequence[str] | None) -> tuple[str, ...]:
    """Read the class names; if they cannot be read, return those of the data, if there are any, and warn."""
    try:
        return read_class_names(run_dir)
    except UserError as error:
        if of_data is None:
            raise
        _log.warning("%s. The names of the data are taken instead.", error)
        return tuple(of_data)


def _read_class_ids(run_dir: Path | str, classes: int) -> tuple[int, ...] | None:
    """Read the ids of the classes; None, with a warning if there is a file, where they cannot be read."""
    path = Path(run_dir) / CLASS_IDS_FILE
    if not path.is_file():
        return None
    try:
        ids = parse_json(path.read_text())
        if not isinstance(ids, list) or [type(i) for i in ids] != [int] * classes:
            raise ValueError(f"it is no list of {classes} whole numbers")
        return tuple(ids)
    except (OSError, ValueError) as error:
        _log.warning("cannot read the ids of the classes in %s: %s", path, error)
        return None


def environment() -> dict[str, Any]:
    """Return what the results of this run depend on besides its config: versions, devices and git commit."""
    devices = jax.devices()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "device": {"kind": devices[0].device_kind, "count": len(devices)},
        "cpu_count": os.cpu_count(),
        "git": git_commit(Path(__file__).parents[1]),
    }


def git_commit(folder: Path) -> dict[str, Any] | None:
    """Return the git commit of `folder` and whether tracked files were edited since; None outside a checkout."""
    try:
        top = _git(folder, "rev-parse", "--show-toplevel")
        # A virtual environment inside somebody's repository is not a checkout of this package.
        if Path(top).resolve() != folder.resolve().parent:
            return None
        commit = _git(folder, "rev-parse", "HEAD")
        edited = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "edited": edited}


def _git(folder: Path, *arguments: str) -> str:
    run = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    return run.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Resolve the data's paths, so that the run can be evaluated from any folder.

    A path with an environment variable stays, and so does what is no folder or file, such as a URL.
    """
    found = {}
    for name in ("path", "class_list"):
        value = getattr(config.data, name, None)
        if isinstance(value, str) and value:
            folder, pattern = split_pattern(value) if name == "path" else (value, "")
            whole = Path(folder).expanduser()
            if whole.exists():
                found[name] = str(whole.absolute() / pattern)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **found))


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run folder holds a finished checkpoint, so that a run resumes there."""
    return bool(step_folders(folder / CHECKPOINTS))


def _refuse_other_run(folder: Path, config: RunConfig) -> None:
    saved, given = config_leaves(to_dict(read_config(folder))), config_leaves(to_dict(config))
    # Other losses are divided by counts of each part, and batch norms use its statistics.
    free = _FREE if config.averages_images else _FREE - {"accumulate"}
    changed = [
        f"{name}: {saved.get(name)!r} there, {given.get(name)!r} now"
        for name in sorted(saved.keys() | given.keys())
        if name not in free and saved.get(name) != given.get(name)
    ]
    if changed:
        raise UserError(
            f"{folder} holds a run with another config:\n  "
            + "\n  ".join(changed)
            + "\nResume it with its own config, or begin a new run from its weights, in another folder: "
            f"--init {folder} --run-dir NEW."
        )


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file into a run folder, on the first process.

    Raises:
        UserError: the file cannot be written.
    """

    def write() -> None:
        with explain_write_errors(path):
            replace_file(path, json.dumps(record, indent=1, ensure_ascii=False))

    on_first_process(write)


def config_leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields of a config's dictionary by their dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            leaves |= config_leaves(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves

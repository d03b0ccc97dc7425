"""Start from the weights of another run or of a file, and report what became of every parameter.

Parameters of the same name and shape are loaded. Position embeddings are resampled to the model's grid. A head for
other classes is drawn anew. The source or the model may be a backbone alone, or a larger model that contains it. Every
other misfit is an error, unless it is allowed by name, because a run that silently starts without some weights wastes
days.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.errors import UserError, counted, require_texts
from fastvim_jax.layers.pos_embed import resize_pos_embed
from fastvim_jax.models.config import BackboneConfig
from fastvim_jax.models.parameters import (
    ParameterInfo,
    check_numbers,
    map_parameters,
    parameter_infos,
)
from fastvim_jax.training.channel_weights import common_places, match_channels
from fastvim_jax.training.course import require_same_weights
from fastvim_jax.training.steps import TrainState
from fastvim_jax.training.weights_source import Source, read_source

Fate = Literal["taken", "resized", "drawn", "left"]

# Prefixes of the backbone's parameters: the model is the backbone, or holds it under one of these names.
_BACKBONES = ("", "backbone.", "encoder.")
# Parameters of a backbone that belong to its task: a misfit there is expected.
_TASK_PARTS = ("head.", "out_norms.", "fc_norm.")
# Layers outside a backbone that have outputs for each class: a segmenter's, and three of a detector's.
_CLASS_LAYERS = ("classifier", "box_head.cls", "box_head.reg", "mask_head.logits")
# Fields of a backbone's config that change neither the shapes of its parameters nor what they mean.
_MAY_DIFFER = frozenset(
    {
        "image_size", "num_classes", "drop_path", "out_indices", "dtype", "param_dtype", "matmul_precision", "blocks",
        "remat", "activations", "residual_in_fp32", "scan_implementation",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Record what became of one parameter.

    Attributes:
        name: its name in the model; for "left", its name in the source.
        fate: "taken" from the source; "resized" from the source; "drawn" anew (`load_weights` keeps the model's values
            instead); or "left" in the source, unused.
        reason: the reason, unless it was taken.
    """

    name: str
    fate: Fate
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """Record what became of all parameters of the model and of the source.

    Attributes:
        source: description of the source, for messages.
        lines: one per parameter; a stacked parameter has one per block.
        notes: differences between the models, or their data, that change the meaning of weights although they fit.
    """

    source: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    def names(self, fate: Fate) -> list[str]:
        """Return the names of the parameters with this fate."""
        return [line.name for line in self.lines if line.fate == fate]

    def in_words(self) -> str:
        """Write the report as a short table, one line for all parameters of one module, fate and reason."""
        groups: dict[tuple[Fate, str], list[str]] = {}
        for line in self.lines:
            groups.setdefault((line.fate, line.reason), []).append(line.name)
        rows = [f"Starting from {self.source}:"]
        for (fate, reason), names in sorted(groups.items()):
            shown = ", ".join(_families(names))
            rows.append(f"  {fate:<8} {len(names):>4}  {shown}{f' ({reason})' if reason else ''}")
        return "\n".join([*rows, *(f"  note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values: `source`, `notes` and the `parameters` with fate and reason."""
        lines = {line.name: f"{line.fate} {line.reason}".rstrip() for line in self.lines}
        return {"source": self.source, "notes": list(self.notes), "parameters": lines}


def load_weights(
    model: nnx.Module,
    source: Path | str,
    *,
    weights: Literal["raw", "ema"] | None = None,
    step: int | None = None,
    class_names: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> Report:
    """Load weights into a model in place, and report what became of every parameter.

    The model keeps its own head if the source's head has another number of classes, or if both name their classes and
    the names differ. Position embeddings are resampled to the model's grid. Weights of channels are taken by place, not
    by name, because a model does not know its channels' names. Only `init` of a run matches them with the data's.

    Args:
        model: any model of this library.
        source: a run folder; a folder of `save_pretrained`, or `hf://owner/name`; a `.safetensors` or PyTorch file.
        weights: for a run folder, `raw` or `ema`. By default what `load_run` takes.
        step: for a run folder, the checkpoint's step. By default the latest.
        class_names: the names of the model's classes, to compare with those of the source.
        allow: names of parameters that need not fit, with wildcards, e.g. `patch_embed.*`.

    Raises:
        UserError: no such source; numbers that are complex or not finite; a misfit that is not allowed, with all
            names in one message.
    """
    class_names, allow = require_texts(class_names, "class_names"), require_texts(allow, "allow")
    found = read_source(source, weights=weights, step=step)
    return load_source(model, found, class_names=class_names, allow=allow)


def load_source(
    model: nnx.Module,
    source: Source,
    *,
    class_names: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> Report:
    """Load the weights of a source that was read already. See `load_weights`."""
    class_names, allow = require_texts(class_names, "class_names"), require_texts(allow, "allow")
    state = nnx.state(model)
    arrays, report = fit(
        source,
        _shapes(state),
        config=getattr(model, "config", None),
        class_names=class_names,
        allow=allow,
    )
    nnx.update(model, _replace(state, arrays))
    return report


def start_state(
    state: TrainState, config: Any, class_names: Sequence[str] = ()
) -> tuple[TrainState, Report]:
    """Put the weights that `config.init` names into a new train state: parameters, average and running statistics.

    Args:
        state: the state before the first step. It keeps its values for parameters that the source lacks.
        config: the run's config.
        class_names: names of the run's classes.

    Raises:
        UserError: see `load_weights`.
    """
    source = read_source(config.init, weights=config.init_weights)
    source, of_channels = match_channels(source, config.data)
    model_state = {} if state.model_state is None else state.model_state
    arrays, report = fit(
        source,
        _shapes(state.params) | _shapes(model_state),
        config=config.model,
        class_names=class_names,
        allow=config.init_allow,
    )
    require_same_weights(arrays)
    notes = [*report.notes, *of_channels, *_other_normalisation(source.data, config.data)]
    params = _replace(state.params, arrays)
    changed = dataclasses.replace(
        state,
        params=params,
        ema=None if state.ema is None else jax.tree.map(jnp.copy, params),
        model_state=None if state.model_state is None else _replace(state.model_state, arrays),
    )
    return changed, dataclasses.replace(report, notes=tuple(notes))


def fit(
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    config: Any = None,
    class_names: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> tuple[dict[str, np.ndarray], Report]:
    """Find the array in the source for every parameter of a model.

    Args:
        source: the weights.
        shapes: shapes of the model's parameters by name; a stacked parameter has one name per block.
        config: the model's config, for its grid and to explain misfits.
        class_names: see `load_weights`.
        allow: see `load_weights`.

    Returns:
        The arrays by the names of the model, and the report.

    Raises:
        UserError: a parameter does not fit; the message lists all that do not.
    """
    check_numbers(source.arrays, source.name)
    here, there = backbone_of(config), backbone_of(source.config)
    prefix_here, prefix_there = _prefix(shapes), _prefix(source.arrays)
    renamed = {
        prefix_here + name.removeprefix(prefix_there)
        if name.startswith(prefix_there)
        else name: name
        for name in source.arrays
    }
    arrays: dict[str, np.ndarray] = {}
    lines: list[Line] = []
    misfits: list[str] = []

    def misfit(name: str, fate: Fate, reason: str, expected: bool) -> None:
        if not expected and not _matches(name, allow):
            misfits.append(f"{name}: {reason}")
        lines.append(Line(name, fate, reason))

    # A model with dense features has one norm per feature (`out_norms`) instead of the final norm.
    dense_here, dense_there = (
        not any(name.startswith(f"{prefix}norm.") for name in names)
        for prefix, names in ((prefix_here, shapes), (prefix_there, source.arrays))
    )
    for name, shape in shapes.items():
        in_backbone = name.startswith(prefix_here)
        part = name.removeprefix(prefix_here)
        belongs_to_task = not in_backbone or part.startswith(_TASK_PARTS)
        belongs_to_task |= dense_there and part.startswith("norm.")
        if name not in renamed:
            misfit(name, "drawn", "not in the source", belongs_to_task)
            continue
        array = source.arrays[renamed[name]]
        if in_backbone and part == "pos_embed" and _grids_differ(here, there, array.shape, shape):
            if (resized := resize_positions(array, there, here)) is not None:
                arrays[name] = resized
                lines.append(Line(name, "resized", f"{_grid(there)} to {_grid(here)}"))
                continue
            if here is not None and there is not None:  # Perhaps of the same shape by chance.
                misfit(name, "drawn", "with a class token in one of the models only", False)
                continue
        if array.shape != shape:
            reason = f"{_times(array.shape)} there, {_times(shape)} here"
            if part.startswith("head.") and array.shape[:-1] == shape[:-1]:
                reason = f"{counted(array.shape[-1], 'class', 'classes')} there, {shape[-1]} here"
            misfit(name, "drawn", reason, belongs_to_task)
        elif _other_classes(source.class_names, class_names) and _is_of_classes(
            part, shape, len(class_names)
        ):
            misfit(name, "drawn", "other classes", True)
        else:
            arrays[name] = array
            lines.append(Line(name, "taken"))
    # The position table of a masked autoencoder is fixed, so it is no parameter.
    masked = getattr(config, "encoder", None) is not None
    for name, original in renamed.items():
        if name not in shapes:
            part = original.removeprefix(prefix_there)
            unused = (
                part.startswith(_TASK_PARTS)
                or (dense_here and part.startswith("norm."))
                or (masked and part == "pos_embed")
            )
            misfit(
                original,
                "left",
                "not in this model",
                unused or not original.startswith(prefix_there),
            )
    if misfits:
        raise UserError(_misfits_in_words(source, misfits, here, there))
    return arrays, Report(source.name, tuple(lines), tuple(_differences(here, there)))


def backbone_of(config: Any) -> BackboneConfig | None:
    """Return the config of the backbone in a model's config, or the config itself if the model is one; else None."""
    for each in (config, getattr(config, "backbone", None), getattr(config, "encoder", None)):
        if isinstance(each, BackboneConfig):
            return each
    return None


def resize_positions(
    table: np.ndarray, source: BackboneConfig | None, target: BackboneConfig | None
) -> np.ndarray | None:
    """Resample position embeddings `1 l d` to the grid of `target`, and move the row of the class token to its place.

    If the token orders differ, the table is transposed, because an embedding belongs to a place of the image. Return
    None if a config is unknown, or if only one of the models has a class token.
    """
    if source is None or target is None:
        return None
    rows, columns = _stored_grid(source)
    there, here = _class_row(source), _class_row(target)
    if (there is None) != (here is None) or table.shape[1] != rows * columns + (there is not None):
        return None
    grid = table if there is None else np.delete(table, there, axis=1)
    if _order(source) != _order(target):
        grid = grid.reshape(1, rows, columns, -1).swapaxes(1, 2).reshape(grid.shape)
        rows, columns = columns, rows
    resized = resize_pos_embed(
        jnp.asarray(grid, jnp.float32), (rows, columns), _stored_grid(target)
    )
    if there is None or here is None:
        return np.asarray(resized)
    return np.insert(np.asarray(resized), here, table[:, there], axis=1)


def _prefix(names: Iterable[str]) -> str:
    names = list(names)
    for prefix in _BACKBONES:
        if any(name.startswith(f"{prefix}blocks.") for name in names):
            return prefix
    return ""


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _other_classes(there: Sequence[str], here: Sequence[str]) -> bool:
    return bool(there) and bool(here) and tuple(there) != tuple(here)


def _is_of_classes(part: str, shape: tuple[int, ...], classes: int) -> bool:
    """Tell whether a parameter belongs to the classes: a classifier's, or a detector's, with background or four deltas.

    Its size alone does not say so: a layer's width may be the number of classes.
    """
    named = part.startswith("head.") or any(f".{layer}." in part for layer in _CLASS_LAYERS)
    return named and shape[-1:] in ((classes,), (classes + 1,), (4 * classes,))


def _order(config: BackboneConfig) -> str:
    return getattr(config, "token_order", "row")


def _stored_grid(config: BackboneConfig) -> tuple[int, int]:
    return config.grid if _order(config) == "row" else config.grid[::-1]


def _class_row(config: BackboneConfig) -> int | None:
    """Return the row of the class token in the position table, or None; in a ViT it is the first row."""
    rows, columns = config.grid
    place = getattr(config, "class_token", "head")
    return {"none": None, "middle": rows * columns // 2, "head": 0}[place]


def _grids_differ(
    here: BackboneConfig | None,
    there: BackboneConfig | None,
    shape_there: tuple[int, ...],
    shape_here: tuple[int, ...],
) -> bool:
    if here is None or there is None:
        return shape_there != shape_here
    return (here.grid, _class_row(here), _order(here)) != (
        there.grid,
        _class_row(there),
        _order(there),
    )


def _grid(config: BackboneConfig | None) -> str:
    return "" if config is None else _times(config.grid)


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _differences(here: BackboneConfig | None, there: BackboneConfig | None) -> list[str]:
    """List the config fields that matter to the weights and in which two backbones differ."""
    if here is None or there is None:
        return []
    if type(here) is not type(there):
        return [f"the model is a {type(there).__name__} there, a {type(here).__name__} here"]
    names = [field.name for field in dataclasses.fields(here) if field.name not in _MAY_DIFFER]
    return [
        f"{name} is {getattr(there, name)!r} there, {getattr(here, name)!r} here"
        for name in names
        if getattr(there, name) != getattr(here, name)
    ]


def _other_normalisation(there: Any, here: Any) -> list[str]:
    """Note another mean or deviation. If both data name channels, those that they share are compared."""
    pairs = common_places(there, here)
    notes = []
    for name in ("mean", "std") if there is not None else ():
        first: Any = getattr(there, name, None)
        second: Any = getattr(here, name, None)
        same = all(first[i] == second[j] for i, j in pairs) if pairs else first == second
        if not same:
            notes.append(f"data.{name} is {first} there, {second} here")
    return notes


def _misfits_in_words(
    source: Source,
    misfits: Sequence[str],
    here: BackboneConfig | None,
    there: BackboneConfig | None,
) -> str:
    shown = "\n  ".join([*misfits[:8], *([f"and {len(misfits) - 8} more"] if misfits[8:] else [])])
    differences = _differences(here, there)
    models = f"\nThe models differ: {'; '.join(differences)}." if differences else ""
    return (
        f"the weights of {source.name} do not fit this model; {counted(len(misfits), 'parameter')}:\n  "
        f"{shown}{models}\n"
        "Give this run the same model, or allow misfits by name: they are then drawn anew, or left out "
        "(init_allow, on the command line --init-allow 'patch_embed.*')."
    )


def _families(names: Sequence[str]) -> list[str]:
    """Shorten parameter names to the modules that hold them, e.g. `blocks.*`, `backbone.blocks.*`, `pos_embed`."""
    families: dict[str, None] = {}
    for name in names:
        prefix = next(each for each in reversed(_BACKBONES) if name.startswith(each))
        first, _, rest = name.removeprefix(prefix).partition(".")
        families[f"{prefix}{first}.*" if rest else name] = None
    return list(families)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for info in parameter_infos(tree) for name in info.unstacked_names()}


def _replace(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Put arrays into a tree by name, one name per block. Every leaf keeps its dtype and sharding."""

    def replaced(info: ParameterInfo, leaf: Any) -> Any:
        names = info.unstacked_names()
        given = [i for i, name in enumerate(names) if name in arrays]
        if not given:
            return leaf
        parts = np.stack([np.asarray(arrays[names[i]]).astype(leaf.dtype) for i in given])
        if len(given) < len(names):
            put = jax.jit(
                lambda old, new: old.at[np.array(given)].set(new), out_shardings=leaf.sharding
            )
            return put(leaf, parts)
        whole = parts if info.stacked else parts[0]
        return jax.make_array_from_callback(whole.shape, leaf.sharding, lambda index: whole[index])

    return map_parameters(replaced, tree)

"""Read weights from files of other programs: safetensors, and PyTorch checkpoints (read without PyTorch)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvim_jax.errors import UserError, counted, suggest
from fastvim_jax.interop.torch_file import described_value, read_torch_file
from fastvim_jax.models.parameters import check_numbers
from fastvim_jax.models.safetensors_file import read_safetensors

_TORCH = (".pth", ".pt", ".ckpt", ".bin", ".pth.tar")  # The last one is timm's.
# Entries in which training programs keep weights. Averaged ones come first, as the authors evaluate and release them.
_PLACES = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
# Prefixes that programs put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
# Every backbone has one of these names, so a longer name shows the wrapper's prefix. Lightning modules hold metrics,
# losses and averaged weights beside the model.
_ANCHORS = ("patch_embed.proj.weight", "patch_embed.proj.kernel")
PROBE_EPS = 1e-6
"""Number that the batch norm of a linear probe after masked pre-training adds to the variance."""
_OTHER_PARTS = ("neck", "decode_head", "auxiliary_head", "rpn_head", "roi_head", "stages")


@dataclass(frozen=True)
class WeightsFile:
    """Hold the weights of a file under the names of the program that wrote it.

    Attributes:
        arrays: names to arrays, as stored.
        place: the entry of the file that held them, for example `state_dict_ema`; empty if it was the file itself.
        ignored: descriptions of everything else in the file.
        notes: one line for each change of arrays that have other names here than in the file.
    """

    arrays: dict[str, np.ndarray]
    place: str
    ignored: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_weights_file(path: Path | str, *, place: str | None = None) -> WeightsFile:
    """Read the weights of a safetensors file or a PyTorch checkpoint, without running anything in the file.

    Args:
        path: a `.safetensors`, `.pth`, `.pt`, `.ckpt`, `.bin` or `.pth.tar` file.
        place: the entry of a checkpoint that holds the weights; by default the averaged weights if there are any
            (`state_dict_ema`, `model_ema`), else `state_dict`, `model` or the file itself.

    Raises:
        UserError: the file is of another kind or damaged; it has no entry `place`; weights are complex or not finite.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        if place is not None:
            raise UserError(
                f"{path} has no entries to choose from, as any safetensors file: leave out {place!r}."
            )
        found = _unwrap(WeightsFile(read_safetensors(path), "", ()))
    elif path.name.endswith(_TORCH):
        found = _unwrap(_choose(path, read_torch_file(path), place))
    else:
        raise UserError(f"{path} is no weights file: use .safetensors or {', '.join(_TORCH)}.")
    if not found.arrays:
        raise UserError(f"{path} holds no weights.")
    check_numbers(found.arrays, str(path))
    return _fold_probe_head(found)


def _fold_probe_head(found: WeightsFile) -> WeightsFile:
    """Fold the head of a linear probe, a batch norm without parameters and a linear layer, into one linear layer.

    This is possible because W (x - mean) / sqrt(variance + eps) + b is affine in x.

    Raises:
        UserError: the head's arrays do not fit together.
    """
    arrays = dict(found.arrays)
    if not {"head.0.running_mean", "head.0.running_var", "head.1.weight"} <= arrays.keys():
        return found
    arrays.pop("head.0.num_batches_tracked", None)
    mean, variance = (
        arrays.pop(f"head.0.running_{name}").astype(np.float64) for name in ("mean", "var")
    )
    kernel = arrays.pop("head.1.weight")
    bias = arrays.pop("head.1.bias", np.zeros(len(kernel), kernel.dtype))
    if not mean.shape == variance.shape == kernel.shape[1:] or bias.shape != kernel.shape[:1]:
        raise UserError(
            f"the linear probe's head has running statistics {mean.shape}, {variance.shape}, weights {kernel.shape} "
            f"and biases {bias.shape}, which do not fit together."
        )
    folded = kernel / np.sqrt(variance + PROBE_EPS)
    arrays["head.weight"] = folded.astype(kernel.dtype)
    arrays["head.bias"] = (bias - folded @ mean).astype(bias.dtype)
    note = "head.0.*, head.1.*: a linear probe's batch norm and linear layer, joined into head.*"
    return dataclasses.replace(found, arrays=arrays, notes=(*found.notes, note))


def _choose(path: Path, saved: Mapping[Any, Any], place: str | None) -> WeightsFile:
    holders = {str(key): value for key, value in saved.items() if _tensors(value)}
    if place is None:
        place = next((name for name in _PLACES if name in holders), "")
    elif place not in holders:
        known = ", ".join(holders) or "none"
        raise UserError(
            f"{path} has no weights under {place!r}.{suggest(place, holders)} It has: {known}."
        )
    within = holders[place] if place else saved
    chosen = _tensors(within)
    if not chosen and holders:
        raise UserError(f"{path} holds weights under {', '.join(holders)}: choose by --entry.")
    ignored = {str(name): value for name, value in saved.items() if place and str(name) != place}
    ignored |= {
        f"{place}.{name}" if place else str(name): value
        for name, value in within.items()
        if not isinstance(value, np.ndarray)
    }
    return WeightsFile(
        chosen, place, tuple(f"{name}: {described_value(value)}" for name, value in ignored.items())
    )


def _tensors(value: Any) -> dict[str, np.ndarray]:
    if not isinstance(value, Mapping):
        return {}
    return {str(key): item for key, item in value.items() if isinstance(item, np.ndarray)}


def _unwrap(found: WeightsFile) -> WeightsFile:
    """Drop prefixes of wrappers (DataParallel, torch.compile, Lightning), and list the arrays beside the model.

    If a wrapper holds several models, the averaged one is taken. A segmentation or detection model is kept whole, as is
    a masked autoencoder under this library's names.
    """
    arrays = found.arrays
    for prefix in _PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            shorter = {name.removeprefix(prefix): array for name, array in arrays.items()}
            return _unwrap(dataclasses.replace(found, arrays=shorter))
    first = {name.split(".")[0] for name in arrays}
    if {"encoder", "decoder"} <= first and any(name.endswith(".kernel") for name in arrays):
        return found
    wrappers = [
        name.removesuffix(anchor)
        for name in arrays
        for anchor in _ANCHORS
        if name.endswith(f".{anchor}")
    ]
    if not wrappers or first & set(_OTHER_PARTS) or any(anchor in arrays for anchor in _ANCHORS):
        return found
    wrapper = min(wrappers, key=lambda each: ("ema" not in each.lower(), len(each)))
    counts = Counter(name.split(".")[0] for name in arrays if not name.startswith(wrapper))
    return WeightsFile(
        {n.removeprefix(wrapper): a for n, a in arrays.items() if n.startswith(wrapper)},
        found.place,
        (
            *found.ignored,
            *(f"{name}: {counted(n, 'array')} beside {wrapper}*" for name, n in counts.items()),
        ),
    )

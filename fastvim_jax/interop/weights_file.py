"""Read weights from files of other programs: safetensors, and PyTorch checkpoints (read without PyTorch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvim_jax.errors import UserError, suggest
from fastvim_jax.interop.torch_file import read_torch_file

_TORCH = (".pth", ".pt", ".ckpt", ".bin")
# Where training programs keep the weights, the averaged ones first: those are what the authors evaluate and release.
_PLACES = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
# What programs put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")


@dataclass(frozen=True)
class WeightsFile:
    """Hold the weights of a file under the names of the program that wrote it.

    Attributes:
        arrays: names to arrays, as stored.
        place: the entry of the file that held them, for example `state_dict_ema`; empty if it was the file itself.
        ignored: descriptions of everything else in the file.
    """

    arrays: dict[str, np.ndarray]
    place: str
    ignored: tuple[str, ...]


def read_weights_file(path: Path | str, *, place: str | None = None) -> WeightsFile:
    """Read the weights of a safetensors file or a PyTorch checkpoint; nothing in the file is run.

    Args:
        path: a `.safetensors`, `.pth`, `.pt`, `.ckpt` or `.bin` file.
        place: the entry of a checkpoint that holds the weights; by default the averaged weights if there are any
            (`state_dict_ema`, `model_ema`), else `state_dict`, `model` or the file itself.

    Raises:
        UserError: another kind of file; a damaged one; no such entry; numbers that are complex or not finite.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        found = WeightsFile(_read_safetensors(path), "", ())
    elif path.suffix in _TORCH:
        found = _choose(path, read_torch_file(path), place)
    else:
        raise UserError(f"{path} is no weights file: use .safetensors or {', '.join(_TORCH)}.")
    if not found.arrays:
        raise UserError(f"{path} holds no weights.")
    check_numbers(found.arrays, str(path))
    return found


def check_numbers(arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Refuse weights that no training gives: complex, NaN or infinite numbers, or anything but numbers.

    Raises:
        UserError: naming the first entries at fault.
    """
    bad = []
    for name, array in arrays.items():
        if array.dtype.kind == "c":
            bad.append(f"{name} is complex")
        elif array.dtype.kind in "OSUM":
            bad.append(f"{name} holds no numbers ({array.dtype})")
        elif not np.isfinite(np.asarray(array, np.float64)).all():
            bad.append(f"{name} holds NaN or infinite numbers")
    if bad:
        more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UserError(f"{where}: {'; '.join(bad[:5])}{more}.")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    # Imported here, so that reading other files does not wait for it.
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}.") from None
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no safetensors file, or damaged: {error}") from error


def _choose(path: Path, saved: Mapping[Any, Any], place: str | None) -> WeightsFile:
    holders = {str(key): value for key, value in saved.items() if _tensors(value)}
    if place is None:
        place = next((name for name in _PLACES if name in holders), "")
    elif place not in holders:
        known = ", ".join(holders) or "none"
        raise UserError(
            f"{path} has no weights under {place!r}.{suggest(place, holders)} It has: {known}."
        )
    chosen = _tensors(holders[place] if place else saved)
    ignored = [
        f"{name}: {_describe(value)}" for name, value in saved.items() if place and name != place
    ]
    return WeightsFile(_without_prefix(chosen), place, tuple(ignored))


def _tensors(value: Any) -> dict[str, np.ndarray]:
    if not isinstance(value, Mapping):
        return {}
    return {str(key): item for key, item in value.items() if isinstance(item, np.ndarray)}


def _without_prefix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop what a wrapper (DataParallel, torch.compile, Lightning) put before every name."""
    for prefix in _PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            return _without_prefix({n.removeprefix(prefix): a for n, a in arrays.items()})
    return arrays


def _describe(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return f"{type(value).__name__} of {len(value)} entries"
    return repr(value)[:60]

"""The golden files: where they are, what one holds, and which parts of it must be there.

A fixture is an `.npz` with arrays under `state/`, `input/`, `output/`, `cotangent/` and `grad/`, and a JSON text
`meta` naming the class, its constructor arguments and what was stored.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]

COVERED = frozenset(
    "FastVim FastVimMixer FastVimBackbone FastVimTrainSteps Vim VimBackbone ViT selective_scan causal_conv1d_silu "
    "add_rms_norm add_layer_norm pos_embed_resize sincos_pos_embed schedules classification_losses ema "
    "FastMaskVimMAE VimMAE ViTMAE masked_row_means_constant masked_row_means_true random_masking mae_pixel_loss "
    "linear_probe_head "
    "FastChannelVim FastChannelVim2DCompress ChannelVim ChannelPatchEmbed ChannelViT HCSChannelViT".split()
)
TABLES = frozenset({"param_groups", "architectures", "init_stats"})


def folder() -> Path | None:
    """Return the folder of golden files, or None where there is none; a folder asked for by name must exist."""
    named = os.environ.get("FASTVIM_PARITY_DIR")
    path = Path(named).expanduser() if named else ROOT.parent / "shared" / "parity"
    if path.is_dir():
        return path
    if named:
        raise FileNotFoundError(f"FASTVIM_PARITY_DIR names {path}, which is not a folder.")
    return None


def fixture_paths() -> list[Path]:
    """Return every fixture of the folder, by name."""
    path = folder()
    return sorted(path.glob("*.npz")) if path else []


def table_paths() -> list[Path]:
    """Return every JSON table of the folder except its index."""
    path = folder()
    return sorted(p for p in path.glob("*.json") if p.stem != "index") if path else []


@dataclasses.dataclass(frozen=True)
class Golden:
    """One fixture, its arrays split by what they are."""

    name: str
    meta: dict[str, Any]
    state: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    cotangents: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]

    @property
    def kind(self) -> str:
        """Return the class the fixture was made with."""
        return self.meta["class"]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Return the constructor arguments, as the authors name them."""
        return self.meta.get("kwargs", {})

    @property
    def quirk(self) -> bool:
        """Return whether the fixture documents a code path that no released recipe uses."""
        return bool(self.meta.get("quirk", False))

    def parameter_grads(self) -> dict[str, np.ndarray]:
        """Return gradients of parameters, by the authors' name."""
        return {k: v for k, v in self.grads.items() if not k.startswith("input/")}

    def input_grads(self) -> dict[str, np.ndarray]:
        """Return gradients of inputs, by the input's name."""
        return {
            k.removeprefix("input/"): v for k, v in self.grads.items() if k.startswith("input/")
        }

    def unused(self) -> list[str]:
        """List parameters whose gradient is zero because the outputs do not depend on them."""
        return list(self.meta.get("unused_parameters_zero_grad", []))


def read(path: Path) -> Golden:
    """Load one fixture."""
    parts: dict[str, dict[str, np.ndarray]] = {
        k: {} for k in ("state", "input", "output", "cotangent", "grad")
    }
    with np.load(path) as archive:
        meta = json.loads(str(archive["meta"]))
        for key in archive.files:
            part, _, name = key.partition("/")
            if part in parts:
                parts[part][name] = archive[key]
            elif key != "meta":
                raise AssertionError(f"{path.name}: array {key!r} is of no known part")
    return Golden(path.stem, meta, *parts.values())


def meta_of(path: Path) -> dict[str, Any]:
    """Read what a fixture says of itself, without its arrays."""
    with np.load(path) as archive:
        return json.loads(str(archive["meta"]))


def kind_of(path: Path) -> str:
    """Read the class of a fixture, without its arrays."""
    return meta_of(path)["class"]


def draw_representatives(paths: list[Path], seed: int) -> set[str]:
    """Draw one fixture of each class by `seed`, and return their names. Quirks are left out: nothing compares them."""
    names: dict[str, list[str]] = {}
    for path in paths:
        meta = meta_of(path)
        if not meta.get("quirk", False):
            names.setdefault(meta["class"], []).append(path.stem)
    return {of_class[seed % len(of_class)] for of_class in names.values()}


def draw_gradients(kinds: dict[Path, str], seed: int) -> set[str]:
    """Draw half of the fixtures of each class in `kinds` by `seed`, rounded up, and return their names."""
    names: dict[str, list[str]] = {}
    for path, kind in kinds.items():
        names.setdefault(kind, []).append(path.stem)
    drawn: set[str] = set()
    for of_class in names.values():
        in_turn = sorted(of_class, key=lambda name: zlib.crc32(f"{seed} {name}".encode()))
        drawn.update(in_turn[: (len(in_turn) + 1) // 2])
    return drawn


def expected_grads(golden: Golden) -> set[str]:
    """Return the parameters whose gradients the fixture says it stores, so that a missing array is noticed.

    `grads_stored` is a sentence ("all trainable parameters and inputs", "inputs, and parameters whose name starts
    with one of: a, b") or a list of names.
    """
    stored = golden.meta.get("grads_stored")
    if stored is None:
        return set()
    if isinstance(stored, list):
        return {name for name in stored if name in golden.state}
    if stored.startswith("all"):
        return set(golden.state) - set(golden.unused())
    prefixes = [p.strip() for p in stored.partition("one of:")[2].split(",") if p.strip()]
    return {name for name in golden.state if name.startswith(tuple(prefixes))} - set(
        golden.unused()
    )

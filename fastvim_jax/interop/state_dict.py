"""Load and return weights under the names and in the layouts of the authors' PyTorch state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from fastvim_jax.errors import UserError
from fastvim_jax.interop.detection_names import (
    BOX_HEAD,
    MASK_HEAD,
    RPN,
    SIMPLE_FPN,
    detector_entries,
)
from fastvim_jax.interop.masked_names import MASKED_TABLES, fixed_tables, without_tables
from fastvim_jax.interop.torch_names import (
    CHANNEL_MAMBA,
    CHANNEL_VIT,
    MIXER,
    VISION_MAMBA,
    VISION_TRANSFORMER,
    NameTable,
    resolve_aliases,
)
from fastvim_jax.interop.torch_segmentation_names import (
    DECONVOLUTION_NECK,
    FCN_HEAD,
    MULTILEVEL_NECK,
    PYRAMID_POOLING,
    SEGMENTOR,
    UPER_HEAD,
    prefixed,
)
from fastvim_jax.layers.mixer import Mixer
from fastvim_jax.models.channel_mamba import ChannelMamba
from fastvim_jax.models.channel_vit import ChannelViT
from fastvim_jax.models.detection.cascade import CascadeRCNN
from fastvim_jax.models.detection.heads import BoxHead, MaskHead
from fastvim_jax.models.detection.rpn import RPNHead
from fastvim_jax.models.detection.simple_fpn import SimpleFPN
from fastvim_jax.models.mae import MaskedAutoencoder
from fastvim_jax.models.parameters import (
    check_numbers,
    list_mismatches,
    named_parameters,
    parameter_infos,
    replace_parameters,
)
from fastvim_jax.models.segmentation.heads import FCNHead, PyramidPooling, UPerHead
from fastvim_jax.models.segmentation.necks import DeconvolutionNeck, MultiLevelNeck
from fastvim_jax.models.upernet import UperNet
from fastvim_jax.models.vision_mamba import VisionMamba
from fastvim_jax.models.vit import VisionTransformer

_SHOWN = 10
TABLES = {
    VisionMamba: NameTable(tuple(VISION_MAMBA)),
    VisionTransformer: NameTable(tuple(VISION_TRANSFORMER)),
    ChannelMamba: NameTable(tuple(CHANNEL_MAMBA)),
    ChannelViT: NameTable(tuple(CHANNEL_VIT)),
    Mixer: NameTable(tuple(MIXER)),
    UPerHead: NameTable(tuple(UPER_HEAD)),
    FCNHead: NameTable(tuple(FCN_HEAD)),
    PyramidPooling: NameTable(tuple(PYRAMID_POOLING)),
    DeconvolutionNeck: NameTable(tuple(DECONVOLUTION_NECK)),
    MultiLevelNeck: NameTable(tuple(MULTILEVEL_NECK)),
    SimpleFPN: NameTable(tuple(SIMPLE_FPN)),
    RPNHead: NameTable(tuple(RPN)),
    BoxHead: NameTable(tuple(BOX_HEAD)),
    MaskHead: NameTable(tuple(MASK_HEAD)),
}


def from_torch_state_dict(model: nnx.Module, mapping: Mapping[str, Any]) -> None:
    """Load weights into `model`, in place.

    Args:
        model: A FastVim, Vim or ViT model, a segmentation or detection model, or a single `Mixer`, head or neck.
        mapping: The authors' state-dict names to NumPy arrays (anything `numpy.asarray` takes). Never a pickle: load
            a `.pth` file with `torch.load(..., weights_only=True)` and convert its tensors, or use safetensors.

    Raises:
        UserError: one error that lists the missing, unexpected and misshapen entries by their own names; or
            numbers that are complex or not finite.
    """
    table = _table(model)
    params = nnx.state(model)
    # Name expected shapes in the authors' layout, because the user's arrays have that layout.
    expected = {}
    for info in parameter_infos(params):
        for name in info.unstacked_names():
            torch_name, convert = _torch_entry(table, name)
            expected[torch_name] = convert(np.broadcast_to(0.0, info.shape)).shape
    # PyTorch's batch norms also store the number of batches seen, which nothing reads.
    given = {k: v for k, v in mapping.items() if not k.endswith(".num_batches_tracked")}
    arrays = resolve_aliases({name: np.asarray(value) for name, value in given.items()})
    if isinstance(model, MaskedAutoencoder):
        arrays = without_tables(model, arrays)
    problems = list_mismatches(expected, {name: a.shape for name, a in arrays.items()})
    if problems:
        raise UserError(
            f"the weights do not fit this {type(model).__name__}:\n  "
            + "\n  ".join(_shortened(problems))
            + _advice(expected, arrays)
        )
    check_numbers(arrays, "the weights")
    flat = {}
    for torch_name, array in arrays.items():
        name, convert = table.to_ours(torch_name)  # type: ignore[misc]  # unknown names are listed above
        flat[name] = convert(array)
    nnx.update(model, replace_parameters(params, flat))


def _shortened(problems: list[str]) -> list[str]:
    """Return all problems, or only the first and last ones if there are many: missing names come first, shapes last."""
    if len(problems) <= 2 * _SHOWN:
        return problems
    return [
        *problems[:_SHOWN], f"... and {len(problems) - 2 * _SHOWN} more ...", *problems[-_SHOWN:]
    ]  # fmt: skip


def _advice(expected: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Name the prefix that all given names have and the expected ones lack, if there is one."""
    first = next(iter(given), "").split(".")[0]
    prefix = f"{first}."
    shared = all(name.startswith(prefix) for name in given)
    if not shared or not expected.keys() & {name.removeprefix(prefix) for name in given}:
        return ""
    return (
        f"\nAll given names begin with {prefix!r}: take it off, as in {{name.removeprefix({prefix!r}): array for name, "
        "array in weights.items()}."
    )


def to_torch_state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return the model's weights as NumPy arrays under the authors' names and in their layouts.

    A masked autoencoder's fixed position tables are among them, as in the authors' files.
    """
    named = {
        k: np.asarray(v) for k, v in to_torch_names(model, jax.device_get(nnx.state(model))).items()
    }
    return named | fixed_tables(model) if isinstance(model, MaskedAutoencoder) else named


def to_torch_names(model: nnx.Module, tree: Any) -> dict[str, Any]:
    """Rename a pytree with the structure of the model's parameters, such as gradients; see `to_torch_state_dict`.

    JAX arrays stay JAX arrays, and NumPy arrays stay NumPy arrays, for whose shapes nothing is compiled.
    """
    table = _table(model)
    named = {}
    for name, value in named_parameters(tree).items():
        torch_name, convert = _torch_entry(table, name)
        named[torch_name] = convert(value)
    return named


def _table(model: nnx.Module) -> NameTable:
    if isinstance(model, UperNet):
        backbone = prefixed("backbone.", "backbone.", list(_table(model.backbone).entries))
        neck = [] if model.neck is None else list(_table(model.neck).entries)
        return NameTable((*backbone, *SEGMENTOR, *prefixed("neck.", "neck.", neck)))
    if isinstance(model, CascadeRCNN):
        backbone = list(_table(model.backbone).entries)
        return NameTable(tuple(detector_entries(backbone, len(model.stages))))
    if isinstance(model, MaskedAutoencoder):
        return MASKED_TABLES[type(model.encoder)]
    if type(model) not in TABLES:
        known = ", ".join(cls.__name__ for cls in TABLES)
        raise UserError(f"no name table for {type(model).__name__}; there is one for {known}.")
    return TABLES[type(model)]


def _torch_entry(table: NameTable, name: str):
    entry = table.to_torch(name)
    if entry is None:
        raise UserError(f"parameter {name} has no entry in the table of PyTorch names.")
    return entry

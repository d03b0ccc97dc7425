"""Map the names of a Cascade Mask R-CNN in PyTorch (MMDetection's heads, the authors' neck) to ours.

`torch_names` says how to read an entry.
"""

from __future__ import annotations

from typing import Any

from fastvim_jax.interop.torch_names import LINEAR, SAME, Layout

Entries = list[tuple[str, str, Layout]]

# Convolution: (out, in, height, width) there, (height, width, in, out) here.
CONV: Layout = (lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))
# Transposed convolution: (in, out, 2, 2) there, (2, 2, in, out) here.
UPSAMPLE: Layout = (lambda w: w.transpose(2, 3, 0, 1), lambda w: w.transpose(2, 3, 0, 1))


def _flat_to_grid(w: Any) -> Any:
    return w.reshape(w.shape[0], -1, 7, 7).transpose(2, 3, 1, 0)


# Linear layer on a flattened (channel, row, column) map: (out, c·7·7) there, (7, 7, c, out) here.
FLATTENED: Layout = (_flat_to_grid, lambda w: w.transpose(3, 2, 0, 1).reshape(w.shape[-1], -1))


def _layer(theirs: str, ours: str, layout: Layout, bias: bool = True) -> Entries:
    entries = [(f"{theirs}.weight", f"{ours}.kernel", layout)]
    return entries + ([(f"{theirs}.bias", f"{ours}.bias", SAME)] if bias else [])


def _conv_norm(theirs: str, ours: str) -> Entries:
    return [
        *_layer(f"{theirs}.conv", f"{ours}.conv", CONV, bias=False),
        (f"{theirs}.norm_layer.weight", f"{ours}.norm.scale", SAME),
        (f"{theirs}.norm_layer.bias", f"{ours}.norm.bias", SAME),
    ]


SIMPLE_FPN: Entries = [
    *_layer("fpn1.0", "up4_first", UPSAMPLE),
    ("fpn1.1.weight", "up4_norm.scale", SAME),
    ("fpn1.1.bias", "up4_norm.bias", SAME),
    *_layer("fpn1.3", "up4_second", UPSAMPLE),
    *_layer("fpn2.0", "up2", UPSAMPLE),
    *_conv_norm("lateral_convs.{i}", "lateral.{i}"),
    *_conv_norm("fpn_convs.{i}", "output.{i}"),
]

RPN: Entries = [
    *_layer("rpn_conv.{i}.conv", "convs.{i}", CONV),
    *_layer("rpn_conv", "convs.0", CONV),  # a single convolution has no number in PyTorch
    *_layer("rpn_cls", "cls", CONV),
    *_layer("rpn_reg", "reg", CONV),
]

BOX_HEAD: Entries = [
    *_conv_norm("shared_convs.{i}", "convs.{i}"),
    *_layer("shared_fcs.0", "fc", FLATTENED),
    *_layer("fc_cls", "cls", LINEAR),
    *_layer("fc_reg", "reg", LINEAR),
]

MASK_HEAD: Entries = [
    *_conv_norm("convs.{i}", "convs.{i}"),
    *_layer("upsample", "upsample", UPSAMPLE),
    *_layer("conv_logits", "logits", CONV),
]


def detector_entries(backbone: Entries, stages: int) -> Entries:
    """Join the parts' tables under the names of a whole detector with `stages` stages."""
    parts = [
        ("backbone", "backbone", backbone),
        ("neck", "neck", SIMPLE_FPN),
        ("rpn_head", "rpn", RPN),
    ]
    for i in range(stages):
        parts.append((f"roi_head.bbox_head.{i}", f"stages.{i}.box_head", BOX_HEAD))
        parts.append((f"roi_head.mask_head.{i}", f"stages.{i}.mask_head", MASK_HEAD))
    return [
        (f"{theirs}.{a}", f"{ours}.{b}", layout)
        for theirs, ours, part in parts
        for a, b, layout in part
    ]

"""Map the names of mmseg's heads and of the necks to ours; `torch_names` says how to read an entry."""

from __future__ import annotations

from fastvim_jax.interop.torch_names import PATCH, SAME, Layout

# Convolutions: (out, in, rows, columns) there, (rows, columns, in, out) here.
CONV = PATCH
# Transposed convolutions: (in, out, 2, 2) there, (in, 2, 2, out) here.
UP_CONV: Layout = (lambda w: w.transpose(0, 2, 3, 1), lambda w: w.transpose(0, 3, 1, 2))

Entries = list[tuple[str, str, Layout]]


def prefixed(theirs: str, ours: str, entries: Entries) -> Entries:
    """Put a prefix before both names of every entry."""
    return [(theirs + a, ours + b, layout) for a, b, layout in entries]


def _conv(theirs: str, ours: str) -> Entries:
    return [(f"{theirs}.weight", f"{ours}.kernel", CONV), (f"{theirs}.bias", f"{ours}.bias", SAME)]


def _up_conv(theirs: str, ours: str) -> Entries:
    return [
        (f"{theirs}.weight", f"{ours}.kernel", UP_CONV),
        (f"{theirs}.bias", f"{ours}.bias", SAME),
    ]


def _norm(theirs: str, ours: str) -> Entries:
    pairs = (
        ("weight", "scale"),
        ("bias", "bias"),
        ("running_mean", "mean"),
        ("running_var", "var"),
    )
    return [(f"{theirs}.{a}", f"{ours}.{b}", SAME) for a, b in pairs]


def _conv_norm(theirs: str, ours: str) -> Entries:
    return [*_conv(f"{theirs}.conv", f"{ours}.conv"), *_norm(f"{theirs}.bn", f"{ours}.norm")]


PYRAMID_POOLING: Entries = _conv_norm("{i}.1", "branches.{i}")

UPER_HEAD: Entries = [
    *prefixed("psp_modules.", "ppm.", PYRAMID_POOLING),
    *_conv_norm("lateral_convs.{i}", "laterals.{i}"),
    *_conv_norm("bottleneck", "bottleneck"),
    *_conv_norm("fpn_convs.{i}", "outputs.{i}"),
    *_conv_norm("fpn_bottleneck", "fusion"),
    *_conv("conv_seg", "classifier.conv"),
]

FCN_HEAD: Entries = [*_conv_norm("convs.0", "conv"), *_conv("conv_seg", "classifier.conv")]

DECONVOLUTION_NECK: Entries = [
    *_up_conv("fpn1.0", "up4_first"),
    *_norm("fpn1.1", "up4_norm"),
    *_up_conv("fpn1.3", "up4_second"),
    *_up_conv("fpn2.0", "up2"),
]

MULTILEVEL_NECK: Entries = [
    *_conv("lateral_convs.{i}.conv", "laterals.{i}"),
    *_conv("convs.{i}.conv", "outputs.{i}"),
]

SEGMENTOR: Entries = [
    *prefixed("decode_head.", "decode_head.", UPER_HEAD),
    *prefixed("auxiliary_head.", "auxiliary_head.", FCN_HEAD),
]
"""Heads of a whole model. The caller puts the backbone's entries (`backbone.`) before them and the neck's after."""

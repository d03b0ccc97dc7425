"""Map the authors' PyTorch state-dict names to ours, in one table that is read in both directions.

An entry is (the authors' pattern, our pattern, layout). Our patterns are names of unstacked parameters. `{i}` stands
for the index of a block or feature map. A layout is a pair of functions on arrays: from theirs to ours, and back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Layout = tuple[Callable[[Any], Any], Callable[[Any], Any]]

SAME: Layout = (lambda w: w, lambda w: w)
# Linear weights: (out, in) there, (in, out) here.
LINEAR: Layout = (lambda w: w.T, lambda w: w.T)
# Depthwise convolution: (channels, 1, width) there, (width, channels) here.
DEPTHWISE: Layout = (lambda w: w[:, 0, :].T, lambda w: w.T[:, None, :])
# Patch convolution: (d, c, p, q) there, (p, q, c, d) here.
PATCH: Layout = (lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))
# Patch convolution shared by all channels: (d, 1, 1, p, q) there, (p, q, 1, d) here.
CHANNEL_PATCH: Layout = (
    lambda w: w[:, :, 0].transpose(2, 3, 1, 0),
    lambda w: w.transpose(3, 2, 0, 1)[:, :, None],
)

MIXER = [
    ("in_proj.weight", "in_proj.kernel", LINEAR),
    ("in_proj.bias", "in_proj.bias", SAME),
    ("out_proj.weight", "out_proj.kernel", LINEAR),
    ("out_proj.bias", "out_proj.bias", SAME),
    ("layernorm.weight", "post_norm.scale", SAME),
    ("layernorm.bias", "post_norm.bias", SAME),
    ("gamma", "layer_scale", SAME),
    *(
        entry
        for suffix, direction in (("", "forward"), ("_b", "backward"))
        for entry in (
            (f"A{suffix}_log", f"{direction}.A_log", SAME),
            (f"D{suffix}", f"{direction}.D", SAME),
            (f"conv1d{suffix}.weight", f"{direction}.conv.kernel", DEPTHWISE),
            (f"conv1d{suffix}.bias", f"{direction}.conv.bias", SAME),
            (f"x_proj{suffix}.weight", f"{direction}.x_proj.kernel", LINEAR),
            (f"dt_proj{suffix}.weight", f"{direction}.dt_proj.kernel", LINEAR),
            (f"dt_proj{suffix}.bias", f"{direction}.dt_proj.bias", SAME),
            (f"score{suffix}.weight", f"{direction}.score.kernel", LINEAR),
            (f"score{suffix}.bias", f"{direction}.score.bias", SAME),
        )
    ),
]

EMBEDDING = [
    ("cls_token", "class_token", SAME),
    ("pos_embed", "pos_embed", SAME),
    ("patch_embed.proj.weight", "patch_embed.proj.kernel", PATCH),
    ("patch_embed.proj.bias", "patch_embed.proj.bias", SAME),
    ("head.weight", "head.kernel", LINEAR),
    ("head.bias", "head.bias", SAME),
    ("outnorm_{i}.weight", "out_norms.{i}.scale", SAME),
    ("outnorm_{i}.bias", "out_norms.{i}.bias", SAME),
]

VISION_MAMBA = [
    *EMBEDDING,
    ("norm_f.weight", "norm.scale", SAME),
    ("norm_f.bias", "norm.bias", SAME),
    ("layers.{i}.norm.weight", "blocks.{i}.norm.scale", SAME),
    ("layers.{i}.norm.bias", "blocks.{i}.norm.bias", SAME),
    *((f"layers.{{i}}.mixer.{a}", f"blocks.{{i}}.mixer.{b}", layout) for a, b, layout in MIXER),
]

VISION_TRANSFORMER = [
    *EMBEDDING,
    *(
        (f"{prefix}{norm}.{a}", f"{prefix}{norm}.{b}", SAME)
        for prefix, norms in (("", ("norm", "fc_norm")), ("blocks.{i}.", ("norm1", "norm2")))
        for norm in norms
        for a, b in (("weight", "scale"), ("bias", "bias"))
    ),
    *(
        (f"blocks.{{i}}.{layer}.{a}", f"blocks.{{i}}.{layer}.{b}", layout)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for a, b, layout in (("weight", "kernel", LINEAR), ("bias", "bias", SAME))
    ),
    ("blocks.{i}.attn.conv1d.weight", "blocks.{i}.attn.conv.kernel", DEPTHWISE),
    ("blocks.{i}.attn.conv1d.bias", "blocks.{i}.attn.conv.bias", SAME),
]

# These stand before the entries of the same names in EMBEDDING, because the first entry that matches is used.
CHANNEL_EMBEDDING = [
    ("patch_embed.proj.weight", "patch_embed.proj.kernel", CHANNEL_PATCH),
    ("patch_embed.channel_embed.weight", "patch_embed.channel_embed", SAME),
]
CHANNEL_MAMBA = [*CHANNEL_EMBEDDING, *VISION_MAMBA]
CHANNEL_VIT = [*CHANNEL_EMBEDDING, *VISION_TRANSFORMER]

ALIASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    # ChannelViT without channel sampling stores this table as (1, d, channels, 1, 1).
    "patch_embed.channel_embed": (
        "patch_embed.channel_embed.weight",
        lambda w: w[0, :, :, 0, 0].T,
    )
}
"""Other names that some of the authors' models use: (name in the tables, function to the layout of that name)."""


def resolve_aliases(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `mapping` under the names that the tables use."""
    resolved = {}
    for name, value in mapping.items():
        known, convert = ALIASES.get(name, (name, SAME[0]))
        resolved[known] = convert(value)
    return resolved


@dataclass(frozen=True)
class NameTable:
    """Translate names and array layouts in both directions."""

    entries: tuple[tuple[str, str, Layout], ...]

    def to_ours(self, name: str) -> tuple[str, Callable[[Any], Any]] | None:
        """Return our name for the authors' `name`, and the function that turns their array into ours; or None."""
        return self._translate(name, 0, 1)

    def to_torch(self, name: str) -> tuple[str, Callable[[Any], Any]] | None:
        """Return the authors' name for ours, and the function that turns our array into theirs; or None."""
        return self._translate(name, 1, 0)

    def _translate(
        self, name: str, source: int, target: int
    ) -> tuple[str, Callable[[Any], Any]] | None:
        for *patterns, layout in self.entries:
            pattern = re.escape(patterns[source]).replace(r"\{i\}", r"(\d+)")
            match = re.fullmatch(pattern, name)
            if match:
                index = match.group(1) if match.groups() else ""
                return patterns[target].replace("{i}", index), layout[source]
        return None

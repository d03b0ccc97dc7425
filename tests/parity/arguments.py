"""The one table from the authors' constructor arguments to this package's config fields.

Every argument is named here with the values it may take; an argument or a value that is not is an error, so that a
fixture can never be compared with a model that quietly ignores part of its description.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]


class UnknownArgumentError(AssertionError):
    """A fixture's constructor argument, or its value, has no counterpart here."""


def field(name: str) -> Callable[[Any], Fields]:
    """Take the argument for a field under another (or the same) name."""
    return lambda value: {name: value}


def choice(name: str, **values: Any) -> Callable[[Any], Fields]:
    """Take the argument for a field whose values have other names."""

    def translate(value: Any) -> Fields:
        key = str(value)
        if key not in values:
            raise UnknownArgumentError(
                f"value {value!r} for the field {name!r}; known: {sorted(values)}"
            )
        return {name: values[key]}

    return translate


def no_effect(*allowed: Any) -> Callable[[Any], Fields]:
    """Ignore an argument that changes how the reference computes, not what; other values would change the function."""

    def check(value: Any) -> Fields:
        if value not in allowed:
            raise UnknownArgumentError(
                f"value {value!r}, of which only {allowed} leave the function as it is"
            )
        return {}

    return check


def size(value: Any) -> Fields:
    """Return an image size: a number, or one or two in a list."""
    sides = (value, value) if isinstance(value, int) else tuple(value)
    return {"image_size": sides * 2 if len(sides) == 1 else sides}


SSM: dict[str, Callable[[Any], Fields]] = {
    "d_state": field("state_size"),
    "d_conv": field("conv_width"),
    "expand": field("expand"),
    "dt_rank": lambda v: {} if v == "auto" else {"dt_rank": v},
    "bias": field("proj_bias"),
    "conv_bias": field("conv_bias"),
    "use_fast_path": no_effect(True, False),
}


def ssm(value: dict[str, Any] | None) -> Fields:
    """Return the nested dictionary of mixer sizes."""
    return translate(value or {}, SSM)


# The mixer's own arguments appear in the fixtures of one mixer and, through the block, in those of whole models.
MIXER: dict[str, Callable[[Any], Fields]] = {
    "collapse_method": choice("pooling", mean="mean", max="max"),
    "scaling_factor": field("pool_scale"),
    "use_norm_after_ssm": choice("post_norm", **{"True": "layer", "False": "none"}),
    "init_layer_scale": field("layer_scale"),
}

MAMBA_MODEL: dict[str, Callable[[Any], Fields]] = {
    **MIXER,
    "img_size": size,
    "patch_size": field("patch_size"),
    "stride": field("stride"),
    "depth": field("depth"),
    "embed_dim": field("embed_dim"),
    "channels": field("channels"),
    "in_chans": field("channels"),
    "num_classes": field("num_classes"),
    "ssm_cfg": ssm,
    "d_state": field("state_size"),
    "drop_rate": no_effect(0.0),
    "drop_path_rate": field("drop_path"),
    "norm_epsilon": field("norm_eps"),
    "rms_norm": choice("norm", **{"True": "rms", "False": "layer"}),
    "fused_add_norm": no_effect(True, False),
    "residual_in_fp32": no_effect(True, False),
    "final_pool_type": choice("head_pool", mean="mean", none="last", max="max", all="all"),
    "if_abs_pos_embed": field("pos_embed"),
    "scanpath_type": choice("token_order", rowwise="row", colwise="column"),
    "out_indices": lambda v: {"out_indices": tuple(v)},
}

FASTVIM = {**MAMBA_MODEL, "rotate_every_block": lambda v: {"rotate": bool(v)}}
VIM = {
    **MAMBA_MODEL,
    "if_cls_token": lambda v: {"if_cls_token": bool(v)},
    "use_middle_cls_token": lambda v: {"middle": bool(v)},
}
del VIM["collapse_method"], VIM["scaling_factor"]

MASKED: dict[str, Callable[[Any], Fields]] = {
    "decoder_embed_dim": field("decoder_dim"),
    "decoder_depth": field("decoder_depth"),
    "decoder_num_heads": field("decoder_heads"),
    "norm_pix_loss": field("norm_pix_loss"),
    "norm_layer": no_effect(),
}

CHANNEL_MODEL: dict[str, Callable[[Any], Fields]] = {
    "scan_order": choice("scan_order", **{"Channel-First": "channel", "Spatial-First": "spatial"}),
    # Which channels a training step keeps is an input here: the fixture's draw.
    "hcs": no_effect(True, False),
    "sort_channels": no_effect(True, False),
}

FASTVIM_MIXER: dict[str, Callable[[Any], Fields]] = {
    **MIXER,
    **SSM,
    "d_model": field("embed_dim"),
    "layer_idx": no_effect(*range(100)),
    "token_size": lambda v: {"grid": tuple(v)},
}

VIT: dict[str, Callable[[Any], Fields]] = {
    "img_size": size,
    "patch_size": field("patch_size"),
    "in_chans": field("channels"),
    "num_classes": field("num_classes"),
    "embed_dim": field("embed_dim"),
    "depth": field("depth"),
    "num_heads": field("num_heads"),
    "mlp_ratio": field("mlp_ratio"),
    "qkv_bias": field("qkv_bias"),
    "drop_path_rate": field("drop_path"),
    "drop_rate": no_effect(0.0),
    "attn_drop_rate": no_effect(0.0),
    "global_pool": choice("head_pool", **{"True": "mean", "False": "token"}),
}


def translate(kwargs: dict[str, Any], table: dict[str, Callable[[Any], Fields]]) -> Fields:
    """Translate every argument through the table; raise `UnknownArgumentError` for one that has no entry."""
    fields: Fields = {}
    for name, value in kwargs.items():
        if name not in table:
            raise UnknownArgumentError(
                f"argument {name!r} of the authors' constructor has no entry in arguments.py"
            )
        try:
            fields |= table[name](value)
        except UnknownArgumentError as error:
            raise UnknownArgumentError(f"argument {name!r}: {error}") from None
    return fields


def fastvim_fields(kwargs: dict[str, Any]) -> Fields:
    """Return FastVim's arguments as fields of `VisionMambaConfig`.

    The reference pools over the second axis of the grid as it is flattened, "columns" in either token order; turning
    every other block alternates between the two axes.
    """
    fields = {"pooling": "mean", **translate(kwargs, FASTVIM)}
    return square_stride(
        {"pool_axes": "alternate" if fields.pop("rotate", True) else "columns", **fields}
    )


def vim_fields(kwargs: dict[str, Any], *, class_token: bool) -> Fields:
    """Return Vim's arguments; `class_token` is what the constructor does unless told."""
    fields = {"pooling": "none", **translate(kwargs, VIM)}
    middle = fields.pop("middle", True)
    token = fields.pop("if_cls_token", class_token)
    return square_stride(
        {"class_token": ("middle" if middle else "head") if token else "none", **fields}
    )


def square_stride(fields: Fields) -> Fields:
    """Return the stride of square patches, which neither overlap nor leave gaps in the covered models."""
    stride = fields.pop("stride", None)
    if stride not in (None, fields["patch_size"]):
        raise UnknownArgumentError(
            f"argument 'stride': {stride} differs from the patch size {fields['patch_size']}"
        )
    return fields


def fast_channel_vim_fields(kwargs: dict[str, Any], *, two_axes: bool) -> Fields:
    """Return FastChannelVim's arguments. `two_axes`: the class that pools over two axes in a cycle of three blocks."""
    fields = {"pooling": "mean", **translate(kwargs, FASTVIM | CHANNEL_MODEL)}
    rotate = fields.pop("rotate", True)
    if two_axes and not rotate:
        raise UnknownArgumentError("argument 'rotate_every_block': False with two pooled axes")
    axes = "two_axes" if two_axes else "alternate" if rotate else "columns"
    return {"pool_axes": axes, "scan_order": "channel", **fields}


def channel_vim_fields(kwargs: dict[str, Any]) -> Fields:
    """Return ChannelVim's arguments; the class token stands in the middle unless told otherwise."""
    fields = {"pooling": "none", "scan_order": "channel", **translate(kwargs, VIM | CHANNEL_MODEL)}
    middle, token = fields.pop("middle", True), fields.pop("if_cls_token", True)
    return {"class_token": ("middle" if middle else "head") if token else "none", **fields}


def channel_embed_fields(kwargs: dict[str, Any]) -> Fields:
    """Return the patch embedding alone, as a model's fields."""
    return translate(kwargs, MAMBA_MODEL | CHANNEL_MODEL)


def vit_fields(kwargs: dict[str, Any]) -> Fields:
    """Return the ViT's arguments as fields of `ViTConfig`; without a class count it has no head."""
    return {"num_classes": 0, "head_pool": "token", **translate(kwargs, VIT)}


def mixer_fields(kwargs: dict[str, Any]) -> Fields:
    """Return one FastVim mixer's arguments, with its token grid under `grid`."""
    return {"pooling": "mean", **translate(kwargs, FASTVIM_MIXER)}


def model_fields(kind: str, kwargs: dict[str, Any]) -> Fields:
    """Return the config fields of any covered model class."""
    if kind == "ViT":
        return vit_fields(kwargs)
    if kind in ("FastVim", "FastVimTrainSteps"):
        return fastvim_fields(kwargs)
    if kind == "FastVimBackbone":
        return backbone(fastvim_fields(kwargs))
    if kind in ("FastChannelVim", "FastChannelVim2DCompress"):
        return fast_channel_vim_fields(kwargs, two_axes=kind.endswith("2DCompress"))
    if kind == "ChannelVim":
        return channel_vim_fields(kwargs)
    if kind == "ChannelPatchEmbed":
        return channel_embed_fields(kwargs)
    if kind in ("ChannelViT", "HCSChannelViT"):
        fields = vit_fields(kwargs)
        del fields["head_pool"]  # Only the class token is read.
        return fields
    if kind == "Vim":
        return vim_fields(kwargs, class_token=True)
    if kind == "VimBackbone":
        return backbone(vim_fields(kwargs, class_token=False))
    raise KeyError(kind)


def masked_fields(kind: str, kwargs: dict[str, Any]) -> tuple[Fields, Fields]:
    """Return a masked autoencoder's arguments: its encoder's config fields, and its own (with `norm_pix_loss`)."""
    own = translate({k: v for k, v in kwargs.items() if k in MASKED}, MASKED)
    rest = {k: v for k, v in kwargs.items() if k not in MASKED}
    if kind == "ViTMAE":
        encoder = vit_fields(rest)
    elif kind == "VimMAE":
        encoder = vim_fields(rest, class_token=True)
    else:
        encoder = fastvim_fields(rest)
    # Fixtures are made in evaluation mode, in which nothing is dropped.
    return encoder | {"num_classes": 0, "drop_path": 0.0}, {"norm_pix_loss": False, **own}


def backbone(fields: Fields) -> Fields:
    """Leave out the classifier: a dense-feature backbone has none, whatever class count its constructor was given."""
    if not fields.get("out_indices"):
        raise UnknownArgumentError("a backbone without out_indices")
    return {**fields, "num_classes": 0}

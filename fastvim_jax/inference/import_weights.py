"""Turn a PyTorch or safetensors checkpoint into a folder of `save_pretrained`, with every entry accounted for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from fastvim_jax.data.cells_channels import CHANNEL_ORDER
from fastvim_jax.data.cells_config import JUMP_CP_MEAN, JUMP_CP_STD
from fastvim_jax.data.sources.class_lists import read_class_list
from fastvim_jax.errors import UserError, counted
from fastvim_jax.inference.next_command import next_command
from fastvim_jax.interop import from_torch_state_dict, read_weights_file, recognise
from fastvim_jax.interop.recognise import assumptions, table_side
from fastvim_jax.json_text import parse_json
from fastvim_jax.models import build_model, model_config
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.models.config import VisionMambaConfig, ViTConfig, replace_options
from fastvim_jax.models.mae_config import MaskedAutoencoderConfig, replace_masked_options
from fastvim_jax.models.model_card import LICENCE
from fastvim_jax.models.pretrained import require_room
from fastvim_jax.models.saving import Preprocessing, default_preprocessing, save_pretrained
from fastvim_jax.training.start_from import Report, load_source
from fastvim_jax.training.weights_source import Source, source_arrays

AUTHORS_LICENCE = "CC BY-NC-SA 4.0"
"""Licence of the weights that the FastVim authors release."""

# What may be changed while weights are imported; other fields say what the weights are.
_CHANGES = ("image_size", "num_classes")


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        folder: where it lies now.
        model: class, width and depth of the model, for people.
        report: what became of every weight.
        notes: one line for each change of entries that the table does not name.
        ignored: entries of the file that are no weights.
        assumed: fields of the config that neither the file nor an option tells, with the values taken.
        named: the model's name that these values are taken from; None if they are the usual ones of such weights.
        preprocessing: how images become the model's input, which the file does not tell either.
        unnamed: number of classes that predictions will show as numbers, because nothing names them.
        licence: licence that the model card names; empty if it names none.
        next_command: the command line that uses such a model.
    """

    folder: Path
    model: str
    report: Report
    notes: tuple[str, ...]
    ignored: tuple[str, ...]
    assumed: dict[str, Any]
    named: str | None
    preprocessing: Preprocessing
    unnamed: int
    licence: str
    next_command: str

    def in_words(self) -> str:
        """Write the model, the table of weights, the entries that were not read, and the assumptions."""
        lines = [self.model, self.report.in_words()]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  not read: {entry}" for entry in self.ignored]
        values = ", ".join(f"{name}={value}" for name, value in self.assumed.items())
        if values:
            taken = f"taken from {self.named}" if self.named else "taken as usual"
            lines.append(
                f"Names and shapes do not tell: {values} ({taken}; change it by --option NAME=VALUE)."
            )
        if "pool_scale" in self.assumed:
            lines.append(
                "  After masked pre-training, FastVim is fine-tuned with --option pool_scale=0.25 "
                "(1 - mask ratio)."
            )
        mean, std = (
            ", ".join(f"{value:.4g}" for value in values)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        lines.append(f"Pixels from 0 to 1 are normalised by mean {mean} and deviation {std}.")
        if self.unnamed:
            lines.append(
                f"The {counted(self.unnamed, 'class has', 'classes have')} no names, so predictions show numbers: "
                "--classes FILE names them."
            )
        return "\n".join(lines)


def import_weights(
    file: Path | str,
    folder: Path | str,
    *,
    name: str | None = None,
    entry: str | None = None,
    options: Mapping[str, Any] | None = None,
    classes: Path | str | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    seed: int = 0,
    licence: str = "",
    overwrite: bool = False,
) -> Imported:
    """Import the weights of a file under the authors', the original Vim's or timm's names.

    Args:
        file: see `interop.read_weights_file`.
        folder: to write, see `models.saving.save_pretrained`.
        name: of the model; None: recognised from names and shapes.
        entry: of a checkpoint, the part that holds the weights.
        options: fields of the model's config. `image_size` resamples the position embeddings, `num_classes` draws a
            new head; other fields say what the weights are.
        classes: a file of class names, as `data.sources.class_lists.read_class_list` takes it.
        mean: of each channel, for pixels from 0 to 1; by default ImageNet's for three channels, JUMP-CP's for the
            eight of cell images, else 0.
        std: of each channel, likewise.
        seed: seed of parameters that are drawn at random.
        licence: of the weights, for the model card. By default that of the FastVim authors' weights if the model is
            one that only they trained, else none is named.
        overwrite: replace a saved model that `folder` holds.

    Raises:
        UserError: the file cannot be read, is of no known model or of another one than named; every entry that fits
            nowhere is listed. The folder holds other files, or a saved model that may not be replaced.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} must be at least 0 and less than 2**63.")
    require_room(Path(folder), overwrite=overwrite)
    options = dict(options or {})
    found = read_weights_file(file, place=entry)
    changes = {field: options.pop(field) for field in _CHANGES if field in options}
    if "image_size" in changes and "pos_embed" in found.arrays and table_side(found.arrays) is None:
        options["image_size"] = changes.pop(
            "image_size"
        )  # What the table is for, which is no square.
    config: Any
    if name is None:
        config = recognise(found.arrays, **options)
    else:
        head = found.arrays.get("head.weight")
        if not isinstance(model_config(name), MaskedAutoencoderConfig):
            options = {"num_classes": 0 if head is None else len(head), **options}
        config = model_config(name, **options)
    masked = isinstance(config, MaskedAutoencoderConfig)
    if masked and changes.get("num_classes"):
        raise UserError(
            f"{file} holds a masked autoencoder, which has no classes: import it without num_classes, and fine-tune it "
            f"by `fastvim train ... --init {folder}`."
        )
    whole = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    from_torch_state_dict(whole, found.arrays)
    changed = (replace_masked_options if masked else replace_options)(config, **changes)
    model = build_model(changed, rngs=nnx.Rngs(seed))
    place = f"{file} ({found.place})" if found.place else str(file)
    report = load_source(model, Source(place, source_arrays(whole), config))
    preprocessing = _preprocessing(changed, mean, std)
    class_names = read_class_list(Path(classes)).names if classes is not None else ()
    licence = licence or _usual_licence(config)
    save_pretrained(
        model,
        folder,
        preprocessing=preprocessing,
        class_names=class_names,
        card={"Source": f"Imported from {Path(file).name}."}
        | ({LICENCE: licence} if licence else {}),
    )
    how = "named" if name is not None else "recognised from names and shapes"
    assumed = {f: value for f, value in assumptions(changed).items() if f not in options}
    words = f"{_in_words(config)} ({how})"
    uses = next_command(folder, changed)
    unnamed = changed.num_classes if uses.startswith("predict") and not class_names else 0
    return Imported(
        Path(folder), words, report, found.notes, found.ignored, assumed, name, preprocessing, unnamed, licence, uses
    )  # fmt: skip


def _usual_licence(config: Any) -> str:
    """Return the authors' licence for a model that only they released weights of: FastVim, masked or of cell images."""
    inner = config.encoder if isinstance(config, MaskedAutoencoderConfig) else config
    if isinstance(inner, ViTConfig | ChannelViTConfig):
        return ""
    plain_vim = config is inner and type(inner) is VisionMambaConfig and inner.pooling == "none"
    return "" if plain_vim else AUTHORS_LICENCE


def _in_words(config: Any) -> str:
    if isinstance(config, MaskedAutoencoderConfig):
        decoder = f"decoder {config.decoder_dim} wide, {counted(config.decoder_depth, 'block')}"
        return f"Masked autoencoder: encoder {_in_words(config.encoder)}; {decoder}"
    kind = type(config).__name__.removesuffix("Config")
    return f"{kind}, {config.embed_dim} wide, {counted(config.depth, 'block')}"


def _preprocessing(config: Any, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
    """Return the model's preprocessing: the authors', where the caller names no mean and deviation."""
    cells = isinstance(config, ChannelMambaConfig | ChannelViTConfig)
    if cells and config.channels == len(CHANNEL_ORDER):
        found = Preprocessing(
            tuple(config.image_size), 1.0, JUMP_CP_MEAN, JUMP_CP_STD, tuple(CHANNEL_ORDER)
        )
    else:
        found = default_preprocessing(config)
    given = {"mean": tuple(mean) or found.mean, "std": tuple(std) or found.std}
    for field, values in given.items():
        if len(values) != config.channels:
            raise UserError(
                f"{field}={values}: the model has {counted(config.channels, 'channel')}."
            )
        if not all(map(math.isfinite, values)):
            raise UserError(f"{field}={values} must be finite numbers.")
    if min(given["std"]) <= 0:
        raise UserError(f"std={given['std']}: deviations are above 0.")
    return dataclasses.replace(found, mean=given["mean"], std=given["std"])


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Read `NAME=VALUE`; a value is JSON where it can be read as such, and a string otherwise.

    Raises:
        UserError: a text without `=`.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--option {text}: write NAME=VALUE, for example pooling=max.")
        try:
            read = parse_json(value)
            options[name.replace("-", "_")] = tuple(read) if isinstance(read, list) else read
        except ValueError:
            options[name.replace("-", "_")] = value
    return options

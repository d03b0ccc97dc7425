"""Turn a PyTorch or safetensors checkpoint into a folder of `save_pretrained`, with every entry accounted for."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from fastvim_jax.errors import UserError
from fastvim_jax.interop import from_torch_state_dict, read_weights_file, recognise
from fastvim_jax.models import build_model, model_config
from fastvim_jax.models.config import replace_options
from fastvim_jax.models.pretrained import save_pretrained
from fastvim_jax.training.start_from import Report, load_weights

# What may be changed while weights are imported; other fields say what the weights are.
_CHANGES = ("image_size", "num_classes")


@dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        folder: where it lies now.
        model: class, width and depth of the model, for people.
        report: what became of every weight.
        ignored: entries of the file that are no weights.
    """

    folder: Path
    model: str
    report: Report
    ignored: tuple[str, ...]

    def in_words(self) -> str:
        """Write the model, the table of weights and the entries that were not read."""
        lines = [self.model, self.report.in_words()]
        lines += [f"  not read: {entry}" for entry in self.ignored]
        return "\n".join(lines)


def import_weights(
    file: Path | str,
    folder: Path | str,
    *,
    name: str | None = None,
    entry: str | None = None,
    options: Mapping[str, Any] | None = None,
    classes: Path | str | None = None,
    seed: int = 0,
) -> Imported:
    """Import the weights of a file under the authors', the original Vim's or timm's names.

    Args:
        file: see `interop.read_weights_file`.
        folder: to write, see `models.pretrained.save_pretrained`.
        name: of the model; None: recognised from names and shapes.
        entry: of a checkpoint, the part that holds the weights.
        options: fields of the model's config. `image_size` resamples the position embeddings, `num_classes` draws a
            new head; other fields say what the weights are.
        classes: a text file of class names, one a line.
        seed: of what is drawn at random.

    Raises:
        UserError: the file cannot be read, is of no known model or of another one than named; every entry that fits
            nowhere is listed.
    """
    options = dict(options or {})
    changes = {field: options.pop(field) for field in _CHANGES if field in options}
    found = read_weights_file(file, place=entry)
    recognised = None if name is not None else recognise(found.arrays, **options)
    config: Any = recognised
    if name is not None:
        head = found.arrays.get("head.weight")
        config = model_config(name, num_classes=0 if head is None else len(head), **options)
    whole = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    from_torch_state_dict(whole, found.arrays)
    model = build_model(replace_options(config, **changes), rngs=nnx.Rngs(seed))
    with tempfile.TemporaryDirectory() as scratch:
        report = load_weights(model, save_pretrained(whole, scratch))
    place = f"{file} ({found.place})" if found.place else str(file)
    save_pretrained(
        model,
        folder,
        class_names=_class_names(classes),
        card={
            "Source": f"Imported from {Path(file).name}.",
            "Licence": "That of the file's makers.",
        },
    )
    how = "named" if name is not None else "recognised from names and shapes"
    kind = type(config).__name__.removesuffix("Config")
    words = f"{kind}, {config.embed_dim} wide, {config.depth} blocks ({how})"
    return Imported(Path(folder), words, dataclasses.replace(report, source=place), found.ignored)


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
            options[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            options[name.replace("-", "_")] = value
    return options


def _class_names(path: Path | str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class names in {path}: {error}") from error
    return tuple(line.strip() for line in lines if line.strip())

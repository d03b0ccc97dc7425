"""Read weights to start from: a run, a saved model, one of the hub, a safetensors file or a PyTorch checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from fastvim_jax.errors import UserError
from fastvim_jax.interop import from_torch_state_dict, read_weights_file, recognise
from fastvim_jax.models import build_model
from fastvim_jax.models.mae import MaskedAutoencoder, backbone_parameters
from fastvim_jax.models.parameters import named_parameters
from fastvim_jax.models.pretrained import HUB, is_pretrained, load_pretrained, refuse_choice
from fastvim_jax.training.run_folder import CONFIG_FILE, load_run


@dataclass(frozen=True)
class Source:
    """Weights to start from.

    Attributes:
        name: description of the weights, for messages.
        arrays: unstacked parameters and running statistics, under this library's names.
        config: the model's config, or None if it is not known.
        class_names: names of the model's classes, if known.
        data: a config with `mean` and `std`, by which the model's images were normalised, if known.
    """

    name: str
    arrays: dict[str, np.ndarray]
    config: Any = None
    class_names: tuple[str, ...] = ()
    data: Any = None


def read_source(
    source: Path | str, *, weights: str | None = None, step: int | None = None
) -> Source:
    """Read weights from a run folder, a saved model or a file.

    Args:
        source: a run folder; a folder of `save_pretrained`, or `hf://owner/name` on the Hugging Face hub; a
            `.safetensors` or PyTorch file under the authors', timm's or this library's names.
        weights: for a run folder, `raw` or `ema`; None: what `load_run` takes.
        step: for a run folder, the checkpoint's step; by default the latest.

    Raises:
        UserError: the folder or file does not exist or is damaged, or the weights belong to no known model.
    """
    path = Path(source).expanduser()
    if is_pretrained(source):
        refuse_choice(source, weights, step)
        found = load_pretrained(source)
        config = getattr(found.model, "config", None)
        return Source(
            str(source), source_arrays(found.model), config, found.class_names, found.preprocessing
        )
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise UserError(
                f"{path} is no run folder: it has no {CONFIG_FILE}. Name a folder that training or save_pretrained "
                "wrote, or a weights file (.safetensors, .pth)."
            )
        run = load_run(path, weights=weights, step=step)
        config, arrays = run.config.model, source_arrays(run.model)
        name = f"{path} (step {run.step}, {run.weights} weights)"
        return Source(name, arrays, config, run.class_names, run.config.data)
    if not path.is_file():
        raise UserError(
            f"there is no run folder, saved model or weights file {path}; models of the hub are called "
            f"{HUB}owner/name."
        )
    refuse_choice(path, weights, step)
    file = read_weights_file(path)
    name = f"{path} ({file.place})" if file.place else str(path)
    if any(each.endswith(".kernel") for each in file.arrays):
        return Source(name, file.arrays)
    config = recognise(file.arrays)
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    from_torch_state_dict(model, file.arrays)
    return Source(name, source_arrays(model), config)


def source_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return a model's unstacked parameters. For a masked autoencoder, add its encoder's fixed position table."""
    if isinstance(model, MaskedAutoencoder):
        # A classifier that starts from these weights learns position embeddings, beginning with the fixed table.
        whole = named_parameters(jax.tree.map(np.asarray, nnx.state(model)))
        table = backbone_parameters(model)["pos_embed"]
        return {"encoder.pos_embed": np.asarray(table), **whole}
    return named_parameters(jax.tree.map(np.asarray, nnx.state(model)))

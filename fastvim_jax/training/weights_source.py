"""Read weights to start from: a run folder, a safetensors file or a PyTorch checkpoint."""

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
from fastvim_jax.models.parameters import named_parameters
from fastvim_jax.training.run_folder import CONFIG_FILE, load_run


@dataclass(frozen=True)
class Source:
    """Weights to start from.

    Attributes:
        name: what they are, for people.
        arrays: unstacked parameters, and running statistics, under this library's names.
        config: the model's config, or None if it is not known.
        class_names: names of its classes, if known.
        data: the config of the data it was trained on, if known.
    """

    name: str
    arrays: dict[str, np.ndarray]
    config: Any = None
    class_names: tuple[str, ...] = ()
    data: Any = None


def read_source(
    source: Path | str, *, weights: str | None = None, step: int | None = None
) -> Source:
    """Read weights from a run folder or a file.

    Args:
        source: a run folder, or a `.safetensors` or PyTorch file under the authors', timm's or this library's names.
        weights: of a run folder, `raw` or `ema`; None: the average if the run kept one.
        step: of a run folder, which checkpoint; by default the latest.

    Raises:
        UserError: no such folder or file; a damaged one; weights of no model that is known here.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise UserError(
                f"{path} is no run folder: it has no {CONFIG_FILE}. Name a folder that training wrote, or a weights "
                "file (.safetensors, .pth)."
            )
        run = load_run(path, weights=weights, step=step)
        config, arrays = run.config.model, _arrays(run.model)
        name = f"{path} (step {run.step}, {run.weights} weights)"
        return Source(name, arrays, config, run.class_names, run.config.data)
    if not path.is_file():
        raise UserError(f"there is no run folder or weights file {path}.")
    if weights is not None or step is not None:
        raise UserError(f"{path} is a file: weights and step are of a run folder.")
    found = read_weights_file(path)
    name = f"{path} ({found.place})" if found.place else str(path)
    if any(each.endswith(".kernel") for each in found.arrays):
        return Source(name, found.arrays)
    config = recognise(found.arrays)
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    from_torch_state_dict(model, found.arrays)
    return Source(name, _arrays(model), config)


def _arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    if hasattr(model, "backbone_parameters"):
        return {name: np.asarray(value) for name, value in model.backbone_parameters().items()}
    return named_parameters(jax.tree.map(np.asarray, nnx.state(model)))

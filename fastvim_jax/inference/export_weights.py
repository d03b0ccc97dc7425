"""Write weights for other programs: as a folder of `save_pretrained`, or as one file with the authors' names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from fastvim_jax.errors import UserError, counted
from fastvim_jax.inference.preprocessing import preprocessing_of
from fastvim_jax.interop import to_torch_state_dict
from fastvim_jax.models.model_card import LICENCE
from fastvim_jax.models.pretrained import (
    is_pretrained,
    load_pretrained,
    refuse_choice,
    require_room,
)
from fastvim_jax.models.safetensors_file import write_safetensors
from fastvim_jax.models.saving import save_pretrained
from fastvim_jax.training.choice import headline_of
from fastvim_jax.training.metrics import read_metrics
from fastvim_jax.training.run_folder import Run, load_run
from fastvim_jax.whole_file import whole_file

TORCH = (".pth", ".pt", ".ckpt")
Target = Literal["folder", "torch"]


def export_weights(
    source: Path | str,
    out: Path | str,
    *,
    to: Target = "folder",
    weights: str | None = None,
    step: int | Literal["best"] | None = None,
    dtype: str = "float32",
    licence: str = "",
    overwrite: bool = False,
) -> Path:
    """Write the weights of a run or a saved model.

    Args:
        source: a run folder, a folder of `save_pretrained`, or `hf://owner/name`.
        out: the folder to write; with to="torch", the file to write, which ends in .safetensors, .pth, .pt or .ckpt
            (the last three need PyTorch).
        to: "folder": safetensors under this library's names, config and model card, which other commands take.
            "torch": one file with the names and layouts of the authors' PyTorch code.
        weights: for a run, `raw` or `ema`; None: what `load_run` takes.
        step: for a run, the checkpoint's step or `best`; by default the latest.
        dtype: "float32", or "bfloat16" for half as many bytes.
        licence: licence of the weights, for the model card; of a saved model, by default the one that its card names.
        overwrite: replace a saved model that `out` holds.

    Raises:
        UserError: there is no such source; `out` has another ending, or holds other files or a saved model that may
            not be replaced; a licence is given for a file, which has no card; PyTorch is missing.
    """
    out = Path(out)
    if to == "torch" and out.suffix not in (".safetensors", *TORCH):
        raise UserError(f"{out}: name a file that ends in .safetensors or {', '.join(TORCH)}.")
    if to == "torch" and licence:
        raise UserError("a file for PyTorch has no model card that could name the licence.")
    if to == "folder":
        require_room(out, overwrite=overwrite)
    if is_pretrained(source):
        refuse_choice(source, weights, step)
        found = load_pretrained(source)
        model, preprocessing, classes = found.model, found.preprocessing, found.class_names
        card = {"Source": f"Copied from {Path(source).name}."}
        licence = licence or found.licence
    else:
        run = load_run(source, weights=weights, step=step)
        model, preprocessing, classes = run.model, preprocessing_of(run), run.class_names
        card = card_of(run, source)
    if licence:
        card[LICENCE] = licence
    if to == "folder":
        return save_pretrained(
            model, out, preprocessing=preprocessing, class_names=classes, card=card, dtype=dtype
        )
    write_torch_file(model, out, dtype=dtype)
    return out


def write_torch_file(model: nnx.Module, out: Path, *, dtype: str = "float32") -> None:
    """Write a model's weights under the authors' names. A .pth file holds them in `state_dict`.

    Raises:
        UserError: `dtype` is another one; there is no table of names for the model; PyTorch is missing; `out`
            cannot be written, and an earlier file is as it was.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r}: weights are saved as float32 or bfloat16.")
    arrays = {
        name: np.ascontiguousarray(array).astype(jax.dtypes.canonicalize_dtype(dtype))
        for name, array in to_torch_state_dict(model).items()
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}.") from error
    if out.suffix == ".safetensors":
        return write_safetensors(arrays, out, format="pt")
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{out} needs PyTorch: pip install 'fastvim-jax[torch]', or write a .safetensors file, which holds the "
            "same names."
        ) from None
    tensors = {
        name: torch.from_numpy(array.astype(np.float32)).to(getattr(torch, dtype))
        for name, array in arrays.items()
    }
    with whole_file(out, RuntimeError) as partial:
        torch.save({"state_dict": tensors}, partial)


def card_of(run: Run, folder: Path | str) -> dict[str, str]:
    """Return the sections of a run's model card, text by heading: its data, its training and its results."""
    config: Any = run.config
    data = config.data
    where = f" in a folder {Path(data.path).name}" if data.path else ""
    card = {
        "Data": f"{data.source}{where}: trained on {data.train_split}, evaluated on {data.eval_split}.",
        "Training": f"{type(config).__name__} of {counted(config.epochs, 'epoch')}; step {run.step}, "
        f"{'averaged' if run.weights == 'ema' else 'trained'} weights.",
    }
    results = _results(run, folder)
    return card | ({"Results": results} if results else {})


def _results(run: Run, folder: Path | str) -> str:
    headline = headline_of(run.config)
    at_step: list[Mapping[str, Any]] = [
        record for record in read_metrics(folder, "eval") if record["step"] == run.step
    ]
    return headline.in_words(at_step[-1]) if headline is not None and at_step else ""

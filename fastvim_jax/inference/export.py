"""Export a trained classifier to one file that runs with JAX and NumPy alone.

The file is an uncompressed `.npz` without pickles. It holds the program as `jax.export` serialises it, the weights as
arrays, and a JSON text about them: preprocessing constants, class names, versions and a checksum. The program takes
uint8 images, normalises them, and returns logits. docs/inference.md has the ten lines that load it.

A portable program takes any batch size and runs on CPUs and CUDA devices through XLA. A fast program holds the Mosaic
GPU kernels; it runs on Hopper GPUs only, with the one batch size that it was exported for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export
from jaxtyping import Array

from fastvim_jax.data.labelled import make_preprocess
from fastvim_jax.errors import UserError, counted
from fastvim_jax.inference.preprocessing import photographs_data
from fastvim_jax.models import build_model
from fastvim_jax.models.pretrained import Pretrained
from fastvim_jax.training.classification.config import TrainConfig
from fastvim_jax.training.run_folder import Run
from fastvim_jax.version import __version__
from fastvim_jax.whole_file import whole_file
from pallas_kernels import gpu

FORMAT = 1
PLATFORMS = ("cpu", "cuda")


def export_classifier(
    source: Run | Pretrained, file: Path | str, *, fast: bool = False, batch: int | None = None
) -> dict[str, Any]:
    """Write the program of a trained classifier, its weights, and a description of both.

    Args:
        source: a trained classifier, from `load_run` or `load_pretrained`.
        file: the `.npz` file to write.
        fast: use the GPU kernels; otherwise the program is portable.
        batch: images per call. None allows any number from 1 on; only a portable program can do that.

    Returns:
        The description (the file's entry `about`).

    Raises:
        UserError: the model is not a classifier; the file cannot be written; or the program is to be fast, and `batch`
            is None or no kernel runs this model.
    """
    data = _data_of(source)
    model: Any = source.model
    file = Path(file)
    if file.suffix != ".npz":
        raise UserError(f"{file}: name a file that ends in .npz.")
    if not file.parent.is_dir():
        raise UserError(f"{file}: there is no folder {file.parent}.")
    if batch is not None and not 1 <= batch < 2**31:
        raise UserError(f"batch={batch} must be at least 1 and less than {2**31}.")
    if fast and batch is None:
        raise UserError("a fast program takes one batch size: give it, for example batch=64.")
    weights, structure = jax.tree.flatten(nnx.state(model))
    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: build_model(_config(model.config, fast), rngs=nnx.Rngs(0)))
    )
    preprocess = make_preprocess(data)

    def classify(weights: list[Array], images: Array) -> Array:
        model = nnx.merge(graphdef, jax.tree.unflatten(structure, weights))
        logits = model(preprocess(images))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    size = export.symbolic_shape("batch")[0] if batch is None else batch
    shapes = (
        [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights],
        jax.ShapeDtypeStruct((size, *data.height_width, data.channels), np.uint8),
    )
    platforms = ("cuda",) if fast else PLATFORMS
    if fast and (missing := gpu.kernels_missing()) is not None:
        raise UserError(
            f"a fast program can only be exported on a machine that runs it: {missing}."
        )
    with contextlib.nullcontext() if fast else gpu.kernels_off():
        program = export.export(jax.jit(classify), platforms=platforms)(*shapes)
    if fast and "mosaic_gpu" not in program.mlir_module():
        raise UserError("no GPU kernel runs this model: export it without fast.")
    serialised = bytes(program.serialize())
    arrays = [np.asarray(w) for w in weights]
    about = {
        "format": FORMAT,
        "weights": len(arrays),
        "sha256": _checksum(serialised, arrays),
        "platforms": platforms,
        "batch": batch,
        "image": [*data.height_width, data.channels],
        "preprocess": {
            "image_size": data.height_width,
            "crop": getattr(data, "eval_crop", None),  # None: cut at the centre, not resized.
            "mean": data.mean,
            "std": data.std,
            "note": "The program takes uint8 pixels, resized and cropped, and normalises them itself.",
        },
        "classes": source.class_names or [str(i) for i in range(model.config.num_classes)],
        "step": source.step if isinstance(source, Run) else None,
        "averaged": source.weights == "ema" if isinstance(source, Run) else None,
        "versions": {"fastvim-jax": __version__, "jax": jax.__version__},
        "calling_convention": program.calling_convention_version,
    }
    entries: dict[str, Any] = {f"weight_{i}": array for i, array in enumerate(arrays)}
    entries["about"] = np.array(json.dumps(about, ensure_ascii=False))
    entries["program"] = np.frombuffer(serialised, np.uint8)
    with whole_file(file) as partial, partial.open("wb") as out:
        np.savez(out, **entries)
    return about


def _data_of(source: Run | Pretrained) -> Any:
    """Return the data config that says how images become the input of a classifier."""
    if isinstance(source, Run):
        if not isinstance(source.config, TrainConfig):
            raise UserError(
                f"export takes classifiers, not runs of a {type(source.config).__name__}."
            )
        return source.config.data
    config: Any = source.model.config  # type: ignore[attr-defined]
    maps = getattr(config, "out_indices", ()) or getattr(config, "head_pool", "") == "all"
    if maps:
        raise UserError("export takes classifiers of whole images, not models of feature maps.")
    if not getattr(config, "num_classes", 0) or config.channels not in (1, 3):
        raise UserError(
            f"export takes classifiers of photographs, not a {type(source.model).__name__} with "
            f"{counted(getattr(config, 'num_classes', 0), 'class', 'classes')} and "
            f"{counted(config.channels, 'channel')}."
        )
    return photographs_data(source.preprocessing, config.channels)


def _config(model: Any, fast: bool) -> Any:
    """Choose the implementation: kernels where they run, or XLA, which every platform has."""
    if not hasattr(model, "scan_implementation"):
        return model
    return dataclasses.replace(model, scan_implementation="auto" if fast else "xla")


def _checksum(program: bytes, arrays: list[np.ndarray]) -> str:
    digest = hashlib.sha256(program)
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()

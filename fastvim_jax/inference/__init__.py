"""Use a finished run: classify images, predict files, export programs, import weights, draw reports."""

from fastvim_jax.inference.classifier import Classifier, Result
from fastvim_jax.inference.export import export_classifier
from fastvim_jax.inference.import_weights import import_weights
from fastvim_jax.inference.predict import Prediction, predict_batches, predict_files

__all__ = [
    "Classifier",
    "Prediction",
    "Result",
    "export_classifier",
    "import_weights",
    "predict_batches",
    "predict_files",
]

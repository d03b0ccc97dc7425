"""Using a finished run: predictions of image files and batches, and a report with pictures."""

from fastvim_jax.inference.predict import Prediction, predict_batches, predict_files

__all__ = ["Prediction", "predict_batches", "predict_files"]

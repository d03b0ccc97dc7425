"""Training, evaluation and run folders. The trainers read top to bottom; what they share is in small modules here."""

from fastvim_jax.training.checkpoints import CheckpointError, Checkpoints
from fastvim_jax.training.config import OptimizerConfig, TrainConfig
from fastvim_jax.training.evaluation import evaluate
from fastvim_jax.training.experiments import experiment_docs, list_experiments, load_experiment
from fastvim_jax.training.health import NonFiniteError
from fastvim_jax.training.metrics import read_metrics
from fastvim_jax.training.profiling import ProfileSteps
from fastvim_jax.training.run_folder import Run, load_run
from fastvim_jax.training.stopping import STOPPED_STATUS, Stopped
from fastvim_jax.training.supervised import RunResult, train

__all__ = [
    "STOPPED_STATUS",
    "CheckpointError",
    "Checkpoints",
    "NonFiniteError",
    "OptimizerConfig",
    "ProfileSteps",
    "Run",
    "RunResult",
    "Stopped",
    "TrainConfig",
    "evaluate",
    "experiment_docs",
    "list_experiments",
    "load_experiment",
    "load_run",
    "read_metrics",
    "train",
]

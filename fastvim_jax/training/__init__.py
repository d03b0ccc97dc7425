"""Training, evaluation and run folders.

A folder here is a task, whose `train.py` reads top to bottom; a file is shared by all tasks and knows none of them.
"""

from fastvim_jax.training.checkpoints import CheckpointError, Checkpoints
from fastvim_jax.training.classification.config import TrainConfig
from fastvim_jax.training.classification.evaluation import evaluate
from fastvim_jax.training.config import OptimizerConfig, RunConfig
from fastvim_jax.training.experiments import experiment_docs, list_experiments, load_experiment
from fastvim_jax.training.health import NonFiniteError
from fastvim_jax.training.metrics import read_metrics
from fastvim_jax.training.profiling import ProfileSteps
from fastvim_jax.training.run_folder import Run, load_run
from fastvim_jax.training.runs import RunResult, train
from fastvim_jax.training.start_from import load_weights
from fastvim_jax.training.stopping import STOPPED_STATUS, Stopped

__all__ = [
    "STOPPED_STATUS",
    "CheckpointError",
    "Checkpoints",
    "NonFiniteError",
    "OptimizerConfig",
    "ProfileSteps",
    "Run",
    "RunConfig",
    "RunResult",
    "Stopped",
    "TrainConfig",
    "evaluate",
    "experiment_docs",
    "list_experiments",
    "load_experiment",
    "load_run",
    "load_weights",
    "read_metrics",
    "train",
]

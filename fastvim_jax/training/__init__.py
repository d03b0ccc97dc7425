"""Train and evaluate models, and keep what a run writes in its run folder.

Each folder here is a task: classification, masked, segmentation, detection. Each file is shared by all tasks and knows
none of them. Read in this order:

    1. classification.train  one trainer, from top to bottom
    2. runs, tasks           find the trainer of a config, open the run folder
    3. loop                  the training loop that all trainers share
    4. steps                 the train state and the compiled step
    5. optimizer, schedules  AdamW, its groups, its learning rates
    6. run_folder, checkpoints, metrics  what a run folder holds
"""

from fastvim_jax.training.checkpoints import CheckpointError, Checkpoints
from fastvim_jax.training.classification.config import TrainConfig
from fastvim_jax.training.classification.evaluation import evaluate
from fastvim_jax.training.config import OptimizerConfig, RunConfig
from fastvim_jax.training.experiments import experiment_docs, list_experiments, load_experiment
from fastvim_jax.training.health import NonFiniteError
from fastvim_jax.training.metrics import read_metrics
from fastvim_jax.training.optimizer import adamw, learning_rate_scales, weight_decay_mask
from fastvim_jax.training.profiling import ProfileSteps
from fastvim_jax.training.run_folder import Run, load_run
from fastvim_jax.training.runs import RunResult, train
from fastvim_jax.training.schedules import epoch_cosine, warmup_cosine
from fastvim_jax.training.start_from import load_weights
from fastvim_jax.training.steps import Loss, TrainState, init_state, make_train_step
from fastvim_jax.training.stopping import STOPPED_STATUS, Stopped

__all__ = [
    "STOPPED_STATUS",
    "CheckpointError",
    "Checkpoints",
    "Loss",
    "NonFiniteError",
    "OptimizerConfig",
    "ProfileSteps",
    "Run",
    "RunConfig",
    "RunResult",
    "Stopped",
    "TrainConfig",
    "TrainState",
    "adamw",
    "epoch_cosine",
    "evaluate",
    "experiment_docs",
    "init_state",
    "learning_rate_scales",
    "list_experiments",
    "load_experiment",
    "load_run",
    "load_weights",
    "make_train_step",
    "read_metrics",
    "train",
    "warmup_cosine",
    "weight_decay_mask",
]

"""Define the configuration of runs: the optimizer, and the fields that the configs of all tasks share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from fastvim_jax import serialise
from fastvim_jax.config_checks import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Rate,
    check_fields,
)
from fastvim_jax.distributed.mesh import MeshConfig
from fastvim_jax.errors import UserError
from fastvim_jax.training.reduction import runs_by_device

DecayGroups = Literal[
    "supervised", "pretrain", "finetune", "cell", "segmentation", "detection", "detection_released"
]
ScheduleName = Literal["warmup_cosine", "epoch_cosine", "warmup_linear", "warmup_step", "constant"]
LayerRule = Literal["pairs", "blocks", "detection_released"]
Seed = Annotated[int, Interval(ge=0, lt=2**32)]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedules; the defaults are the supervised ImageNet recipe.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    learning_rate: PositiveFloat = 1e-3
    """Base learning rate, before scaling to the batch size."""
    learning_rate_scaling: Literal["deit", "linear", "sqrt", "none"] = "deit"
    """Factor from the base to the peak rate. deit: batch/512; linear: batch/256; sqrt: √(batch/1024); none: 1."""
    schedule: ScheduleName = "warmup_cosine"
    """What follows the linear warm-up. warmup_cosine: a cosine over steps (the warm-up includes both ends);
    epoch_cosine: a cosine over fractional epochs, counted from 0; warmup_linear: a straight line to 0; warmup_step: a
    tenth after each milestone; constant: the same rate in all steps, without warm-up."""
    milestones: tuple[float, ...] = (8 / 9, 26 / 27)
    """Shares of the run after each of which the learning rate falls to a tenth (warmup_step)."""
    warmup_epochs: NonNegativeFloat | None = None
    """Length of the linear warm-up in epochs; None: warmup_share of the run."""
    warmup_share: Rate = 0.05
    """Length of the linear warm-up as a share of the run, from 0 to 1, unless warmup_epochs is given."""
    warmup_start: NonNegativeFloat = 1e-6
    """Rate of the first step (warmup_cosine, warmup_linear, warmup_step)."""
    final_learning_rate: NonNegativeFloat = 1e-5
    """Floor of the cosine."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay of the decayed parameters."""
    weight_decay_end: NonNegativeFloat | None = None
    """Weight decay at the end of the run, reached along half a cosine; None: constant."""
    decay_groups: DecayGroups = "supervised"
    """Which parameters decay. supervised, cell: all but one-dimensional ones and biases; finetune: all but
    one-dimensional ones, position embedding and class token; pretrain: all; segmentation: all but norms, A_log, D,
    position embedding and class token of the backbone; detection: all but norms of blocks and position embedding;
    detection_released: all but the position embedding, because the released rule recognised no block."""
    layer_decay: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Factor on the learning rate from each layer to the one below it (see layer_rule); None: one rate for all."""
    layer_rule: LayerRule = "pairs"
    """What counts as a layer of layer_decay. pairs: every two blocks; blocks: every block, as in ViTDet;
    detection_released: only the embeddings get a factor, layer_decay to the power of 13, as the released detectors were
    trained."""
    beta1: Rate = 0.9
    """Decay of Adam's first moment."""
    beta2: Rate = 0.999
    """Decay of Adam's second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of the bias-corrected second moment."""
    clip_grad_norm: PositiveFloat | None = None
    """Largest global gradient norm; None: not clipped."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer.")
        rising = (0.0, *self.milestones, 1.0)
        if any(b <= a for a, b in itertools.pairwise(rising)):
            refuse("optimizer.", self, "milestones", "rising shares between 0 and 1")

    def warmup(self, epochs: int) -> float:
        """Return the length of the warm-up of a run of `epochs`, in epochs."""
        return self.warmup_share * epochs if self.warmup_epochs is None else self.warmup_epochs


@dataclass(frozen=True)
class RunConfig:
    """The fields that runs of all tasks share; each task's config adds its own (`TrainConfig` for classification).

    Two runs of one config on one machine end in the same weights.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    saves_model: ClassVar[bool] = True
    """Whether the run's checkpoints hold the whole model, so that it can be loaded from the run folder."""

    averages_images: ClassVar[bool] = False
    """Whether the loss is a mean over images, so that `mesh.reduction` may average the gradients of parts."""

    model: Any
    """The model's config; a task's config names the classes that it takes."""
    data: Any
    """The data's config; a task's config names its class."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, its groups and its schedules."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices share the batch and the parameters. Results do not depend on it, except for rounding."""
    accumulate: PositiveInt = 1
    """Number of parts that each batch of data.batch_size is cut into. They pass through the model one after the other,
    which saves memory, and then one update is made."""
    epochs: PositiveInt = 300
    """Passes over the training images. The schedules end with the last one."""
    ema_decay: Rate | None = 0.9999
    """Decay of the moving average of the weights, which is evaluated beside the weights; None: no average."""
    seed: Seed = 0
    """Seed of the initial weights, the order of the images, their augmentation and drop path."""
    evaluate_every_epochs: NonNegativeInt = 1
    """Epochs between evaluations; 0: evaluate only after the last step."""
    checkpoint_every_steps: PositiveInt | None = None
    """Steps between checkpoints; None: one after every epoch. The last step is always saved."""
    keep_checkpoints: PositiveInt = 3
    """How many of the latest checkpoints are kept."""
    keep_best: bool = False
    """Also keep the checkpoint with the best score (--step best). Every evaluation then saves a checkpoint."""
    keep_every_steps: PositiveInt | None = None
    """Also keep all checkpoints whose step is a multiple of this; None: none."""
    log_every_steps: PositiveInt = 50
    """Steps between two lines of the log. The loop waits for the device only there."""
    init: str | None = None
    """Weights to start from: a run folder, a saved model, hf://owner/name, or a .safetensors or .pth file. A head for
    other classes is drawn anew, and position embeddings are resampled. Any other misfit is an error."""
    init_weights: Literal["raw", "ema"] | None = None
    """Which weights of the run folder in init: raw: the trained ones; ema: their average; None: ema if it was kept."""
    init_allow: tuple[str, ...] = ()
    """Names of parameters that need not fit: they are drawn anew or left out. Example: patch_embed.* for other
    patches."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.init is None and (self.init_allow or self.init_weights):
            raise UserError("init_allow and init_weights say how to use init: set init as well.")
        if self.mesh.reduction != "computed" and not self.averages_images:
            raise UserError(
                f"mesh.reduction={self.mesh.reduction!r} wants a loss that is a mean over images, which "
                f"{type(self).__name__} has not: leave it out."
            )
        warmup = self.optimizer.warmup(self.epochs)
        if self.optimizer.schedule != "constant" and warmup >= self.epochs:
            raise UserError(
                f"optimizer.warmup_epochs={warmup} leaves nothing of epochs={self.epochs} to decay over: train longer, "
                f"or shorten it, for example --optimizer.warmup-epochs {self.epochs / 8:g} (None: "
                f"{self.optimizer.warmup_share:.0%} of the run)."
            )

    @property
    def runs_by_device(self) -> bool:
        """Whether each device computes the gradient of its own images; see `reduction.runs_by_device`."""
        return runs_by_device(self.model, self.mesh, averages_images=self.averages_images)

    @property
    def samples_channels(self) -> bool:
        """Whether steps see different numbers of channels, and each number needs a compiled program of its own."""
        return getattr(self.data, "channel_sampling", "none") != "none"

    @property
    def compute_dtype(self) -> str:
        """Name of the dtype in which the model computes."""
        return str(self.model.precision.dtype)

    def to_json(self) -> str:
        """Return the config as JSON text; `from_json` of its class gives it back exactly."""
        return serialise.to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Any:
        """Return the config that `to_json` wrote; unknown, missing and mistyped fields raise a UserError."""
        return serialise.from_json(cls, text)


def refuse(where: str, config: Any, name: str, expected: str) -> None:
    """Raise a `UserError` that names a field, its value, and what was expected."""
    raise UserError(f"{where}{name} is {getattr(config, name)!r}, but must be {expected}.")

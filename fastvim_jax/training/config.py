"""What all runs are configured by: the optimizer, and the fields that the tasks' configs share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

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
    """Peak rate: deit: × batch/512; linear: × batch/256; sqrt: × √(batch/1024); none: as given."""
    schedule: ScheduleName = "warmup_cosine"
    """warmup_cosine counts steps, its warm-up includes both ends; epoch_cosine counts fractional epochs from 0;
    warmup_linear counts steps too and falls on a straight line to 0; warmup_step falls to a tenth at each milestone."""
    milestones: tuple[float, ...] = (8 / 9, 26 / 27)
    """Shares of the run after which the rate is a tenth of what it was (warmup_step)."""
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
    """Weight decay that a half cosine over the whole run leads to; None: constant."""
    decay_groups: DecayGroups = "supervised"
    """Which parameters decay. supervised, cell: all but one-dimensional ones and biases; finetune: all but
    one-dimensional ones, position embedding and class token; pretrain: all; segmentation: all but norms, A_log, D,
    position embedding and class token of the backbone; detection: all but norms of blocks and position embedding;
    detection_released: all but the position embedding, because the released rule recognised no block."""
    layer_decay: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Layer-wise factor of the learning rate; None: none."""
    layer_rule: LayerRule = "pairs"
    """What layer_decay is applied to. pairs: one factor for every two blocks below the head; blocks: one for every
    block, as in ViTDet; detection_released: embeddings alone, 13 factors, as the released detectors were trained."""
    beta1: Rate = 0.9
    """Decay of Adam's first moment."""
    beta2: Rate = 0.999
    """Decay of Adam's second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the corrected second moment."""
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
    """What the runs of all tasks have in common; each task's config adds its own fields (`TrainConfig` classifies).

    Two runs of one config on one machine end in the same weights.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    model: Any
    """The model's config; a task's config names the classes that it takes."""
    data: Any
    """The data's config; a task's config names its class."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, its groups and its schedules."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices share the batch and the parameters; what comes out does not depend on it."""
    accumulate: PositiveInt = 1
    """Parts in which a batch of data.batch_size passes through the model before its one update, to save memory."""
    epochs: PositiveInt = 300
    """Passes over the training images; the schedules end with the last."""
    ema_decay: Rate | None = 0.9999
    """Decay of the average of the weights that is evaluated beside them; None: no average."""
    seed: Seed = 0
    """Seed of the initial weights, the order of the images, their augmentation and drop path."""
    evaluate_every_epochs: NonNegativeInt = 1
    """Epochs between evaluations; 0: only after the last."""
    checkpoint_every_steps: PositiveInt | None = None
    """Steps between checkpoints; None: one after every epoch. The last step is always saved."""
    keep_checkpoints: PositiveInt = 3
    """Latest checkpoints kept."""
    keep_best: bool = False
    """Keep the checkpoint with the best score too (--step best); every evaluation then saves one."""
    keep_every_steps: PositiveInt | None = None
    """Keep all checkpoints too whose step is a multiple of this."""
    log_every_steps: PositiveInt = 50
    """Steps between lines of the log; only there the loop waits for the device."""
    init: str | None = None
    """Weights to start from: a run folder, a saved model or hf://owner/name, a .safetensors or .pth file. A head of
    other classes is drawn anew, position embeddings are resampled, and what else does not fit is an error."""
    init_weights: Literal["raw", "ema"] | None = None
    """Which weights of that run folder: the trained ones or their average; None: the average if it was kept."""
    init_allow: tuple[str, ...] = ()
    """Names of parameters that may misfit and are then drawn anew or left out, e.g. patch_embed.* for other patches."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.init is None and (self.init_allow or self.init_weights):
            raise UserError("init_allow and init_weights say how to use init: set init as well.")
        warmup = self.optimizer.warmup(self.epochs)
        if self.optimizer.schedule != "constant" and warmup >= self.epochs:
            raise UserError(
                f"optimizer.warmup_epochs={warmup} leaves nothing of epochs={self.epochs} to decay over: train longer, "
                f"or shorten it, for example --optimizer.warmup-epochs {self.epochs / 8:g} (None: "
                f"{self.optimizer.warmup_share:.0%} of the run)."
            )

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
    """Raise a UserError that names a field, its value and what was expected."""
    raise UserError(f"{where}{name} is {getattr(config, name)!r}, but must be {expected}.")

"""FastVim with UperNet on scenes composed of real images: 11 classes, 128 px.

`python benchmarks/scenes.py build/scenes --data $FASTVIM_DATA_DIR` composes the scenes: CIFAR-10 objects, cut by COCO
outlines, on photographs of places. `validation` uses other objects, outlines and photographs than training. Set
FASTVIM_SCENES_DIR to the folder. The backbone is that of cifar10/fastvim.py, so training can start from its weights:

    fastvim train scenes/fastvim
    fastvim train scenes/fastvim --run-dir runs/scenes/fastvim_init --init runs/cifar10/fastvim

20 epochs of 6,000 scenes in batches of 32; benchmarks/dense.md has results after 8 epochs of 4,000 scenes.
"""

from fastvim_jax.data import ClassificationData
from fastvim_jax.data.segmentation_config import SegmentationData
from fastvim_jax.models import upernet
from fastvim_jax.training import OptimizerConfig, load_experiment
from fastvim_jax.training.segmentation.config import SegmentationConfig

claims = {"classes": 11, "parameters": 5_732_502}

cifar10 = load_experiment("cifar10/fastvim")
pixels: ClassificationData = cifar10.data

config = SegmentationConfig(
    model=upernet(
        cifar10.model, image_size=128, num_classes=11, channels=128, auxiliary_channels=64
    ),
    data=SegmentationData(
        path="$FASTVIM_SCENES_DIR",
        image_size=128,
        fit=(128, 128),
        scale=(0.75, 1.5),
        batch_size=32,
        eval_stride=128,
        workers=8,
        mean=pixels.mean,
        std=pixels.std,
    ),
    optimizer=OptimizerConfig(
        learning_rate=5e-4,
        learning_rate_scaling="none",
        schedule="warmup_linear",
        warmup_epochs=1.0,
        warmup_start=1e-6,
        weight_decay=0.05,
        decay_groups="segmentation",
    ),
    epochs=20,
    evaluate_every_epochs=5,
    checkpoint_every_steps=935,
    eval_windows=1,  # scenes have one window each
)

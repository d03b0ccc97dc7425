"""FastVim on a tenth of Tiny-ImageNet: 200 classes of 50 training images, 64 x 64; 12 blocks, 192 wide, patches of
8 pixels (a grid of 8 x 8), 3,481,928 parameters.

The recipe of cifar10/fastvim.py with mixup or cutmix on every batch, random erasing and 100 epochs. Nothing was tuned
on this data. Set FASTVIM_DATA_DIR to the folder that holds `tiny_imagenet/train.npz` and `tiny_imagenet/val.npz`.
Results and cost: benchmarks/small_images.md.

    fastvim train tiny_imagenet/fastvim
"""

from dataclasses import replace

from fastvim_jax.data.config import IMAGENET_MEAN, IMAGENET_STD
from fastvim_jax.training import load_experiment

claims = {"classes": 200, "parameters": 3_481_928}

base = load_experiment("cifar10/fastvim")
config = replace(
    base,
    model=replace(base.model, image_size=64, patch_size=8, num_classes=200, drop_path=0.1),
    data=replace(
        base.data,
        path="$FASTVIM_DATA_DIR/tiny_imagenet",
        eval_split="val",
        image_size=64,
        pad=8,
        batch_size=128,
        random_erasing=0.25,
        mixup=0.8,
        mix_prob=1.0,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    optimizer=replace(base.optimizer, learning_rate=2e-3),
    epochs=100,
    checkpoint_every_steps=1560,
    log_every_steps=78,
)

"""A ViT on a tenth of Tiny-ImageNet: the model of `cifar10/vit.py` with the recipe of `fastvim.py`.

The learning rate is that of `cifar10/vit.py`, because this model does not train at FastVim's.

    fastvim train tiny_imagenet/vit
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 200, "parameters": 3_647_624}

base = load_experiment("tiny_imagenet/fastvim")
vit = load_experiment("cifar10/vit")
config = replace(
    base,
    model=replace(vit.model, image_size=64, patch_size=8, num_classes=200, drop_path=0.1),
    optimizer=replace(base.optimizer, learning_rate=1e-3),
)

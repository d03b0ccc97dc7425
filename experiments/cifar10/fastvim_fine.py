"""FastVim on CIFAR-10 with patches of 2 pixels (a grid of 16 x 16), 8 blocks and 100 epochs, aimed at 93 %.

All else is as in `fastvim.py`. Patches and depth were chosen on held-out training images, on which patches of 2 pixels
learnt more per epoch (benchmarks/small_images.md). At the throughput measured there, 100 epochs take less than 9
minutes on an H100.

    fastvim train cifar10/fastvim_fine
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 10, "parameters": 2_316_298}

base = load_experiment("cifar10/fastvim")
config = replace(base, model=replace(base.model, patch_size=2, depth=8), epochs=100)

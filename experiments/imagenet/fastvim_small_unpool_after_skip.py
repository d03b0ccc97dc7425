"""FastVim-S that repeats the scan's output after adding the skip: 78.7 % top-1 (Table 18), 25,832,680 parameters.

Its base, fastvim_small.py, repeats the output first, so that the skip adds unpooled tokens: 81.1 %. Cost: 1.0e19 FLOPs
(6 × 4.37 GMACs per image); time not measured.

    fastvim train imagenet/fastvim_small_unpool_after_skip
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 25_832_680}

base = load_experiment("imagenet/fastvim_small")
config = replace(base, model=replace(base.model, unpool="after_skip"))

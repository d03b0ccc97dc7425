"""FastVim-S with a class token in the middle of the sequence: 81.3 % top-1 (Table 16), 25,833,448 parameters.

In its base, fastvim_small.py, the head reads the mean of the tokens: 81.1 %. Cost: 1.0e19 FLOPs (6 × 4.40 GMACs per
image); time not measured.

    fastvim train imagenet/fastvim_small_class_token
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 25_833_448}

base = load_experiment("imagenet/fastvim_small")
config = replace(base, model=replace(base.model, class_token="middle"))

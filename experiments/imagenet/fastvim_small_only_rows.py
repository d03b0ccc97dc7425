"""FastVim-S that pools over the rows of the grid in every block: 79.6 % top-1 (Table 6), 25,832,680 parameters.

Its base, fastvim_small.py, alternates between columns and rows: 81.1 %. Cost: 1.0e19 FLOPs (6 × 4.37 GMACs per image),
time not measured; the kernels are those of fastvim_small.py.

    fastvim train imagenet/fastvim_small_only_rows
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 25_832_680}

base = load_experiment("imagenet/fastvim_small")
config = replace(base, model=replace(base.model, pool_axes="rows"))

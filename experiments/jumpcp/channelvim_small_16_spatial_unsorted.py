"""ChannelVim-S/16 scanned spatial-first, sampled channels in the order drawn: 67.9 % top-1 on JUMP-CP (Table 19).

Its base is channelvim_small_16.py.
25,316,513 parameters. Cost: 280 GFLOPs per image and epoch (6 × 46.72 GMACs); time not measured.

    fastvim train jumpcp/channelvim_small_16_spatial_unsorted
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 25_316_513}

base = load_experiment("jumpcp/channelvim_small_16")
config = replace(
    base,
    model=replace(base.model, scan_order="spatial"),
    data=replace(base.data, channel_sampling="unsorted"),
)

"""Define the layers that models are made of.

Read in this order:

    1. mixer          what a block of FastVim or Vim computes
    2. direction      one of its two scan directions
    3. pooling        which tokens the scan reads; `ragged_pooling` (masked images) and `channel_pooling` are variants
    4. fused_core     the same as `mixer`, by GPU kernels; `fused_scans` is what stands between them
    5. linear, norms  the precision of matrix products and of norms
    6. patch_embed, pos_embed, head, drop_path  the other parts of a backbone

`attention` belongs to ViT, `channel_embed` to models of many channels, `masking` to masked autoencoders, `batch_norm`
and `resize` to segmentation.
"""

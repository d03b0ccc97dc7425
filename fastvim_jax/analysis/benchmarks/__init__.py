"""What `fastvim bench` measures of mixers and models, how rows are printed and kept, and the scan's plot.

The scan's own benchmark is `pallas_kernels.selective_scan.bench`, that of training steps
`fastvim_jax.training.benchmark`.
"""

"""Measure models, mixers, training steps, prediction and image reading; print the rows and write them to JSON.

The scan's benchmark is `pallas_kernels.selective_scan.bench`, because `pallas_kernels` imports no models.
"""

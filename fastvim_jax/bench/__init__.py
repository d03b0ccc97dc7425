"""Measure models, their mixers, training steps and reading images; print the rows and keep them.

The benchmark of the scan itself is `pallas_kernels.selective_scan.bench`, because kernels know no model.
"""

"""Run as a program: a batch of a resident set in shares, or of pixel shards, in one process or as one of several.

python tests/distributed/shares.py OUT.npz SEED [FOLDER OF PIXEL SHARDS]
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from fastvim_jax.data import ClassificationData, make_train_iterator
from fastvim_jax.data.device_transforms import make_augment
from fastvim_jax.data.prefetch import DevicePrefetch
from fastvim_jax.distributed import initialize_distributed, make_mesh, on_mesh, place_batch

CONFIG = ClassificationData(
    source="digits", image_size=(6, 7), batch_size=32, resident=True, resident_shares=8,
    resident_size=9, augment_on="device", rand_augment=9.0,
)  # fmt: skip


def main(out: str, seed: int, pixels: str = "") -> None:
    initialize_distributed()
    mesh = make_mesh()
    config = CONFIG
    if pixels:
        config = dataclasses.replace(
            CONFIG, source="pixels", path=pixels, resident=False, batch_size=8
        )
    iterator = make_train_iterator(
        config, seed=seed, mesh=mesh,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    batches = DevicePrefetch(iterator, lambda batch: place_batch(mesh, batch))
    placed = [next(batches) for _ in range(3)][-1]
    batches.close()
    step = on_mesh(mesh, jax.jit(make_augment(config, 10)))
    done = step(jax.random.key(seed), placed)
    found = {"kept": placed["image"], **done}
    whole = {
        name: np.asarray(multihost_utils.process_allgather(value, tiled=True))
        if jax.process_count() > 1
        else np.asarray(value)
        for name, value in found.items()
    }
    if jax.process_index() == 0:
        np.savez(out, **whole)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])

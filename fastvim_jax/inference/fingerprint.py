"""Digest a model, so that results of two models are never put into one file."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np


def fingerprint(described: str, params: Any) -> str:
    """Digest a description and the arrays of a tree of parameters, with their names."""
    digest = hashlib.blake2b(described.encode(), digest_size=16)
    for path, leaf in jax.tree.leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8))
    return digest.hexdigest()

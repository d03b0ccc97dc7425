"""What all processes of a run must agree about; one that does not would wait for the others forever, or spoil them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fastvim_jax.distributed import require_same
from fastvim_jax.serialise import to_dict
from fastvim_jax.training.run_folder import config_leaves

_OF_HOST = frozenset({"data.path", "data.class_list", "data.workers", "data.decoder", "init"})
"""Settings that may differ between hosts: where files lie, and how they are read."""


def require_same_course(settings: dict[str, Any], class_names: Sequence[str], **more: Any) -> None:
    """Compare a run's or an evaluation's settings, class names and whatever else decides its course.

    Args:
        settings: configs by name: `{"data": data}`; the fields of one without a name stand for themselves.
        class_names: names of the classes.
        **more: JSON-able values.

    Raises:
        UserError: in a process that disagrees with the first one.
    """
    leaves: dict[str, Any] = {}
    for name, config in settings.items():
        start = f"{name}." if name else ""
        leaves |= {f"{start}{key}": value for key, value in config_leaves(to_dict(config)).items()}
    digest = hashlib.sha256(repr(tuple(class_names)).encode()).hexdigest()[:16]
    names = f"{len(class_names)} with digest {digest}"
    named = {key.replace("_", " "): value for key, value in more.items()}
    course = {name: value for name, value in leaves.items() if name not in _OF_HOST}
    require_same(named | {"class names": names} | course)


def require_same_weights(weights: Any) -> None:
    """Compare weights that every process read for itself; files of one name may differ between hosts.

    Raises:
        UserError: in a process whose weights are others than those of the first one.
    """
    if jax.process_count() == 1:
        return
    made = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        array = np.asarray(leaf)
        made.update(repr((jax.tree_util.keystr(path), array.shape, str(array.dtype))).encode())
        made.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    require_same({"weights read": made.hexdigest()[:16]})

"""Write PyTorch checkpoints without PyTorch, as it writes them, for tests."""

from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}


class Tensor:
    """Pickles as PyTorch pickles a tensor: a function's name, and the key of a storage."""

    def __init__(self, values, shape=None, strides=None, offset=0):
        self.values = np.ascontiguousarray(values)
        self.shape = self.values.shape if shape is None else shape
        steps = [s // self.values.itemsize for s in self.values.strides]
        self.strides, self.offset = tuple(steps) if strides is None else strides, offset

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        arguments = (self.values, self.offset, self.shape, self.strides, False, OrderedDict())
        return rebuild, arguments


def pretend_torch(monkeypatch):
    """Add modules of PyTorch's names to this process, so that it can write what PyTorch writes."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*arguments):
        raise AssertionError("the file's own function ran")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


def write(path, saved, *, method=zipfile.ZIP_STORED, cut=0):
    storages = []

    class Writer(pickle.Pickler):
        def persistent_id(self, thing):
            if not isinstance(thing, np.ndarray):
                return None
            storages.append(thing)
            kind = getattr(sys.modules["torch"], STORAGES[thing.dtype])
            return "storage", kind, str(len(storages) - 1), "cpu", thing.size

    buffer = io.BytesIO()
    Writer(buffer, protocol=2).dump(saved)
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        for key, values in enumerate(storages):
            data = values.tobytes()
            archive.writestr(f"archive/data/{key}", data[: len(data) - cut])
    return path

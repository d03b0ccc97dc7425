"""PyTorch checkpoints are read without PyTorch; nothing that they name is ever run."""

from __future__ import annotations

import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from fastvim_jax.errors import UserError
from fastvim_jax.interop.torch_file import Unread, read_torch_file

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


@pytest.fixture
def torch_names(monkeypatch):
    """Modules of PyTorch's names, so that this process can write what PyTorch writes."""
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


class Arguments:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class Hostile:
    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_tensors_come_back_and_all_else_is_inert(tmp_path, rng, torch_names):
    weights = rng.normal(size=(3, 4)).astype(np.float32)
    half = rng.normal(size=5).astype(ml_dtypes.bfloat16)
    path = write(
        tmp_path / "a.pth",
        {
            "model": OrderedDict(
                w=Tensor(weights),
                transposed=Tensor(weights, (4, 3), (1, 4)),
                part=Tensor(weights, (2,), (4,), 1),
                half=Tensor(half),
                steps=Tensor(np.array(7, np.int64)),
                empty=Tensor(np.zeros((0, 2), np.float32)),
            ),
            "epoch": 3,
            "args": Arguments(lr=0.1),
        },
    )
    saved = read_torch_file(path)
    model = saved["model"]
    np.testing.assert_array_equal(model["w"], weights)
    np.testing.assert_array_equal(model["transposed"], weights.T)
    np.testing.assert_array_equal(model["part"], weights[:2, 1])
    assert model["half"].dtype == ml_dtypes.bfloat16 and model["half"].tobytes() == half.tobytes()
    assert model["steps"] == 7 and model["empty"].shape == (0, 2)
    assert saved["epoch"] == 3
    assert isinstance(saved["args"], Unread) and "Arguments, not read" in repr(saved["args"])


def test_nothing_is_run(tmp_path, torch_names):
    hostile = Hostile()
    hostile.folder = tmp_path / "made by the file"
    saved = read_torch_file(write(tmp_path / "a.pth", {"weights": hostile}))
    assert not hostile.folder.exists()
    assert repr(saved["weights"]) == "<posix.mkdir, not read>"


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (lambda w: Tensor(w, (4, 4), (4, 1)), "larger than its storage"),
        (lambda w: Tensor(w, (2, 2), (8, 4), 1), "reaches past the end"),
        (lambda w: Tensor(w, (2,), (-1,), 3), "impossible shape"),
        (lambda w: Tensor(w, (2,), (1,), -1), "impossible shape"),
        (lambda w: Tensor(w, (1 << 40, 1 << 20), (0, 0)), "larger than its storage"),
        (lambda w: Tensor(w, (2, 2), (1,)), "other strides than axes"),
    ],
)
def test_impossible_tensors_are_refused(tmp_path, rng, torch_names, tensor, reason):
    weights = rng.normal(size=12).astype(np.float32)
    path = write(tmp_path / "a.pth", {"w": tensor(weights)})
    with pytest.raises(UserError, match=reason):
        read_torch_file(path)


def test_damaged_and_other_files_are_refused_by_name(tmp_path, rng, torch_names):
    weights = {"w": Tensor(rng.normal(size=12).astype(np.float32))}
    good = write(tmp_path / "a.pth", weights).read_bytes()
    (tmp_path / "cut.pth").write_bytes(good[: len(good) // 2])
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"w": 1}))
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme", "hello")
    for path, reason in (
        (tmp_path / "missing.pth", "there is no file"),
        (tmp_path / "cut.pth", "not in the zip format"),
        (tmp_path / "old.pth", "not in the zip format"),
        (other, "no PyTorch checkpoint"),
        (write(tmp_path / "short.pth", weights, cut=4), "44 bytes, 48 are described"),
        (write(tmp_path / "list.pth", [1, 2]), "no dictionary"),
        (write(tmp_path / "bomb.pth", weights, method=zipfile.ZIP_DEFLATED), "compressed"),
    ):
        with pytest.raises(UserError, match=reason):
            read_torch_file(path)


def test_what_pytorch_writes_is_read(tmp_path, rng):
    torch = pytest.importorskip("torch")
    values = torch.tensor(rng.normal(size=(3, 4)))
    saved = {
        "state_dict": {"w": values, "t": values.T, "p": torch.nn.Parameter(values[1:])},
        "half": values.to(torch.bfloat16),
        "optimizer": torch.optim.SGD([values], 0.1).state_dict(),
    }
    torch.save(saved, tmp_path / "a.pth")
    read = read_torch_file(tmp_path / "a.pth")
    np.testing.assert_array_equal(read["state_dict"]["t"], values.numpy().T)
    np.testing.assert_array_equal(read["state_dict"]["p"], values.numpy()[1:])
    np.testing.assert_array_equal(
        read["half"].astype(np.float32), values.to(torch.bfloat16).float().numpy()
    )

"""PyTorch checkpoints are read without PyTorch; nothing that they name is ever run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from fastvim_jax.errors import UserError
from fastvim_jax.interop import read_weights_file
from fastvim_jax.interop.torch_file import Unread, read_torch_file
from tests.interop.torch_files import Tensor, pretend_torch, write


@pytest.fixture
def torch_names(monkeypatch):
    pretend_torch(monkeypatch)


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


def test_everything_beside_the_weights_is_listed(tmp_path, rng, torch_names):
    weights = Tensor(rng.normal(size=(3, 4)).astype(np.float32))
    flat = {"w": weights, "epoch": 3, "args": Arguments}
    found = read_weights_file(write(tmp_path / "flat.pth", flat))
    assert list(found.arrays) == ["w"]
    assert found.ignored[0] == "epoch: 3" and "Arguments, not read" in found.ignored[1]
    nested = {"state_dict": {"w": weights, "version": (1, 2)}, "epoch": 3}
    found = read_weights_file(write(tmp_path / "nested.pth", nested))
    assert found.ignored == ("epoch: 3", "state_dict.version: tuple of 2 entries")
    with pytest.raises(UserError, match="holds weights under net: choose by --entry"):
        read_weights_file(write(tmp_path / "net.pth", {"net": {"w": weights}}))


def test_the_text_of_a_collection_is_not_made(tmp_path, rng, torch_names):
    """Read a list of lists: a few bytes describe 2**60 items."""
    laughs = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]
    with pytest.raises(UserError, match="holds list of 2 entries, no dictionary"):
        read_torch_file(write(tmp_path / "a.pth", laughs))
    weights = Tensor(rng.normal(size=3).astype(np.float32))
    found = read_weights_file(write(tmp_path / "b.pth", {"w": weights, "x": laughs}))
    assert found.ignored == ("x: list of 2 entries",)


def test_a_key_whose_hash_never_ends_is_refused(tmp_path, rng, torch_names):
    """Refuse a dictionary whose key is a tuple of 2**60 items, without hashing it."""
    doubled = b"h\x00h\x00\x86q\x000"  # the tuple of memo 0 twice, as a tuple, into memo 0
    pickled = b"\x80\x02})q\x000" + 60 * doubled + b"h\x00K\x01s."
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(UserError, match="tuples repeat one another without end"):
        read_torch_file(tmp_path / "a.pth")
    shared = (2, 3)  # as PyTorch's pickles have them: used often, and short
    weights = Tensor(rng.normal(size=(2, 3)).astype(np.float32))
    saved = {"w": weights, "shapes": [(shared, shared, i) for i in range(1000)], shared: "key"}
    found = read_torch_file(write(tmp_path / "b.pth", saved))
    assert found["shapes"] == saved["shapes"] and found[2, 3] == "key"


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
        (lambda w: Tensor(w, (2,), (-1,), 3), "impossible numbers"),
        (lambda w: Tensor(w, (2,), (1,), -1), "impossible numbers"),
        (lambda w: Tensor(w, (1 << 40, 1 << 20), (0, 0)), "larger than its storage"),
        (lambda w: Tensor(w, (2, 2), (1,)), "not as many strides as axes"),
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
        (write(tmp_path / "short.pth", weights, cut=4), "44 bytes, but 48 are described"),
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

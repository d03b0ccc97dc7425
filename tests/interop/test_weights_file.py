"""What lies around the weights in a file: wrappers, averages, metrics and losses of the program that wrote it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastvim_jax.errors import UserError
from fastvim_jax.interop import read_weights_file
from tests.interop.torch_files import Tensor, pretend_torch, write

NAMES = ("patch_embed.proj.weight", "head.weight", "layers.0.mixer.D")


@pytest.fixture
def weights(rng):
    return {name: rng.normal(size=(2, 3)).astype(np.float32) for name in NAMES}


def prefixed(prefix, arrays):
    return {prefix + name: Tensor(array) for name, array in arrays.items()}


def same(found, arrays):
    assert found.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)


def test_a_lightning_checkpoint_gives_its_model_and_lists_the_rest(tmp_path, weights, monkeypatch):
    pretend_torch(monkeypatch)
    beside = {
        "criterion.weight": Tensor(np.ones(3, np.float32)),
        "accuracy.count": Tensor(np.ones(1, np.float32)),
    }
    saved = {
        "state_dict": prefixed("net.model.", weights) | beside,
        "epoch": 3,
        "hyper_parameters": {"lr": 1e-3},
    }
    found = read_weights_file(write(tmp_path / "last.ckpt", saved))
    same(found, weights)
    assert found.place == "state_dict"
    listed = "\n".join(found.ignored)
    for part in (
        "criterion: 1 array beside net.model.*",
        "accuracy: 1",
        "epoch: 3",
        "hyper_parameters",
    ):
        assert part in listed


def test_averages_come_first_wherever_they_are_kept(tmp_path, weights, monkeypatch):
    pretend_torch(monkeypatch)
    other = {name: array + 1 for name, array in weights.items()}
    timm = tmp_path / "model_best.pth.tar"
    for file, saved in (
        ("0.pth", {"model": prefixed("", other), "model_ema": prefixed("module.", weights)}),
        (timm.name, {"state_dict": prefixed("", other), "state_dict_ema": prefixed("", weights)}),
        ("2.pth", {"state_dict": prefixed("model.", other) | prefixed("ema_model.module.", weights)}),
    ):  # fmt: skip
        same(read_weights_file(write(tmp_path / file, saved)), weights)
    found = read_weights_file(timm, place="state_dict")
    same(found, other)
    with pytest.raises(UserError, match="no weights under 'state'"):
        read_weights_file(timm, place="state")


def test_a_segmentation_model_stays_whole(tmp_path, weights):
    whole = {f"backbone.{name}": array for name, array in weights.items()}
    whole["decode_head.conv.weight"] = np.ones((2, 2), np.float32)
    save_file(whole, tmp_path / "a.safetensors")
    same(read_weights_file(tmp_path / "a.safetensors"), whole)


def test_half_precision_and_what_no_training_gives(tmp_path, weights):
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in weights.items()}
    save_file(half, tmp_path / "a.safetensors")
    same(read_weights_file(tmp_path / "a.safetensors"), half)
    weights["head.weight"][0, 0] = np.nan
    save_file(weights, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"head.weight holds NaN"):
        read_weights_file(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cut short", lambda content: content[:-8]),
        ("longer than it says", lambda content: content + bytes(8)),
        ("offsets that overlap", lambda content: content.replace(b"[24,48]", b"[16,40]")),
        ("a shape that is larger", lambda content: content.replace(b"[2,3]", b"[9,9]", 1)),
        ("a header without end", lambda content: b"\xff" * 8 + content[8:]),
        ("no JSON", lambda content: content[:8] + b"[" + content[9:]),
        ("another dtype", lambda content: content.replace(b"F32", b"F99", 1)),
        ("empty", lambda content: b""),
    ],
)
def test_a_safetensors_file_that_lies_is_refused(tmp_path, weights, name, change):
    good = tmp_path / "good.safetensors"
    save_file(weights, good)
    content = good.read_bytes()
    assert change(content) != content
    (tmp_path / "bad.safetensors").write_bytes(change(content))
    with pytest.raises(UserError, match="no safetensors file, or it is damaged"):
        read_weights_file(tmp_path / "bad.safetensors")


def test_what_is_no_file_of_weights(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "weights.h5").write_bytes(b"HDF")
    for name, said in (
        ("missing.safetensors", "there is no file"),
        ("folder.safetensors", "there is no file"),
        ("weights.h5", "is no weights file: use .safetensors"),
    ):
        with pytest.raises(UserError, match=said):
            read_weights_file(tmp_path / name)


def test_a_masked_autoencoder_under_our_names_keeps_its_decoder(tmp_path):
    names = ("encoder.patch_embed.proj.kernel", "encoder.norm.scale", "decoder.embed.kernel")
    arrays = {name: np.ones((2, 3), np.float32) for name in names}
    save_file(arrays, tmp_path / "model.safetensors")
    found = read_weights_file(tmp_path / "model.safetensors")
    assert found.arrays.keys() == arrays.keys() and not found.ignored

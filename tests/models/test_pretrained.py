"""A saved model comes back with its bits; what is damaged, of another kind or out of reach is refused by name."""

from __future__ import annotations

import json
import os
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from fastvim_jax import UserError, from_pretrained, load_pretrained, save_pretrained
from fastvim_jax.models import VisionMambaConfig, ViTConfig, build_model
from fastvim_jax.models.backbone import Backbone
from fastvim_jax.models.detection import CascadeRCNN
from fastvim_jax.models.mae import MaskedAutoencoder
from fastvim_jax.models.pretrained import is_pretrained
from fastvim_jax.models.saving import Preprocessing
from fastvim_jax.models.upernet import UperNet

SIZES = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 3, "num_classes": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = build_model(VisionMambaConfig(**SIZES), rngs=nnx.Rngs(3))
    preprocessing = Preprocessing((8, 8), 0.9, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    card = {"Data": "Handwritten digits.", "Licence": "CC BY 4.0"}
    options = {"preprocessing": preprocessing, "class_names": ("a", "b"), "card": card}
    assert model.save_pretrained(folder, **options) == folder
    return folder, model


def same_bits(a, b):
    for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_model_comes_back_with_its_bits(saved):
    folder, model = saved
    assert is_pretrained(folder)
    loaded = load_pretrained(folder)
    same_bits(loaded.model, model)
    assert loaded.model.config == model.config and loaded.class_names == ("a", "b")
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3) and loaded.preprocessing.crop == 0.9
    card = (folder / "README.md").read_text()
    assert "## Data\n\nHandwritten digits." in card and "CC BY 4.0" in card
    assert card.startswith("---\nlibrary_name: fastvim-jax\nlicense: cc-by-4.0\ntags: [")
    assert loaded.licence == "CC BY 4.0"
    same_bits(from_pretrained(str(folder)), model)
    modes = {file.stat().st_mode for file in folder.iterdir()}
    assert len(modes) == 1  # who may read the card may read the weights


def test_every_kind_of_model_has_the_method():
    for kind in (Backbone, MaskedAutoencoder, UperNet, CascadeRCNN):
        assert kind.save_pretrained is save_pretrained


def test_a_home_folder_is_the_same_for_saving_and_loading(tmp_path, monkeypatch, saved):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert saved[1].save_pretrained("~/mine") == tmp_path / "mine"
    same_bits(from_pretrained("~/mine"), saved[1])


def test_half_precision_files_are_half_as_large_and_load_as_float32(tmp_path, saved):
    folder, model = saved
    save_pretrained(model, tmp_path, dtype="bfloat16")
    names = ["model.safetensors"]
    half, whole = ((f / names[0]).stat().st_size for f in (tmp_path, folder))
    assert half < 0.62 * whole  # names take the rest of so small a model
    for a, b in zip(
        jax.tree.leaves(nnx.state(from_pretrained(tmp_path))),
        jax.tree.leaves(nnx.state(model)),
        strict=True,
    ):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=2**-8)


def test_other_kinds_of_models(tmp_path):
    model = build_model(ViTConfig(**SIZES, num_heads=2), rngs=nnx.Rngs(1))
    same_bits(from_pretrained(save_pretrained(model, tmp_path)), model)


def test_damaged_folders_are_refused_by_name(tmp_path, saved):
    folder, _ = saved
    weights, config = folder / "model.safetensors", folder / "config.json"
    about = json.loads(config.read_text())
    header = weights.read_bytes()
    lying = header.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)

    def broken(name, change):
        other = tmp_path / name
        shutil.copytree(folder, other)
        change(other)
        return other

    def with_nan(other):
        arrays = load_file(other / "model.safetensors")
        first = min(arrays)
        save_file(
            arrays | {first: np.full_like(arrays[first], np.nan)}, other / "model.safetensors"
        )

    def as_fifo(file):
        file.unlink()
        os.mkfifo(file)

    def as_device(file):
        file.unlink()
        file.symlink_to("/dev/zero")

    def other_model(**changes):
        return json.dumps(about | {"model": about["model"] | changes})

    def edited(name, **changes):
        text = json.dumps(about | changes)
        return broken(name, lambda folder: (folder / "config.json").write_text(text))

    cases = [
        (broken("a", lambda f: (f / "config.json").unlink()), "it has no config.json"),
        (broken("nan", with_nan), "holds NaN or infinite numbers"),
        (broken("b", lambda f: (f / "model.safetensors").unlink()), "it has no model.safetensors"),
        (broken("fifo", lambda f: as_fifo(f / "config.json")), "not a regular file"),
        (broken("zero", lambda f: as_device(f / "config.json")), "not a regular file"),
        (broken("fifo2", lambda f: as_fifo(f / "model.safetensors")), "it has no model.safetensors|there is no file"),
        (broken("c", lambda f: (f / "config.json").write_text("{")), "describes no model"),
        (edited("c1", model=[1]), "'model' names no class"),
        (edited("c2", model={"class": ["VisionMambaConfig"]}), "'model' names no class"),
        (edited("c3", class_names=None), "class_names is no list"),
        (edited("c4", class_names=[["a"]]), "class_names is no list"),
        (broken("d", lambda f: (f / "config.json").write_text(json.dumps(about | {"format": 2}))), "has format 2"),
        (broken("e", lambda f: (f / "model.safetensors").write_bytes(header[:-8])), "it is damaged"),
        (broken("f", lambda f: (f / "model.safetensors").write_bytes(lying)), "it is damaged"),
        (
            broken("g", lambda f: (f / "config.json").write_text(other_model(depth=2))),
            "unexpected: blocks.2",
        ),
        (
            broken("h", lambda f: (f / "config.json").write_text(other_model(**{"class": "No"}))),
            "no model has a config of class 'No'",
        ),
        (tmp_path / "nowhere" / "at all", "a repository on the Hugging Face hub would be called owner/name"),
    ]  # fmt: skip
    for place, said in cases:
        with pytest.raises(UserError, match=said):
            load_pretrained(place)


def test_the_hub_offline_and_out_of_reach(monkeypatch, tmp_path, saved):
    hub = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")
    folder, model = saved
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="owner/name: it is not in the cache"):
        load_pretrained("owner/name", offline=True)
    with pytest.raises(UserError, match="^there is no folder owner/name; as the name of a repo"):
        load_pretrained("owner/name", offline=True)
    with pytest.raises(UserError, match="^owner/name: it is not in the cache"):
        load_pretrained("hf://owner/name", offline=True)
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    same_bits(from_pretrained("owner/name", revision="v1"), model)
    assert asked["name"] == "owner/name" and asked["revision"] == "v1"
    assert asked["allow_patterns"] == ["config.json", "model.safetensors", "README.md"]


def test_class_names_and_dtypes_are_checked(tmp_path, saved):
    _, model = saved
    with pytest.raises(UserError, match="3 class names are given for 2 classes"):
        save_pretrained(model, tmp_path, class_names=("a", "b", "c"))
    with pytest.raises(UserError, match="float32 or bfloat16"):
        save_pretrained(model, tmp_path, dtype="float16")

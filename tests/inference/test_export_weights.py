"""Weights leave as a folder that every command takes, and under the authors' names; both come back with every bit."""

from __future__ import annotations

import json
import shlex
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

from fastvim_jax import UserError, load_pretrained
from fastvim_jax.cli.main import main
from fastvim_jax.inference.export import export_classifier
from fastvim_jax.inference.export_weights import export_weights
from fastvim_jax.inference.preprocessing import preprocessing_of
from fastvim_jax.inference.reconstruct import load_masked
from fastvim_jax.models import MaskedAutoencoderConfig, build_model, upernet
from fastvim_jax.models.saving import Preprocessing, save_pretrained
from fastvim_jax.training import load_run, train
from fastvim_jax.training.masked.config import PretrainConfig
from fastvim_jax.training.run_folder import Run
from tests.training.tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train(
        tiny_config(model=tiny_model(depth=2), epochs=1, checkpoint_every_steps=11),
        folder,
        progress=False,
    )
    return folder


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("FASTVIM_COMPILATION_CACHE", "off")


def same(a, b):
    for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.drawn("commands", one_in=6)
def test_a_run_becomes_a_folder_that_predicts(run, tmp_path, rng, capsys):
    out, photo = tmp_path / "model", tmp_path / "digit.png"
    command = ["export-weights", str(run), "--out", str(out), "--licence", "CC BY 4.0"]
    assert main(command) == 0
    assert "README.md, config.json, model.safetensors" in capsys.readouterr().out
    found, trained = load_pretrained(out), load_run(run)
    same(found.model, trained.model)
    assert found.class_names == trained.class_names and len(found.class_names) == 10
    assert found.preprocessing == Preprocessing((8, 8), 1.0, (0.3,), (0.4,))
    card = (out / "README.md").read_text()
    for part in ("digits: trained on train", "1 epoch; step 11", "top-1", "on 360", "CC BY 4.0"):
        assert part in card
    Image.fromarray(rng.integers(0, 256, (9, 12), np.uint8)).save(photo)
    said = []
    for source in (run, out):
        assert main(["predict", str(source), str(photo)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "digit.png" in said[0]
    scores = []
    data = ["--data.source", "digits", "--split", "test[:60]", "--json"]
    for source in (run, out):
        assert main(["eval", str(source), *data]) == 0
        scores.append(json.loads(capsys.readouterr().out)["scores"])
    assert scores[1]["saved"] == pytest.approx(scores[0][trained.weights], rel=1e-5)
    assert scores[1]["saved"]["count"] == 60
    assert main(["eval", str(out)]) == 2
    assert "keeps no data: name them by --data.path FOLDER" in capsys.readouterr().err
    assert main(["eval", str(out), *data, "--weights", "raw"]) == 1
    assert "holds one set of weights" in capsys.readouterr().err
    assert main(["quickstart-report", str(out)]) == 1
    assert "holds a saved model and is no run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "task", "uses"),
    [
        (tiny_model(), "image-classification", "predict FOLDER PHOTO"),
        (tiny_model(num_classes=0), "image-feature-extraction", "embed FOLDER PHOTO --out features.csv"),
        (
            MaskedAutoencoderConfig(encoder=tiny_model(num_classes=0, drop_path=0.0), decoder_dim=8, decoder_depth=1),
            "image-feature-extraction",
            "reconstruct FOLDER PHOTO",
        ),
        (upernet(tiny_model(depth=4), channels=8, auxiliary_channels=0), "image-segmentation", None),
    ],
)  # fmt: skip
def test_the_card_and_the_next_command_fit_the_kind_of_model(tmp_path, capsys, config, task, uses):
    """Name the hub's word for the task, and a command that takes such a model. No command takes a saved UperNet."""
    saved, out = tmp_path / "saved", tmp_path / "a copy"
    save_pretrained(build_model(config, rngs=nnx.Rngs(0)), saved)
    assert main(["export-weights", str(saved), "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith(
        f"fastvim_jax {uses.replace('FOLDER', shlex.quote(str(out)))}" if uses else f"('{out}')."
    )
    card = (out / "README.md").read_text()
    assert f"\ntags: [{task}, " in card and "; 0 classes" not in card
    if uses is None:
        for command in ("predict", "eval"):
            assert main([command, str(out), *["photo.png"] * (command == "predict")]) == 1
            assert "UperNet" in (said := capsys.readouterr().err) and "run" in said


def test_a_run_becomes_a_file_of_the_authors_names_and_comes_back(run, tmp_path, capsys):
    file, back = tmp_path / "new folder" / "weights.safetensors", str(tmp_path / "back")
    assert main(["export-weights", str(run), "--to", "torch", "--out", str(file)]) == 0
    arrays = load_file(file)
    assert arrays["layers.1.mixer.conv1d_b.weight"].shape == (16, 1, 4)
    assert main(["import-weights", str(file), "--out", back]) == 0
    same(load_pretrained(back).model, load_run(run).model)
    # Once more, from the saved model.
    again = export_weights(back, tmp_path / "again.safetensors", to="torch")
    assert again.read_bytes() == file.read_bytes()


def test_half_precision(run, tmp_path):
    out = export_weights(run, tmp_path / "half.safetensors", to="torch", dtype="bfloat16")
    exact = load_file(export_weights(run, tmp_path / "whole.safetensors", to="torch"))
    for name, array in load_file(out).items():
        assert array.itemsize == 2
        np.testing.assert_allclose(array.astype(np.float32), exact[name], rtol=2**-8)


def test_a_pth_file_is_written_where_torch_is(run, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    export_weights(run, tmp_path / "a.pth", to="torch")
    export_weights(run, tmp_path / "half.pth", to="torch", dtype="bfloat16")
    export_weights(run, tmp_path / "a.safetensors", to="torch")
    named = load_file(tmp_path / "a.safetensors")
    saved = torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"]
    assert saved.keys() == named.keys() >= {"layers.0.mixer.A_b_log", "norm_f.weight"}
    halves = torch.load(tmp_path / "half.pth", weights_only=True)["state_dict"]
    for name, array in named.items():
        assert saved[name].dtype == torch.float32 and saved[name].is_contiguous()
        np.testing.assert_array_equal(saved[name].numpy(), array)
        assert torch.equal(halves[name], torch.from_numpy(array).to(torch.bfloat16))
    assert main(["import-weights", str(tmp_path / "a.pth"), "--out", str(tmp_path / "back")]) == 0
    same(load_pretrained(tmp_path / "back").model, load_run(run).model)


def test_what_cannot_be_written_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"a photo that must stay")
    for out, options, said in (
        ("a.onnx", {"to": "torch"}, "ends in .safetensors or .pth"),
        ("a.pth", {"to": "torch"}, "needs PyTorch: pip install"),
        ("a.safetensors", {"to": "torch", "dtype": "float16"}, "float32 or bfloat16"),
        ("photos", {}, "holds no saved model"),
    ):
        with pytest.raises(UserError, match=said):
            export_weights(run, tmp_path / out, **options)
    with pytest.raises(UserError, match="is no run folder"):
        export_weights(tmp_path / "photos", tmp_path / "new")
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["a.png"]


def test_a_folder_is_replaced_by_another_model(tmp_path):
    models = [build_model(tiny_model(), rngs=nnx.Rngs(i)) for i in (1, 2)]
    for i, model in enumerate(models):
        save_pretrained(model, tmp_path / str(i))
    same(
        load_pretrained(export_weights(tmp_path / "1", tmp_path / "0", overwrite=True)).model,
        models[1],
    )


def test_files_that_cannot_be_written_are_named(tmp_path):
    saved = save_pretrained(build_model(tiny_model(), rngs=nnx.Rngs(1)), tmp_path / "saved")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="folder.safetensors cannot be written"):
        export_weights(saved, tmp_path / "folder.safetensors", to="torch")
    with pytest.raises(UserError, match="no model card that could name the licence"):
        export_weights(saved, tmp_path / "a.safetensors", to="torch", licence="mit")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match="folder.npz cannot be written: Is a directory"):
        export_classifier(load_pretrained(saved), tmp_path / "folder.npz")
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(UserError, match="there is no folder"):
        export_classifier(load_pretrained(saved), tmp_path / "none" / "a.npz")


def test_a_masked_autoencoder_of_plain_pixels_stays_one(tmp_path):
    config = MaskedAutoencoderConfig(
        encoder=tiny_model(num_classes=0, drop_path=0.0), decoder_dim=8, decoder_depth=1
    )
    for normalise in (True, False):
        made = PretrainConfig(model=config, data=tiny_config().data, normalise_pixels=normalise)
        trained = Run(build_model(config, rngs=nnx.Rngs(0)), made, (), 0, "raw")
        out = tmp_path / str(normalise)
        save_pretrained(trained.model, out, preprocessing=preprocessing_of(trained))
        assert load_masked(out).config.normalise_pixels is normalise

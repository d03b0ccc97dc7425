"""Checkpoints under other programs' names become folders that every command takes; each entry is accounted for."""

from __future__ import annotations

import csv
import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

from fastvim_jax import UserError, load_pretrained, to_torch_state_dict
from fastvim_jax.cli.main import main
from fastvim_jax.inference import import_weights
from fastvim_jax.inference.export_weights import export_weights
from fastvim_jax.inference.import_weights import parse_options
from fastvim_jax.models import (
    MaskedAutoencoderConfig,
    VisionMambaConfig,
    ViTConfig,
    build_model,
)
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.model_card import card_text, read_licence
from fastvim_jax.training.start_from import load_weights
from tests.support import ROOT

SIZES = {"image_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_classes": 5}
CONFIGS = {
    "fastvim": VisionMambaConfig(**SIZES),
    "vim": VisionMambaConfig(**SIZES, pooling="none", class_token="middle"),
    "vit": ViTConfig(**SIZES, num_heads=1),
}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("FASTVIM_COMPILATION_CACHE", "off")


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    model = build_model(CONFIGS[request.param], rngs=nnx.Rngs(2))
    file = tmp_path_factory.mktemp("files") / "model.safetensors"
    save_file({n: np.ascontiguousarray(a) for n, a in to_torch_state_dict(model).items()}, file)
    return file, model


def write(model, file):
    save_file({n: np.ascontiguousarray(a) for n, a in to_torch_state_dict(model).items()}, file)


def same(a, b):
    for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_saved_model_is_replaced_on_request_alone(tmp_path):
    file, out = tmp_path / "model.safetensors", tmp_path / "out"
    write(build_model(CONFIGS["vit"], rngs=nnx.Rngs(2)), file)
    import_weights(file, out, licence="Apache License 2.0")
    assert "\nlicense: apache-2.0\n" in (out / "README.md").read_text()
    before = (out / "model.safetensors").read_bytes()
    write(build_model(CONFIGS["vit"], rngs=nnx.Rngs(3)), file)
    with pytest.raises(
        UserError, match="holds a saved model: name another folder, or .* --overwrite"
    ):
        import_weights(file, out)
    with pytest.raises(UserError, match="holds a saved model"):
        export_weights(out, out)
    assert (out / "model.safetensors").read_bytes() == before
    import_weights(file, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for write_to in (import_weights, export_weights):
        with pytest.raises(UserError, match="holds no saved model: name another folder"):
            write_to(file if write_to is import_weights else out, tmp_path / "run", overwrite=True)


@pytest.mark.parametrize(
    ("licence", "header"),
    [
        ("CC BY-NC-SA 4.0", ["license: cc-by-nc-sa-4.0"]),
        ("The MIT License", ["license: mit"]),
        ("Apache License, Version 2.0", ["license: apache-2.0"]),
        ("Our lab's: ask \"us\"\nlicense: mit", ["license: other", "license_name: our-lab-s-ask-us"]),
        ("\u00a9", []),
        ("", []),
    ],
)  # fmt: skip
def test_licences_in_the_words_of_the_hub(tmp_path, licence, header):
    about = {
        "model": {"class": "ViTConfig", "num_classes": 2}, "preprocessing": {"image_size": [8, 8]},
        "class_names": [], "fastvim_jax": "0",
    }  # fmt: skip
    text = card_text(about, 3, {"Licence": licence} if licence else {}, "float32")
    lines = text.splitlines()
    assert lines[:2] == ["---", "library_name: fastvim-jax"]
    assert lines[2 : lines.index("---", 1) - 1] == header
    (tmp_path / "README.md").write_text(text)
    assert read_licence(tmp_path) == licence  # of the section
    (tmp_path / "README.md").write_text('---\nlicense: "mit"\n---\n# Of another program')
    assert read_licence(tmp_path) == "mit"
    assert read_licence(tmp_path / "none") == ""


@pytest.mark.drawn("weights in and out")
def test_the_command_recognises_the_model_and_keeps_every_bit(checkpoint, tmp_path, capsys):
    file, model = checkpoint
    assert main(["import-weights", str(file), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "64 wide, 2 blocks (recognised from names and shapes)" in said
    assert "CC BY-NC-SA" in said and "taken" in said
    assert "The 5 classes have no names, so predictions show numbers: --classes FILE" in said
    authors = isinstance(model.config, VisionMambaConfig) and model.config.pooling != "none"
    assert ("names CC BY-NC-SA 4.0." in said) is authors  # FastVim, not Vim and ViT
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("\nlicense: cc-by-nc-sa-4.0\n" in card) is authors is ("license" in card)
    found = load_pretrained(tmp_path / "out").model
    same(found, model)
    assert type(found) is type(model) and found.config.image_size == (16, 16)


def test_a_linear_probe_s_batch_norm_and_layer_become_the_head(checkpoint, tmp_path, rng, capsys):
    file, _ = checkpoint
    arrays = load_file(file)
    weight, bias = (arrays.pop(f"head.{kind}") for kind in ("weight", "bias"))
    mean, variance = rng.normal(size=64), rng.uniform(1e-7, 2, size=64)
    probe = {
        "head.0.running_mean": mean.astype(np.float32),
        "head.0.running_var": variance.astype(np.float32),
        "head.0.num_batches_tracked": np.array(7),
        "head.1.weight": weight,
        "head.1.bias": bias,
    }
    save_file(arrays | probe, tmp_path / "probe.safetensors")
    out = str(tmp_path / "out")
    assert main(["import-weights", str(tmp_path / "probe.safetensors"), "--out", out]) == 0
    assert "batch norm and linear layer, joined" in capsys.readouterr().out
    head = load_pretrained(out).model.head
    features = rng.normal(size=(6, 64))
    wanted = (features - mean) / np.sqrt(variance + 1e-6) @ weight.T + bias
    found = features @ np.float64(head.kernel[...]) + np.float64(head.bias[...])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    probe["head.1.bias"] = np.zeros(4, np.float32)
    save_file(arrays | probe, tmp_path / "misfit.safetensors")
    with pytest.raises(UserError, match="do not fit together"):
        import_weights(tmp_path / "misfit.safetensors", tmp_path / "none")


def test_another_size_and_other_classes(checkpoint, tmp_path):
    file, model = checkpoint
    (tmp_path / "classes.txt").write_text("cat\ndog\n\nfish\n", "utf-8-sig")
    imported = import_weights(
        file,
        tmp_path / "out",
        options={"image_size": 24, "num_classes": 3},
        classes=tmp_path / "classes.txt",
    )
    assert imported.report.names("resized") == ["pos_embed"]
    assert set(imported.report.names("drawn")) == {"head.kernel", "head.bias"}
    found = load_pretrained(tmp_path / "out")
    assert found.class_names == ("cat", "dog", "fish")
    assert "no names" not in imported.in_words()
    table = tmp_path / "classes.tsv"  # A class list, as data sets have it.
    table.write_text("label\twnid\tname\n" + "".join(f"{i}\tn{i}\tkind {i}\n" for i in range(5)))
    import_weights(file, tmp_path / "named", classes=table)
    assert load_pretrained(tmp_path / "named").class_names == tuple(f"kind {i}" for i in range(5))
    assert found.model.config.image_size == (24, 24) and found.model.config.num_classes == 3
    np.testing.assert_array_equal(
        found.model.patch_embed.proj.kernel[...], model.patch_embed.proj.kernel[...]
    )
    headless = import_weights(file, tmp_path / "headless", options={"num_classes": 0})
    assert set(headless.report.names("left")) == {"head.kernel", "head.bias"}
    assert headless.next_command.startswith(f"embed {tmp_path / 'headless'} PHOTO --out")


def test_misfits_are_listed(tmp_path):
    weights = to_torch_state_dict(build_model(CONFIGS["fastvim"], rngs=nnx.Rngs(2)))
    weights["layers.0.mixer.extra"] = np.zeros(3, np.float32)
    del weights["layers.1.mixer.D_b"]
    save_file(
        {n: np.ascontiguousarray(a) for n, a in weights.items()}, tmp_path / "odd.safetensors"
    )
    with pytest.raises(UserError) as caught:
        import_weights(tmp_path / "odd.safetensors", tmp_path / "out")
    assert "unexpected: layers.0.mixer.extra" in str(caught.value)
    assert "missing: layers.1.mixer.D_b" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_named_model_that_it_is_not(checkpoint, tmp_path):
    with pytest.raises(UserError, match="do not fit this"):
        import_weights(checkpoint[0], tmp_path / "out", name="fastvim_small_patch16_224")


@pytest.mark.drawn("commands", one_in=6)
def test_a_masked_autoencoder_is_imported_drawn_and_fine_tuned_from(tmp_path, rng, capsys):
    inner = VisionMambaConfig(**{**SIZES, "num_classes": 0})
    config = MaskedAutoencoderConfig(encoder=inner, decoder_dim=32, decoder_depth=1)
    model = build_model(config, rngs=nnx.Rngs(2))
    file, out = str(tmp_path / "mae.safetensors"), str(tmp_path / "out")
    write(model, file)
    with pytest.raises(UserError, match="holds a masked autoencoder, which has no classes"):
        import_weights(file, out, options={"num_classes": 3})
    assert main(["import-weights", file, "--out", out]) == 0
    said = capsys.readouterr().out
    assert "Masked autoencoder: encoder VisionMamba, 64 wide, 2 blocks; decoder 32 wide, 1" in said
    assert "pool_scale=1.0" in said and f"reconstruct {out} PHOTO" in said
    same(load_pretrained(out).model, model)

    photo, picture = tmp_path / "photos" / "photo.png", tmp_path / "picture.png"
    photo.parent.mkdir()
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(photo)
    assert main(["reconstruct", out, str(photo.parent), "--out", str(picture)]) == 0
    assert picture.stat().st_size > 0

    classifier = build_model(CONFIGS["fastvim"], rngs=nnx.Rngs(3))
    for source in (file, out):
        assert load_weights(classifier, source).names("drawn") == ["head.bias", "head.kernel"]
        np.testing.assert_array_equal(classifier.norm.scale[...], model.encoder.norm.scale[...])
    main(["predict", out, str(photo)])
    assert (
        "a MaskedAutoencoder is no classifier: use `fastvim reconstruct`" in capsys.readouterr().err
    )


@pytest.mark.drawn("commands", one_in=6)
def test_a_model_of_cell_images_is_imported_and_embeds(tmp_path, rng, capsys):
    model = build_model(ChannelMambaConfig(**SIZES), rngs=nnx.Rngs(2))
    file, out = str(tmp_path / "cells.safetensors"), str(tmp_path / "out")
    write(model, file)
    assert main(["import-weights", file, "--out", out]) == 0
    said = capsys.readouterr().out
    assert "ChannelMamba, 64 wide, 2 blocks" in said and f"embed {out} FIELD" in said
    assert "by mean 0.01581, 0.006141" in said
    found = load_pretrained(out)
    same(found.model, model)
    assert found.preprocessing.channel_names[4] == "DNA" and found.preprocessing.crop == 1.0
    np.save(tmp_path / "field.npy", rng.integers(0, 256, (20, 40, 8), np.uint8))
    table = tmp_path / "table.csv"
    assert main(["embed", out, str(tmp_path / "field.npy"), "--out", str(table)]) == 0
    (row,) = csv.DictReader(table.read_text().splitlines())
    assert row["Metadata_tiles"] == "2" and "feature_0063" in row
    np.save(tmp_path / "other.npy", rng.integers(0, 256, (20, 40, 5), np.uint8))
    assert main(["embed", out, str(tmp_path / "other.npy"), "--out", f"{table}.csv"]) == 1
    assert "5 channels without names, but the model has 8" in capsys.readouterr().err


def test_normalisation_is_given_by_name(checkpoint, tmp_path):
    given = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    imported = import_weights(checkpoint[0], tmp_path / "out", **given)
    assert imported.preprocessing.mean == given["mean"]
    assert load_pretrained(tmp_path / "out").preprocessing.std == given["std"]
    for wrong, said in (
        ({"mean": (0.5,)}, "the model has 3 channels"),
        ({"std": (0.1, 0.1, 0.0)}, "deviations are above 0"),
        ({"mean": (float("nan"),) * 3}, "must be finite numbers"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be"),
        ({"entry": "model"}, "has no entries to choose from"),
    ):
        with pytest.raises(UserError, match=said):
            import_weights(checkpoint[0], tmp_path / "other", **wrong)


def test_a_table_of_no_square_grid_needs_the_image_s_size(tmp_path):
    model = build_model(VisionMambaConfig(**{**SIZES, "image_size": (8, 24)}), rngs=nnx.Rngs(2))
    write(model, tmp_path / "a.safetensors")
    with pytest.raises(
        UserError, match=r"shape \(1, 12, 64\), has no entry for each .* give image_size"
    ):
        import_weights(tmp_path / "a.safetensors", tmp_path / "out")
    options = parse_options(["image_size=[8, 24]"])
    import_weights(tmp_path / "a.safetensors", tmp_path / "out", options=options)
    same(load_pretrained(tmp_path / "out").model, model)


def test_options_without_a_value(capsys, tmp_path):
    assert main(["import-weights", "a.pth", "--out", str(tmp_path), "--option", "pooling"]) == 1
    assert "write NAME=VALUE" in capsys.readouterr().err


@pytest.mark.drawn("weights in and out")
def test_three_commands_from_a_checkpoint_to_predictions(checkpoint, tmp_path, rng, capsys):
    """Import folders, lists and patterns of images; an interrupted command goes on; bad files are counted."""
    file, _ = checkpoint
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for i in range(5):
        pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(photos / ("more" if i > 2 else ".") / f"{i}.png")
    (photos / "broken.jpg").write_text("no image")
    (photos / "notes.txt").write_text("no image, and not asked for")
    folder = str(tmp_path / "model")
    assert main(["import-weights", str(file), "--out", folder]) == 0
    out = tmp_path / "found.jsonl"
    command = ["predict", folder, str(photos), "--out", str(out), "--batch-size", "2"]
    assert main(command) == 1
    assert "6 files, 1 of which could not be read" in capsys.readouterr().out
    whole = out.read_text()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [r["file"] for r in records if "error" in r] == [str(photos / "broken.jpg")]
    out.write_text("".join(line + "\n" for line in whole.splitlines()[:3]) + '{"file": "to')
    assert main(command) == 1
    assert "(3 were there), 1 of which could not be read" in capsys.readouterr().out
    assert main(command) == 1  # The file holds everything, and one record is an error.
    assert "(6 were there), 1 of which could not be read" in capsys.readouterr().out
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["file"] for r in again] == [r["file"] for r in records]
    other = str(tmp_path / "other model")
    assert main(["import-weights", str(file), "--out", other, "--option", "norm_eps=0.01"]) == 0
    assert main(["predict", other, *command[2:]]) == 1
    assert "made with another model" in capsys.readouterr().err

    (tmp_path / "list.txt").write_text(f"{photos / '1.png'}\n\n{photos / '0.png'}\n")
    for name in (f"@{tmp_path / 'list.txt'}", str(photos / "[01].png")):
        for kind in ("csv", "parquet"):
            table = tmp_path / f"{len(name)}.{kind}"
            assert main(["predict", folder, name, "--out", str(table), "--top-k", "2"]) == 0
            if kind == "csv":
                rows = list(csv.DictReader(table.read_text().splitlines()))
            else:
                rows = pytest.importorskip("pyarrow.parquet").read_table(table).to_pylist()
            assert [int(row["rank"]) for row in rows] == [1, 2, 1, 2]
            best = {r["file"]: r["predictions"][0] for r in records if "predictions" in r}
            for row in rows[::2]:
                assert int(row["label"]) == best[row["file"]]["label"]
                expected = best[row["file"]]["probability"]
                assert abs(float(row["probability"]) - expected) < 1e-4


@pytest.mark.parametrize(
    ("images", "out", "said"),
    [
        (["nowhere-*.png"], None, "nothing matches"),
        (["@nowhere.txt"], None, "cannot read the list"),
        ([str(ROOT / "scripts")], None, "holds no image file"),
        (["a.png"], "found.txt", "ends in .jsonl, .csv, .parquet"),
    ],
)
def test_names_of_nothing_are_refused(checkpoint, tmp_path, capsys, images, out, said):
    import_weights(checkpoint[0], tmp_path / "model")
    capsys.readouterr()
    more = ["--out", str(tmp_path / out)] if out else []
    assert main(["predict", str(tmp_path / "model"), *images, *more]) in (1, 2)
    assert said in capsys.readouterr().err

"""What people name by mistake: every file is predicted or reported with its reason, and nothing ends in a traceback."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from fastvim_jax import Classifier, UserError, save_pretrained
from fastvim_jax.cli.main import main
from fastvim_jax.models import VisionMambaConfig, build_model

SIZES = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_classes": 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return save_pretrained(build_model(VisionMambaConfig(**SIZES), rngs=nnx.Rngs(1)), folder)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("FASTVIM_COMPILATION_CACHE", "off")


def bomb(side):
    """Return a PNG file of a few kilobytes that says it has side x side pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1 << 16), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def test_a_folder_of_everything_is_predicted_as_far_as_it_can_be(saved, tmp_path, rng, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    rgb = rng.integers(0, 256, (9, 12, 3), np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(rgb).save(jpeg, "JPEG")
    good = {
        "rgb.png": Image.fromarray(rgb),
        "grey.png": Image.fromarray(rgb[..., 0]),
        "deep.png": Image.fromarray(rng.integers(0, 1 << 16, (9, 12), np.uint16)),
        "alpha.webp": Image.fromarray(np.dstack([rgb, rgb[..., :1]])),
        "cmyk.jpg": Image.fromarray(rgb).convert("CMYK"),
        "one_bit.tif": Image.fromarray(rgb[..., 0]).convert("1"),
        "palette.gif": Image.fromarray(rgb).convert("P"),
    }
    for name, image in good.items():
        image.save(photos / name)
    bad = {
        "text.jpg": b"hello, I am a text",
        "empty.png": b"",
        "cut.jpg": jpeg.getvalue()[:60],
        "bomb.png": bomb(60_000),
        "heic.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "pickle.bmp": b"\x80\x04cos\nsystem\n",
    }
    for name, content in bad.items():
        (photos / name).write_bytes(content)
    os.mkfifo(photos / "pipe.png")  # Never opened: reading it would wait for ever.
    command = ["predict", str(saved), str(photos), str(tmp_path / "missing.png"), "--json"]
    assert main(command) == 1
    said = capsys.readouterr()
    found = {each["file"]: each for each in json.loads(said.out)}
    assert {os.path.basename(name) for name in found} == {*good, *bad, "missing.png"}
    for name, each in found.items():
        base = os.path.basename(name)
        assert ("predictions" in each) == (base in good), (base, each)
        if base not in good:
            assert base in each["error"] and base in said.err
    assert "pixels" in found[str(photos / "bomb.png")]["error"]


@pytest.mark.drawn("commands", one_in=6)
def test_photographs_are_embedded_and_the_unreadable_told(saved, tmp_path, rng, capsys):
    photos, table = tmp_path / "photos", tmp_path / "features.csv"
    photos.mkdir()
    for i in range(3):
        pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
    (photos / "bad.png").write_text("no image")
    command = ["embed", str(saved), str(photos), "--out", str(table), "--batch-size", "2"]
    assert main(command) == 1
    assert "bad.png" in capsys.readouterr().err
    rows = list(csv.DictReader(table.read_text().splitlines()))
    files = [str(photos / f"{i}.png") for i in range(3)]
    assert [row["Metadata_file"] for row in rows] == files
    found = [[float(row[f"feature_{i:04}"]) for i in range(8)] for row in rows]
    expected = Classifier.load(saved, batch_size=2)(files).embeddings
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for option in (["--pattern", "{plate}"], ["--per", "tile"]):
        assert main([*command, *option]) == 2
        assert f"{option[0]} is of microscope images" in capsys.readouterr().err
    assert main([*command, "--plot", str(tmp_path / "plot.png")]) == 1  # of the unreadable one
    with Image.open(tmp_path / "plot.png") as drawn:
        assert drawn.format == "PNG"
    assert main(["embed", str(tmp_path), str(photos)]) == 1
    assert "is no run folder" in capsys.readouterr().err


def test_of_a_saved_model_neither_weights_nor_a_step_can_be_chosen(saved, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(photo)
    for command in (
        ["predict", saved, photo, "--weights", "raw"],
        ["predict", saved, photo, "--step", "3"],
        ["embed", saved, photo, "--out", tmp_path / "e.csv", "--weights", "ema"],
        ["export", saved, "--out", tmp_path / "m.npz", "--step", "best"],
        ["export-weights", saved, "--out", tmp_path / "w", "--weights", "raw"],
        ["reconstruct", saved, photo, "--step", "3"],
    ):
        assert main([str(part) for part in command]) == 1
        said = capsys.readouterr().err
        assert "holds one set of weights: only run folders take weights and step" in said


def test_a_saved_model_without_its_weights_is_named(tmp_path, capsys):
    folder = save_pretrained(build_model(VisionMambaConfig(**SIZES), rngs=nnx.Rngs(1)), tmp_path)
    (folder / "model.safetensors").unlink()
    for command in ("predict", "export", "export-weights"):
        arguments = ["photo.png"] if command == "predict" else ["--out", str(tmp_path / "x.npz")]
        assert main([command, str(folder), *arguments]) == 1
        assert "holds no model: it has no model.safetensors" in capsys.readouterr().err


def test_a_masked_autoencoder_of_the_hub_is_asked_for_by_its_name(monkeypatch, capsys):
    def load(source, **options):
        raise UserError(f"asked for {source}")

    monkeypatch.setattr("fastvim_jax.inference.reconstruct.load_masked", load)
    assert main(["reconstruct", "hf://owner/name", "photo.png"]) == 1
    assert "asked for hf://owner/name" in capsys.readouterr().err


def test_a_folder_without_images_is_named(saved, tmp_path, capsys):
    for content in ((), ("notes.txt",)):
        folder = tmp_path / f"with {len(content)}"
        folder.mkdir()
        for name in content:
            (folder / name).write_text("no image")
        for command in ("predict", "reconstruct"):
            assert main([command, str(saved), str(folder)]) == 2
            assert f"{folder} holds no image file" in capsys.readouterr().err
    for i in range(101):
        (folder / f"{i}.png").touch()
    assert main(["reconstruct", str(saved), str(folder)]) == 2
    assert "at most 100, but 101 are named" in capsys.readouterr().err


def test_arrays_and_images_of_mixed_channel_counts(saved, rng):
    classifier = Classifier.load(saved, batch_size=2)
    rgb = rng.integers(0, 256, (9, 12, 3), np.uint8)
    grey = np.repeat(rgb[..., :1], 3, axis=2)
    opaque = np.dstack([rgb, np.full_like(rgb[..., :1], 255)])
    mixed = [rgb, rgb[..., :1], Image.fromarray(rgb[..., 0]), grey, Image.fromarray(opaque)]
    found = classifier(mixed).logits
    for one, other in ((1, 3), (2, 3), (0, 4)):
        np.testing.assert_allclose(found[one], found[other], rtol=1e-5, atol=1e-6)
    for array in (rgb[..., 0], rgb[..., :2], np.concatenate([rgb, rgb], axis=2)):
        with pytest.raises(UserError, match="with 1 or 3 channels"):
            classifier([rgb, array])


def test_opened_images_are_read_as_their_files_are(saved, tmp_path, rng):
    """Compare opened images with their files: who opens a file changes no pixel.

    Deep, transparent and turned images are among them.
    """
    classifier = Classifier.load(saved, batch_size=2)
    rgb = rng.integers(0, 256, (9, 12, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(np.dstack([rgb, rgb[..., :1]])).save(tmp_path / "alpha.png")
    Image.fromarray(rng.integers(0, 1 << 16, (9, 12), np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(rgb).convert("P").save(tmp_path / "palette.png")
    files = sorted(tmp_path.glob("*.png"))
    by_name, opened = classifier(files), classifier([Image.open(file) for file in files])
    np.testing.assert_array_equal(by_name.logits, opened.logits)
    odd = classifier([Image.fromarray(np.zeros((9, 9), np.float32)), files[0]])
    assert "floating-point pixels" in odd.errors[0] and sorted(odd.errors) == [0]


def test_an_opened_image_that_ends_early_is_reported_and_the_rest_predicted(saved, rng):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file, "JPEG")
    cut = Image.open(io.BytesIO(file.getvalue()[:900]))
    found = Classifier.load(saved, batch_size=2)([np.zeros((9, 9, 3), np.uint8), cut])
    assert sorted(found.errors) == [1] and "truncated" in found.errors[1]
    assert np.isfinite(found.logits[0]).all() and np.isnan(found.logits[1]).all()

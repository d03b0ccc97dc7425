"""From a plate's files to shards, statistics, a trained run, embeddings and pictures, through the command line."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvim_jax.cli import channels
from fastvim_jax.cli.main import main
from fastvim_jax.data import CellsData
from fastvim_jax.errors import UserError
from fastvim_jax.inference import embed
from fastvim_jax.inference.channel_scores import score_subsets
from fastvim_jax.inference.classifier import Classifier
from fastvim_jax.inference.embed import cut_tiles
from fastvim_jax.inference.embedding_table import Embeddings, normalise_to_controls
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.training import OptimizerConfig, TrainConfig, train

tifffile = pytest.importorskip("tifffile")
parquet = pytest.importorskip("pyarrow.parquet")

PATTERN = "Images/{plate}_{well}_s{site}_{channel}.tiff"


@pytest.fixture(scope="module")
def plate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three wells of two classes, four sites each, three channels; one channel of one site is cut short."""
    folder = tmp_path_factory.mktemp("plate")
    rng = np.random.default_rng()
    stem = folder / "JUMP-Target-1_compound"
    Path(f"{stem}_platemap.tsv").write_text("well_position\tbroad_sample\nA01\t\nA02\tX\nA03\t\n")
    Path(f"{stem}_metadata.tsv").write_text("broad_sample\ttarget\nX\tGENE\n\t\n")
    (folder / "Images").mkdir()
    rows = []
    for well in ("A01", "A02", "A03", "B09"):
        for site in range(1, 5):
            row = {"Metadata_Plate": "P", "Metadata_Well": well, "Metadata_Site": str(site)}
            for channel in ("DNA", "ER", "Mito"):
                name = f"P_{well}_s{site}_{channel}.tiff"
                top = 60000 if (well, channel) == ("A02", "ER") else 20000
                file = folder / "Images" / name
                tifffile.imwrite(file, rng.integers(0, top, (17, 20)).astype(np.uint16))
                row[f"FileName_Orig{channel}"] = name
            rows.append(row)
    damaged = folder / "Images" / "P_A03_s4_DNA.tiff"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with (folder / "load_data.csv").open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def trained(plate: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on the plate's shards."""
    shards, run = plate.parent / "shards", tmp_path_factory.mktemp("run") / "run"
    prepare = ["data", "prepare", str(plate), "--out", str(shards), "--split", "all"]
    stats = ["data", "stats", str(shards), "--split", "all", "--channels", "Mito", "ER", "DNA"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVIM_COMPILATION_CACHE", "off")
        assert main([*prepare, "--max-corrupt", "1"]) == 0
        assert main(stats) == 0
    data = CellsData(
        path=str(shards), train_split="all", eval_split="all", channels=3,
        channel_names=("Mito", "ER", "DNA"), image_size=8, batch_size=8, flip=0.0, defocus=0.0, dropout=0.0,
    )  # fmt: skip
    model = ChannelMambaConfig(
        image_size=8, patch_size=4, channels=3, num_classes=2, embed_dim=4, depth=1, state_size=2
    )
    optimizer = OptimizerConfig(
        learning_rate=1e-3, learning_rate_scaling="none", schedule="constant"
    )
    train(
        TrainConfig(model=model, data=data, optimizer=optimizer, epochs=1, ema_decay=None),
        run,
        progress=False,
    )
    return run


@pytest.mark.drawn("commands", one_in=6)
def test_a_plate_is_embedded_with_its_columns_and_what_is_damaged_is_told(
    plate: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "features.parquet", tmp_path / "plot.png"
    common = ["embed", str(trained), str(plate), "--pattern", PATTERN, "--batch-size", "4"]
    assert main([*common, "--out", str(out), "--plot", str(plot), "--colour", "well"]) == 1
    assert "P_A03_s4_DNA.tiff" in capsys.readouterr().err and plot.stat().st_size > 1000
    table = parquet.read_table(out).to_pydict()
    assert len(table["Metadata_well"]) == 15 and set(table["Metadata_well"]) == {
        "A01",
        "A02",
        "A03",
        "B09",
    }
    assert table["Metadata_channels"][0] == "Mito+ER+DNA" and table["Metadata_tiles"][0] == "4"
    features = np.stack([table[f"feature_{i:04}"] for i in range(4)], axis=1)
    assert np.isfinite(features).all() and features.std(axis=0).min() > 0

    options = ["--channels", "ER", "DNA", "--per", "well", "--controls", "A01", "A03"]
    assert main([*common, "--out", str(tmp_path / "wells.csv"), *options]) == 1
    wells = list(csv.DictReader((tmp_path / "wells.csv").read_text().splitlines()))
    assert [w["Metadata_well"] for w in wells] == ["A01", "A02", "A03", "B09"]
    assert {w["Metadata_channels"] for w in wells} == {"ER+DNA"}
    for name in ("feature_0000", "feature_0003"):  # The median of two controls lies between them.
        assert abs(float(wells[0][name]) + float(wells[2][name])) < 1e-3
    by_index = tmp_path / "by_index.csv"
    assert main(["embed", str(trained), str(plate), "--out", str(by_index), *options]) == 1
    again = list(csv.DictReader(by_index.read_text().splitlines()))
    assert [w["Metadata_well"] for w in again] == [w["Metadata_well"] for w in wells]
    features = [[float(w["feature_0000"]) for w in rows] for rows in (again, wells)]
    np.testing.assert_allclose(*features, rtol=1e-3, atol=1e-3)
    assert main([*common, "--channels", "Golgi"]) == 1
    assert "no channel 'Golgi'" in capsys.readouterr().err
    unnamed = PATTERN.replace("{well}", "{position}")
    assert main([*common, "--out", str(out)]) == 2
    assert "features.parquet exists, and another table would replace it" in capsys.readouterr().err
    new = str(tmp_path / "new.csv")
    command = [*common[:3], "--pattern", unnamed, "--per", "well", "--out", new]
    assert main(command) == 1  # The plate would be one row.
    assert "it has no well; name {well} in --pattern" in capsys.readouterr().err


@pytest.mark.drawn("commands", one_in=6)
def test_an_interrupted_table_of_fields_is_continued(
    plate: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Compute only what is missing, to the same table; another model or option does not continue it."""
    common = ["embed", str(trained), str(plate), "--pattern", PATTERN, "--batch-size", "4"]
    assert main([*common, "--out", str(tmp_path / "whole.csv")]) == 1
    out, read = tmp_path / "features.csv", []
    original = embed.read_field

    def stops(field: Any, *options: Any) -> Any:
        if len(read) == 5:
            raise KeyboardInterrupt
        read.append(field.key)
        return original(field, *options)

    monkeypatch.setattr(embed, "read_field", stops)
    with contextlib.suppress(KeyboardInterrupt):
        main([*common, "--out", str(out)])
    partial = tmp_path / "features.csv.partial.jsonl"
    with partial.open("a") as file:
        file.write('{"file": "torn')
    assert not out.exists()
    assert main([*common, "--out", str(out), "--channels", "ER"]) == 1
    assert "made with another set of options" in capsys.readouterr().err
    first, read[:] = list(read), []
    changed = plate / "Images" / "P_A01_s1_ER.tiff"  # of the first field, which is made again
    os.utime(changed, ns=(0, changed.stat().st_mtime_ns + 1))
    monkeypatch.setattr(embed, "read_field", lambda f, *o: read.append(f.key) or original(f, *o))
    assert main([*common, "--out", str(out)]) == 1
    assert "5 fields embedded before" in capsys.readouterr().err
    assert not set(first) & set(read) and len(read) == 16 - 4
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(tmp_path.glob("features*")) == [out]
    (tmp_path / "no.npy").write_bytes(b"nothing")
    alone = ["embed", str(trained), str(tmp_path / "no.npy"), "--out", str(tmp_path / "none.csv")]
    assert main(alone) == 1 and "no field could be embedded" in capsys.readouterr().err
    assert not list(tmp_path.glob("none*"))


@pytest.mark.drawn("commands", one_in=6)
def test_predict_names_the_commands_for_cells(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(trained), str(tmp_path / "image.npy")]) == 1
    said = capsys.readouterr().err
    assert f"fastvim channels {trained} IMAGE" in said and f"fastvim embed {trained} PATH" in said
    with pytest.raises(UserError, match="`fastvim channels RUN IMAGE` says the class"):
        Classifier.load(trained)


@pytest.mark.drawn("commands", one_in=6)
def test_channels_are_scored_and_an_image_is_explained(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def closed(*_: Any) -> None:
        raise BrokenPipeError

    plot = tmp_path / "channels.png"
    assert (
        main(
            [
                "channels",
                str(trained),
                "--subsets",
                "Mito+ER+DNA",
                "DNA+Mito",
                "ER",
                "--plot",
                str(plot),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "| x |  | x | 2 |" in shown and shown.count("\n") == 5 and plot.exists()
    assert main(["eval", str(trained), "--data.eval-channels", "DNA", "Mito", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]["raw"]
    assert f"| x |  | x | 2 | {100 * scores['top1']:.2f} | {scores['loss']:.4f} |" in shown
    for subset, message in (
        (
            "ER+DAN",
            "the subset 'ER+DAN' names 'DAN', but the model's channels are Mito, ER, DNA. Did",
        ),
        ("ER+ER", "must name one channel or several different ones"),
        ("", "must name one channel"),
    ):
        assert main(["channels", str(trained), "--subsets", subset]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="must name one channel"):  # It was taken for all.
        score_subsets(trained, [()])
    with pytest.raises(UserError, match="channels are Mito, ER, DNA, in this order"):
        score_subsets(trained, [("ER",)], channel_names=("DNA", "ER", "Mito"))
    image = tmp_path / "image.npy"
    np.save(image, np.zeros((9, 9, 3), np.uint8))
    assert main(["channels", str(trained), str(image), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert "image.npy (centre, 8 x 8 pixels): " in text and "with all channels" in text
    monkeypatch.setattr("builtins.print", closed)
    for options in ([str(image)], ["--subsets", "ER"]):
        plot.unlink()
        with pytest.raises(BrokenPipeError):  # As of `| head`, which has read enough.
            channels.run([str(trained), *options, "--plot", str(plot)])
        assert plot.exists()


def test_tiles_lie_side_by_side_around_the_centre() -> None:
    pixels = np.arange(5 * 9, dtype=np.uint8).reshape(5, 9, 1)
    tiles = list(cut_tiles(pixels, (2, 4)))
    assert len(tiles) == 4
    assert np.array_equal(tiles[0], pixels[0:2, 0:4]) and np.array_equal(tiles[3], pixels[2:4, 4:8])
    assert len(list(cut_tiles(pixels, (8, 8)))) == 1


def test_controls_have_median_zero_and_deviation_one(rng: np.random.Generator) -> None:
    features = rng.normal(3.0, 5.0, (400, 3)).astype(np.float32)
    features[:, 2] = 1.0
    wells = ["A01"] * 200 + ["B01"] * 200
    table = normalise_to_controls(Embeddings({"well": wells}, features), ["A01"])
    control = table.features[:200]
    assert np.allclose(np.median(control, axis=0), 0, atol=1e-5)
    assert np.allclose(control[:, :2].std(axis=0), 1, atol=0.25)
    assert not table.features[:, 2].any()
    with pytest.raises(UserError, match=r"no row of the control A11: .* Did you mean 'A01'"):
        normalise_to_controls(Embeddings({"well": wells}, features), ["A01", "A11"])

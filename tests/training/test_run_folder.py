"""A run folder whose small files are damaged: what can be kept is kept, what is replaced is copied, and it is said."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os

import pytest

from fastvim_jax.data import CellsData
from fastvim_jax.errors import UserError
from fastvim_jax.training.run_folder import read_class_names, read_config, start_run
from tests.training.detection.tiny import tiny_config as detection_config
from tests.training.segmentation.tiny import tiny_config as segmentation_config
from tests.training.tiny import tiny_config

CONFIG = tiny_config()
NAMES = ("cat", "dog")
DAMAGES = [
    b"",
    b"[]",
    b"{}",
    b"null",
    b'{"starts": 3}',
    b"\xff\xfe",
    b'{"starts": [',
    b"[" * 100_000,
]


@pytest.fixture
def folder(tmp_path):
    with start_run(tmp_path, CONFIG, NAMES):
        pass
    (tmp_path / "checkpoints" / "1").mkdir(
        parents=True
    )  # A run that has saved nothing may be begun anew.
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_of_starts_is_kept_aside(folder, damage, caplog):
    path = folder / "environment.json"
    path.write_bytes(damage)
    with start_run(folder, CONFIG, NAMES):
        pass
    assert len(json.loads(path.read_text())["starts"]) == 1
    assert (folder / "environment.json.damaged").read_bytes() == damage
    assert "environment.json cannot be read" in caplog.text


@pytest.mark.parametrize("damage", [*DAMAGES[:1], *DAMAGES[2:], b"[1, 2]"])
def test_damaged_class_names_are_those_of_the_data(folder, damage, caplog):
    path = folder / "classes.json"
    path.write_bytes(damage)
    with pytest.raises(UserError, match=r"cannot read the class names in .*classes\.json"):
        read_class_names(folder)
    with start_run(folder, CONFIG, NAMES):
        pass
    assert read_class_names(folder) == NAMES
    assert (folder / "classes.json.damaged").read_bytes() == damage
    assert "It is written anew" in caplog.text


def test_lost_class_names_are_those_of_the_data(folder, caplog):
    (folder / "classes.json").unlink()
    with start_run(folder, CONFIG, NAMES):
        pass
    assert read_class_names(folder) == NAMES and "It is written anew." in caplog.text


def test_other_classes_are_still_refused(folder):
    with (
        pytest.raises(UserError, match="was trained on other classes"),
        start_run(folder, CONFIG, ("cat", "fish")),
    ):
        pass


def test_the_decoder_found_is_stored_and_kept(tmp_path, monkeypatch):
    from fastvim_jax.training.runs import _with_decoder

    def decoder(config=CONFIG):
        return _with_decoder(config, tmp_path)

    assert CONFIG.data.decoder == "auto" and decoder().data.decoder == "turbo"
    with start_run(tmp_path, decoder(), NAMES):
        pass
    assert read_config(tmp_path).data.decoder == "turbo"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert decoder().data.decoder == "pillow"  # The run has nothing to resume.
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"data.decoder=turbo needs simplejpeg"):
        decoder()
    pillow = dataclasses.replace(CONFIG.data, decoder="pillow")
    assert decoder(dataclasses.replace(CONFIG, data=pillow)).data.decoder == "pillow"


def test_runs_of_dense_tasks_name_no_decoder(tmp_path, monkeypatch):
    """Let them be resumed without the fast decoder, which they never use."""
    from fastvim_jax.training.runs import _with_decoder

    for make in (segmentation_config, detection_config):
        config = make(tmp_path)
        assert _with_decoder(config, tmp_path / "run") == config


def test_a_run_whose_loss_is_no_mean_over_images_keeps_its_parts(tmp_path):
    """Batch norm and divisors are those of a part, so that another number of parts trains another model."""
    for i, config in enumerate((segmentation_config(tmp_path), detection_config(tmp_path), CONFIG)):
        data = dataclasses.replace(config.data, batch_size=8)
        config, folder = dataclasses.replace(config, data=data), tmp_path / str(i)
        with start_run(folder, config, NAMES):
            pass
        (folder / "checkpoints" / "1").mkdir(parents=True)
        mean = config.averages_images
        refusal = pytest.raises(UserError, match="accumulate: 1 there, 2 now")
        with contextlib.nullcontext() if mean else refusal:
            with start_run(folder, dataclasses.replace(config, accumulate=2), NAMES):
                pass


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b"{", b"\xff\xfe", b'{"class": "TrainConfig"}', b"[" * 100_000]
)
def test_a_damaged_config_is_named(folder, damage):
    (folder / "config.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"config\.json cannot be used: "):
        read_config(folder)


def test_a_config_of_an_earlier_version_is_read(folder):
    """Read an earlier config, whose data were of class DataConfig, and mixed over whole batches."""
    path = folder / "config.json"
    data = {"mixup": 0.8, "batch_size": 1024}
    path.write_text(
        dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **data)).to_json()
    )
    wanted = json.loads(path.read_text())
    old = json.loads(path.read_text())
    old["data"] |= {"class": "DataConfig", "mix_mode": "batch"}
    for new in ("mix_group", "background", "augment_on", "follow_links"):
        del old["data"][new]
    path.write_text(json.dumps(old))
    wanted["data"]["mix_group"] = 1024
    assert json.loads(read_config(folder).to_json()) == wanted
    old["data"]["mix_mode"] = "image"
    path.write_text(json.dumps(old))
    with pytest.raises(UserError, match="mix_mode"):
        read_config(folder)


@pytest.mark.parametrize("name", ["config.json", "classes.json"])
def test_no_fifo_is_opened_in_a_run_folder(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"is no run folder|{name}.*not a regular file"):
        (read_config if name == "config.json" else read_class_names)(folder)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("fields/{split}/{class}/{well}_{channel}.tif", "HERE/fields/{split}/{class}/{well}_{channel}.tif"),
        ("fields", "HERE/fields"),
        ("$DATA/fields", "$DATA/fields"),
        ("memory://far/{split}/x", "memory://far/{split}/x"),
    ],
)  # fmt: skip
def test_the_datas_path_is_stored_for_any_folder(given, stored, tmp_path, monkeypatch):
    """Store the folder of a naming pattern, too: such a run could be evaluated from one folder only."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fields").mkdir()
    image = {"channels": 1, "channel_names": (), "image_size": CONFIG.data.image_size}
    data = CellsData(source="channel_files", path=given, mean=(0.0,), std=(1.0,), **image)
    with start_run(tmp_path / "run", dataclasses.replace(CONFIG, data=data), NAMES):
        pass
    assert read_config(tmp_path / "run").data.path == stored.replace("HERE", str(tmp_path))

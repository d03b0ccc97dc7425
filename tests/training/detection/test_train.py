"""A few steps of a real detection run: it resumes to the same bits, evaluates boxes and masks, and draws."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from fastvim_jax.cli.main import main
from fastvim_jax.data.detection import open_coco
from fastvim_jax.data.detection_config import DetectionData
from fastvim_jax.data.device_transforms import make_preprocess
from fastvim_jax.errors import UserError
from fastvim_jax.inference.detect import category_ids, make_detector
from fastvim_jax.inference.drawings import draw_files
from fastvim_jax.models import build_model
from fastvim_jax.models.parameters import parameter_infos
from fastvim_jax.training import load_run, read_metrics, train
from fastvim_jax.training.detection.evaluation import as_coco, class_scores, judge, worst
from fastvim_jax.training.detection.run_scores import score_run
from fastvim_jax.training.start_from import fit
from fastvim_jax.training.tasks import config_from_json
from fastvim_jax.training.weights_source import Source
from tests.support import data_dir
from tests.training.compare_runs import assert_same_run
from tests.training.detection.tiny import CLASSES, copy_real_images, draw_scenes, tiny_config
from tests.training.segmentation.tiny import tiny_config as segmentation_config

pytest.importorskip("pycocotools")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "coco"
    draw_scenes(root, np.random.default_rng(0))
    return root


@pytest.fixture(scope="module")
def images(scenes, tmp_path_factory):
    """Return the data set's folder and its classes: real images, with a crowd, where there are any; else drawn ones."""
    if data_dir() is None:
        return scenes, CLASSES
    root = tmp_path_factory.mktemp("images") / "coco"
    return root, copy_real_images(root, data_dir() / "coco_tiny")


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(tiny_config(images[0]), folder, progress=False)


def test_a_run_ends_with_scores_a_picture_and_a_table(images, finished):
    folder, result = finished
    assert result.step == 4 and "box AP" in result.headline
    assert result.metrics["count"] == 3
    assert 0 <= result.metrics["raw_bbox_ap"] <= 1 and 0 <= result.metrics["raw_segm_ap"] <= 1
    records = read_metrics(folder, "train")
    parts = [
        "rpn_cls",
        "rpn_box",
        *(f"s0_{kind}" for kind in ("cls", "box", "mask")),
    ]
    for record in records:
        assert record["loss"] == pytest.approx(
            sum(record[f"{part}_loss"] for part in parts), rel=1e-5
        )
    assert len(records) == 4
    with Image.open(folder / "eval_detections.png") as picture:
        assert picture.size[0] > 600
    table = (folder / "eval_class_scores.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table[1:]] == list(images[1])
    assert json.loads((folder / "classes.json").read_text()) == list(images[1])


def test_a_run_goes_on_from_an_earlier_checkpoint_to_the_same_bits(
    images, finished, tmp_path, capsys, monkeypatch
):
    """Restore three of four steps; that any interruption leaves such a folder is tested with the classifier."""
    resumed = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(resumed / "checkpoints" / "4")
    monkeypatch.setattr(DetectionData, "notes", ("A note on the settings.",))
    train(tiny_config(images[0]), resumed)
    assert_same_run(resumed, finished[0])
    shown = capsys.readouterr().err
    assert "instances_train2017.json: images without objects (1)." in shown
    assert "A note on the settings." in shown


@pytest.mark.drawn("commands", one_in=6)
def test_files_are_drawn_and_written_as_coco(images, finished, tmp_path):
    # The same program as the evaluation's, but for one image: two sizes, one compilation.
    run = load_run(finished[0])
    (tmp_path / "no.jpg").write_bytes(b"no image")
    files = [*sorted((images[0] / "val2017").iterdir())[:2], tmp_path / "no.jpg"]
    drawings = draw_files(run, files, tmp_path / "out")
    assert [drawing.error is None for drawing in drawings] == [True, True, False]
    content = json.loads((tmp_path / "out/detections.json").read_text())
    assert [image["id"] for image in content["images"]] == [1, 2]
    source = open_coco(run.config.data, "train2017")
    ids = dict(zip(source.category_ids, images[1], strict=True))
    assert {c["id"]: c["name"] for c in content["categories"]} == ids
    assert {found["category_id"] for found in content["annotations"]} <= set(ids)
    (shutil.copytree(finished[0], tmp_path / "run") / "class_ids.json").write_text("[3]")
    assert category_ids(load_run(tmp_path / "run")) == tuple(range(len(ids)))
    assert content["annotations"] and len(drawings[0].found) <= run.config.model.detections
    for found in content["annotations"]:
        image = content["images"][found["image_id"] - 1]
        assert found["segmentation"]["size"] == [image["height"], image["width"]]
        x, y, w, h = found["bbox"]
        assert (
            min(x, y, w, h) >= 0
            and x + w <= image["width"] + 0.01
            and y + h <= image["height"] + 0.01
        )
    with Image.open(drawings[0].written[0]) as drawn, Image.open(files[0]) as image:
        assert drawn.size == image.size


@pytest.mark.drawn("commands", one_in=6)
def test_a_run_is_evaluated_from_the_command_line(images, finished, scenes, capsys):
    """Compare with the scores of the run's last evaluation, and refuse data of other categories."""
    folder, result = finished
    assert main(["eval", str(folder), "--json", "--per-class"]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = found["scores"]
    for name in ("count", "bbox_ap", "segm_ap", "segm_ap_small"):
        key = name if name == "count" else f"raw_{name}"
        assert scores[name] == result.metrics[key]
    assert [row["class"] for row in scores["classes"]] == list(images[1])
    assert main(["eval", str(folder), "--per-class"]) == 0
    lines = capsys.readouterr().out.splitlines()[-1 - len(images[1]) :]
    assert lines[0].split() == ["box", "AP", "mask", "AP", "objects", "class"]
    assert [int(line.split()[2]) for line in lines[1:]] == [r["objects"] for r in scores["classes"]]
    if images[0] != scenes:
        assert main(["eval", str(folder), "--path", str(scenes)]) == 1
        assert "knows the 2 categories" in capsys.readouterr().err


@pytest.mark.drawn("commands", one_in=6)
def test_images_are_padded_to_a_short_list_of_sizes(images, finished, tmp_path):
    """Evaluate and detect with less padding: a model of that size gives the same boxes."""
    folder, result = finished
    run = load_run(folder)
    root = shutil.copytree(images[0], tmp_path / "flat")
    file = root / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    first = content["images"][0]
    with Image.open(root / "val2017" / first["file_name"]) as image:
        flat = image.crop((0, 0, image.width, first["width"] // 3))
    flat.save(root / "val2017" / first["file_name"])
    first["height"] = flat.height
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first["id"]]
    file.write_text(json.dumps(content))
    sizes = ((64, 32), (32, 64))
    data = dataclasses.replace(run.config.data, eval_sizes=sizes, path=str(root), eval_batch_size=2)
    several = score_run(folder, data)
    assert several.count == result.metrics["count"]
    assert 0 <= several.scores["bbox_ap"] <= 1
    smaller = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 64, 3), np.uint8)
    found = make_detector(smaller)(pixels)
    # A model of that size, with the part of the position table that belongs to it, is the reference.
    backbone = dataclasses.replace(run.config.model.backbone, image_size=(32, 64))
    model = build_model(dataclasses.replace(run.config.model, backbone=backbone), rngs=nnx.Rngs(0))
    state = nnx.state(run.model)
    table = state["backbone"]["pos_embed"]
    state["backbone"]["pos_embed"] = table.replace(
        table[...].reshape(1, 4, 4, -1)[:, :2].reshape(1, 8, -1)
    )
    nnx.update(model, state)
    padded = np.pad(pixels, ((0, 2), (0, 0), (0, 0)), constant_values=data.pad_value)
    model.eval()
    answer = jax.jit(lambda x: model(x))(make_preprocess(data)(jnp.asarray(padded[None])))
    answer = jax.tree.map(lambda x: np.asarray(x[0]), answer)
    expected = as_coco(answer, 30, 64, category_ids(run))
    assert found and len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one["category_id"] == other["category_id"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.01)


@pytest.mark.drawn("trainings", one_in=6)
def test_boxes_alone_are_trained_and_evaluated(images, tmp_path):
    """Train a Faster R-CNN: one stage and no masks, from data without masks."""
    config = tiny_config(images[0], epochs=1)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, masks=False),
        data=dataclasses.replace(config.data, masks=False),
    )
    result = train(config, tmp_path / "run", progress=False)
    records = read_metrics(tmp_path / "run", "train")
    assert len(records) == result.step == 2
    parts = ("rpn_cls_loss", "rpn_box_loss", "s0_cls_loss", "s0_box_loss")
    for record in records:
        assert {key for key in record if key.endswith("_loss")} == set(parts)
        assert record["loss"] == pytest.approx(sum(record[part] for part in parts), rel=1e-5)
        assert record["s0_cls_loss"] > 0 and np.isfinite(record["loss"])
    assert result.metrics["count"] == 3 and 0 <= result.metrics["raw_bbox_ap"] <= 1
    assert not any("segm" in key for key in result.metrics)
    assert (tmp_path / "run" / "eval_detections.png").is_file()


def test_a_config_survives_its_file(scenes):
    config = tiny_config(scenes)
    data = dataclasses.replace(config.data, eval_sizes=((32, 64), (64, 32)))
    config = dataclasses.replace(config, data=data)
    assert config_from_json(config.to_json()) == config


def test_a_detector_that_finds_nothing_has_a_mask_ap_of_zero(scenes):
    source = open_coco(tiny_config(scenes).data, "val2017")
    scores = judge(source, [], [0, 1], masks=True)
    assert scores["bbox_ap"] == scores["segm_ap"] == 0
    assert "segm_ap" not in judge(source, [], [0, 1], masks=False)
    rows = class_scores(source, [], [0, 1], masks=True)
    assert [(row["segm_ap"], row["objects"]) for row in rows] == [(0, 2), (0, 2)]


def test_the_worst_images_are_those_with_the_most_mistakes(scenes, caplog):
    source = open_coco(tiny_config(scenes).data, "train2017")
    detections = []
    for index in (0, 1, 2):
        objects = source.objects(index)
        for box, label in list(zip(objects.boxes, objects.labels, strict=True))[: 2 - index]:
            x1, y1, x2, y2 = map(float, box)
            found = {"image_id": source.image_ids[index], "category_id": source.category_ids[label]}
            detections.append({**found, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": 0.9})
    # All of image 0 is found, one object of image 1, none of image 2; image 4 is empty and stays so.
    with jax.log_compiles():
        assert worst(source, detections, [0, 1, 2, 4], 9) == [2, 1]
    # A program for every pair of numbers of boxes takes 0.7 s each, of which COCO has hundreds.
    assert "Compiling" not in caplog.text
    wrong = detections[0] | {"image_id": source.image_ids[4]}
    assert worst(source, [*detections, wrong], [0, 1, 2, 4], 3) == [2, 1, 4]
    assert worst(source, [d | {"score": 0.1} for d in detections], [0, 1, 2], 2) == [0, 1]


def test_a_detector_starts_from_a_classifier(scenes):
    config = tiny_config(scenes).model
    there = dataclasses.replace(config.backbone, image_size=32, num_classes=10, out_indices=())
    shapes = {}
    for name, model in (("there", there), ("here", config)):
        built = nnx.eval_shape(lambda model=model: build_model(model, rngs=nnx.Rngs(0)))
        infos = parameter_infos(nnx.state(built))
        shapes[name] = {n: info.shape for info in infos for n in info.unstacked_names()}
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes["there"].items()}
    found, report = fit(Source("a run", arrays, config=there), shapes["here"], config=config)
    assert report.names("resized") == ["backbone.pos_embed"]
    assert found["backbone.pos_embed"].shape == shapes["here"]["backbone.pos_embed"]
    taken = {name for name in shapes["here"] if name.startswith("backbone.blocks.")}
    assert taken <= set(report.names("taken"))
    parts = {name.split(".")[0] for name in report.names("drawn")}
    assert parts == {"backbone", "neck", "rpn", "stages"}  # of the backbone, the norm of its output
    assert set(report.names("left")) >= {"head.kernel", "head.bias"}


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_head_for_as_many_other_classes_is_drawn_anew(scenes, task):
    """Draw all that belongs to the classes, and nothing else, whatever else has as many entries."""
    config = tiny_config(scenes).model if task == "detection" else segmentation_config(scenes).model
    config = dataclasses.replace(config, num_classes=3)  # as many as the anchors of a cell
    built = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    shapes = {
        n: info.shape for info in parameter_infos(nnx.state(built)) for n in info.unstacked_names()
    }
    source = Source("a run", {n: np.ones(s) for n, s in shapes.items()}, config, ("a", "b", "c"))
    layers = {
        "detection": [
            f"stages.0.{x}" for x in ("box_head.cls", "box_head.reg", "mask_head.logits")
        ],
        "segmentation": ["decode_head.classifier.conv", "auxiliary_head.classifier.conv"],
    }[task]
    for names, drawn in ((("a", "b", "d"), layers), (("a", "b", "c"), [])):
        _, report = fit(source, shapes, config=config, class_names=names)
        expected = {f"{layer}.{each}" for layer in drawn for each in ("kernel", "bias")}
        assert set(report.names("drawn")) == expected


def test_impossible_configs_are_refused(scenes, tmp_path):
    config = tiny_config(scenes)
    with pytest.raises(UserError, match="multiples of 32"):
        backbone = dataclasses.replace(config.model.backbone, image_size=80)
        model = dataclasses.replace(config.model, backbone=backbone)
        tiny_config(scenes, model=model, data=dataclasses.replace(config.data, image_size=80))
    with pytest.raises(UserError, match="data.masks=False"):
        tiny_config(scenes, data=dataclasses.replace(config.data, masks=False))
    with pytest.raises(UserError, match="image_size"):
        tiny_config(scenes, data=dataclasses.replace(config.data, image_size=96))
    wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=5))
    with pytest.raises(UserError, match=r"set model\.num_classes=2"):
        train(wrong, tmp_path / "run", progress=False)

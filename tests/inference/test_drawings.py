"""Files are drawn on as they were trained on, and every file has drawings of its own."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from fastvim_jax.errors import UserError
from fastvim_jax.inference import detect, segment
from fastvim_jax.inference.drawings import draw_files, output_names, require_pixels
from fastvim_jax.training.run_folder import Run
from tests.training.detection import tiny as detection
from tests.training.segmentation import tiny as segmentation


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_transparent_pixels_show_the_background_of_the_run(tmp_path, monkeypatch, task):
    seen = []
    tiny, module, maker = {
        "segmentation": (segmentation, segment, "make_segmenter"),
        "detection": (detection, detect, "make_detector"),
    }[task]
    config = tiny.tiny_config(tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, background=70))

    def look(image):
        seen.append(image)
        return np.zeros(image.shape[:2], np.int32) if task == "segmentation" else []

    monkeypatch.setattr(module, maker, lambda run: look)
    run = Run(nnx.Module(), config, tiny.CLASSES, 0, "raw")
    Image.new("RGBA", (5, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    (tmp_path / "no.png").write_bytes(b"no image")
    done = []
    files = [tmp_path / "clear.png", tmp_path / "no.png"]
    drawing, wrong = draw_files(run, files, tmp_path, progress=lambda *seen: done.append(seen))
    assert drawing.error is None and wrong.error is not None
    assert done == [(1, 2), (2, 2)]
    np.testing.assert_array_equal(seen[0], np.full((4, 5, 3), 70))


def test_the_area_of_a_detection_is_that_of_its_mask(tmp_path, monkeypatch):
    masks = pytest.importorskip("pycocotools.mask")
    drawn = np.zeros((6, 8), np.uint8, order="F")
    drawn[1:3, 2:7] = 1
    packed = masks.encode(drawn)
    shape = {"size": packed["size"], "counts": packed["counts"].decode()}
    box = {"category_id": 0, "bbox": [2.0, 1.0, 5.0, 4.0], "score": 0.9}
    monkeypatch.setattr(
        detect, "make_detector", lambda run: lambda image: [box | {"segmentation": shape}, box]
    )
    config = detection.tiny_config(tmp_path)
    Image.new("RGB", (8, 6)).save(tmp_path / "it.png")
    detect.draw_files(
        Run(nnx.Module(), config, ("a", "b"), 0, "raw"), [tmp_path / "it.png"], tmp_path
    )
    written = json.loads((tmp_path / "detections.json").read_text())["annotations"]
    assert [each["area"] for each in written] == [10, 20]


@pytest.mark.parametrize("ending", ["stopped", "killed"])
def test_what_was_detected_before_an_interruption_is_kept(tmp_path, monkeypatch, ending):
    box = {"category_id": 0, "bbox": [2.0, 1.0, 5.0, 4.0], "score": 0.9}
    found = iter([[box], [box, box]])

    def look(image):
        for each in found:
            return each
        if ending == "killed":  # Nothing is written any more.
            monkeypatch.setattr(detect._CocoFile, "save", lambda results: None)
        raise KeyboardInterrupt

    monkeypatch.setattr(detect, "make_detector", lambda run: look)
    monkeypatch.setattr(detect, "SAVE_SECONDS", 0.0 if ending == "killed" else 60.0)
    files = [tmp_path / f"{name}.png" for name in "abc"]
    for file in files:
        Image.new("RGB", (8, 6)).save(file)
    config = detection.tiny_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        detect.draw_files(Run(nnx.Module(), config, ("a", "b"), 0, "raw"), files, tmp_path)
    written = json.loads((tmp_path / "detections.json").read_text())
    assert [each["file_name"] for each in written["images"]] == [str(file) for file in files[:2]]
    assert [each["image_id"] for each in written["annotations"]] == [1, 2, 2]


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_what_is_no_pixels_is_refused(tmp_path, monkeypatch, task):
    """Refuse floats from 0 to 1 above all: they were taken for black images, without a word."""
    tiny, make = {
        "segmentation": (segmentation, segment.make_segmenter),
        "detection": (detection, detect.make_detector),
    }[task]
    predict = make(Run(nnx.Module(), tiny.tiny_config(tmp_path), tiny.CLASSES, 0, "raw"))
    pixels = np.zeros((6, 8, 3), np.uint8)
    for wrong in (pixels / 255, pixels[None], pixels[..., :2], pixels[:0], pixels.tolist()):
        with pytest.raises(UserError, match="must be a NumPy array h w 3 of uint8 RGB pixels"):
            predict(wrong)
    np.testing.assert_array_equal(require_pixels(pixels[..., 0]), pixels)


def test_no_two_files_share_a_name():
    files = ["x/a.jpg", "y/a.jpg", "a_1.jpg", "b.png", "z/A_1.png"]
    names = output_names(files)
    assert len({name.lower() for name in names}) == len(files)
    assert names[3] == "b"
    assert output_names(["b.png", "c/a_1.jpg"]) == ["b", "a_1"]

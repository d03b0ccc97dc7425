"""Images with label maps: folders and patterns, what labels mean, batches, and masks that are wrong."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.cli.main import main
from fastvim_jax.data.detection_config import DetectionData
from fastvim_jax.data.geometry import (
    Scene,
    crop,
    fitted_size,
    flip,
    pad,
    resize,
    resize_image,
)
from fastvim_jax.data.prepare.check_masks import check_masks
from fastvim_jax.data.records import DecodeError
from fastvim_jax.data.segmentation import (
    EvaluationImages,
    load_scene,
    make_train_iterator,
    open_masks,
    relabel,
)
from fastvim_jax.data.segmentation_config import SegmentationData
from fastvim_jax.data.sources.mask_folder import MaskFolderSource, read_mask
from fastvim_jax.errors import UserError
from tests.training.segmentation.tiny import draw_scenes


def signed(labels: np.ndarray, unlabelled: int) -> bytes:
    """Return a TIFF of signed numbers, as programs write it that mark unlabelled pixels by a negative one."""
    file = io.BytesIO()
    values = np.where(labels == 2, unlabelled, labels.astype(np.int32))
    Image.fromarray(values).save(file, "TIFF")
    return file.getvalue()


@pytest.fixture
def root(tmp_path: Path, rng: np.random.Generator) -> Path:
    draw_scenes(tmp_path, rng)
    return tmp_path


def config(root: Path, **changes) -> SegmentationData:
    options = {
        "path": str(root),
        "image_size": 32,
        "batch_size": 2,
        "fit": (64, 40),
        "eval_stride": 20,
    }
    return SegmentationData(**{**options, **changes})


def encoded(pixels: np.ndarray, kind: str = "PNG", palette: bytes | None = None) -> bytes:
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if palette:
        image.putpalette(palette)
    image.save(file, kind)
    return file.getvalue()


def test_batches_are_the_same_again_and_go_on_where_they_were(root):
    batches = make_train_iterator(config(root), seed=3)
    taken = [next(batches) for _ in range(3)]
    state = batches.get_state()
    after = next(batches)
    batches.close()
    resumed = make_train_iterator(config(root), seed=3)
    first = next(resumed)
    np.testing.assert_array_equal(first["image"], taken[0]["image"])
    resumed.set_state(state)
    for key, value in next(resumed).items():
        np.testing.assert_array_equal(value, after[key])
    resumed.close()
    assert taken[0]["image"].shape == (2, 32, 32, 3) and taken[0]["label"].dtype == np.uint8
    for batch in taken:
        for label, (height, width) in zip(batch["label"], batch["size"], strict=True):
            assert (label[height:] == 255).all() and (label[:, width:] == 255).all()
            assert set(np.unique(label)) <= {0, 1, 2, 255}


def test_a_set_smaller_than_a_batch_repeats_in_it(root):
    batches = make_train_iterator(config(root, batch_size=6), seed=0)
    assert batches.steps_per_epoch == 1 and next(batches)["image"].shape[0] == 6
    batches.close()
    assert make_train_iterator(config(root, repeat=5), seed=0).steps_per_epoch == 10


def test_evaluation_keeps_the_masks_size_and_order(root, monkeypatch):
    images, read, reads = EvaluationImages(config(root)), MaskFolderSource.__getitem__, []

    def counted(source, index):
        if source is images.source:  # Threads of other tests may still read ahead.
            reads.append(index)
        return read(source, index)

    monkeypatch.setattr(MaskFolderSource, "__getitem__", counted)
    found = list(images)
    assert sorted(reads) == [0, 1]  # Each file is read once.
    assert [Path(each.name).name for each in found] == ["scene_0.jpg", "scene_1.jpg"]
    for each in found:
        with Image.open(root / "annotations/validation" / f"{Path(each.name).stem}.png") as mask:
            np.testing.assert_array_equal(each.label, np.asarray(mask))
        assert min(each.image.shape[:2]) == 40 or max(each.image.shape[:2]) == 64


@pytest.mark.drawn("data pipelines", one_in=6)
def test_workers_of_an_evaluation_stay_for_the_next(root):
    import multiprocessing

    def workers():
        return {child.pid for child in multiprocessing.active_children()}

    before = workers()
    names = [Path(each.name).name for each in EvaluationImages(config(root))]
    images = EvaluationImages(config(root, workers=1))
    assert [Path(each.name).name for each in images] == names
    started = workers() - before
    assert len(started) == 1
    assert [Path(each.name).name for each in images] == names
    assert workers() - before == started
    part = iter(images)
    assert Path(next(part).name).name == names[0]
    part.close()  # The next pass begins at the first image again.
    assert workers() == before
    assert Path(next(iter(images)).name).name == names[0]
    images.close()
    assert workers() == before


def test_patterns_span_folders(root):
    """List files by patterns that span folders, as in Cityscapes: one folder per city, and endings that differ."""
    for split in ("training",):
        (root / "left" / split / "city").mkdir(parents=True)
        (root / "fine" / split / "city").mkdir(parents=True)
        for i in range(2):
            shutil.copy(
                root / f"images/{split}/scene_{i}.jpg", root / f"left/{split}/city/{i}_left.jpg"
            )
            shutil.copy(
                root / f"annotations/{split}/scene_{i}.png", root / f"fine/{split}/city/{i}_ids.png"
            )
    patterns = {
        "image_pattern": "left/{split}/{name}_left.*", "mask_pattern": "fine/{split}/{name}_ids.png",
    }  # fmt: skip
    source = open_masks(config(root, **patterns), "training")
    assert len(source) == 2 and source[0].name.endswith("city/0_left.jpg")
    with pytest.raises(UserError, match="name"):
        open_masks(config(root, mask_pattern="fine/x.png"), "training")


def test_linked_folders_are_read_and_hidden_ones_are_not(root, tmp_path_factory):
    """Read linked folders, which were left out without a word, and leave out hidden ones."""
    for folder, ending in (("images", "jpg"), ("annotations", "png")):
        training = root / folder / "training"
        (root / "more" / folder).mkdir(parents=True)
        shutil.copy(training / f"scene_0.{ending}", root / "more" / folder / f"again.{ending}")
        (training / "linked").symlink_to(root / "more" / folder)
        shutil.copytree(root / "more" / folder, training / ".ipynb_checkpoints")
    source = open_masks(config(root), "training")
    assert len(source) == 5 and source[0].name.endswith("training/linked/again.jpg")
    outside = tmp_path_factory.mktemp("elsewhere") / "images"
    (root / "more/images").rename(outside)
    (root / "images/training/linked").unlink()
    (root / "images/training/linked").symlink_to(outside)
    with pytest.raises(UserError, match="is a link out of the data set's folder"):
        open_masks(config(root), "training")
    assert len(open_masks(config(root, follow_links=True), "training")) == 5


def test_a_run_says_which_masks_it_leaves_out_and_that_it_has_one_split(root):
    """Say so in training too: images of another type were left out without a word."""
    settings = config(root)
    assert open_masks(settings, "training").notes == () == settings.notes
    images = root / "images/training"
    with Image.open(images / "scene_1.jpg") as image:
        image.save(images / "scene_1.png")
    (images / "scene_1.jpg").unlink()
    (images / "scene_2.jpg").rename(images / "scene_2.JPG")
    (note,) = open_masks(settings, "training").notes
    assert "2 masks have no image at 'images/training/{name}.jpg'" in note and "scene_1.png" in note
    of_any_type = config(root, image_pattern="images/{split}/{name}.*")
    source = open_masks(of_any_type, "training")
    assert len(source) == 4 and source.notes == ()
    pattern = {
        "image_pattern": "images/training/{name}.*",
        "mask_pattern": "annotations/training/{name}.png",
    }
    assert "evaluation reads what training reads" in config(root, **pattern).notes[0]
    assert DetectionData(path="x").notes == ()
    (note,) = config(root, eval_split="training").notes
    assert "train_split and data.eval_split are both 'training'" in note
    assert "data.annotations" in DetectionData(path="x", annotations="all.json").notes[0]


def test_a_class_list_that_would_have_no_effect_is_refused():
    with pytest.raises(UserError, match="data.class_list .* JSON file's categories"):
        DetectionData(path="x", class_list="names.txt")


def test_two_images_of_one_name_are_refused(root):
    shutil.copy(root / "images/training/scene_1.jpg", root / "images/training/scene_1.jpeg")
    with pytest.raises(UserError, match=r"scene_1.jpeg and .*scene_1.jpg both match"):
        open_masks(config(root, image_pattern="images/{split}/{name}.*"), "training")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Idx,Name\n1,mur\n2,fenêtre\n3,ciel\n".encode("latin-1"), None),
        ("\ufeffIdx,Name\n1,wall\n2,box\n3,sky\n".encode(), None),
        (b"Idx,Name\n1,wall\n2\n3,sky\n", r"row 2 has no name"),
        (b"Idx,Name\n1,wall\n2,\x00\x80\n", r"is no text"),
        (b"Idx,Title\n1,wall\n", r"needs a header"),
        (b"", r"needs a header"),
        (b"Idx,Name\n1," + b"x" * 200_000 + b"\n", r"cannot be read as a table"),
    ],
)
def test_class_tables_are_read_as_people_have_them_or_named(root, content, message):
    (root / "classes.txt").unlink()
    (root / "objectInfo150.csv").write_bytes(content)
    if message is None:
        source = open_masks(config(root, zero_is_ignored=True), "training")
        assert len(source.class_names) == 3
        with pytest.raises(UserError, match="zero_is_ignored"):
            open_masks(config(root), "training")
        return
    with pytest.raises(UserError, match=rf"objectInfo150.csv.*{message}"):
        open_masks(config(root, zero_is_ignored=True), "training")


def test_missing_masks_are_counted_and_named(root):
    (root / "annotations/training/scene_1.png").unlink()
    with pytest.raises(
        UserError, match=r"of 4 images.* 1 lacks a mask.*scene_1.jpg.*Add the masks"
    ):
        open_masks(config(root), "training")


def test_labels_of_one_shift():
    raw = np.asarray([0, 1, 150, 255])
    np.testing.assert_array_equal(relabel(raw, zero_is_ignored=True), [255, 0, 149, 255])
    np.testing.assert_array_equal(relabel(raw), raw)
    np.testing.assert_array_equal(relabel(raw, ignored_label=1), [0, 255, 150, 256])


def test_a_class_list_that_counts_from_one_makes_zero_unlabelled(root, capsys):
    """Take zero as unlabelled if the class list counts from one, as ADE20K's does.

    Nothing else tells where no image has the last class.
    """
    (root / "classes.txt").unlink()
    (root / "objectInfo150.csv").write_text("Idx,Name\n1,wall;side\n2,box\n3,sky\n4,bar\n")
    with pytest.raises(UserError, match="taken for the class after its own"):
        open_masks(config(root), "training")
    source = open_masks(config(root, zero_is_ignored=True), "training")
    assert source.class_names == ("wall", "box", "sky", "bar")
    assert set(np.unique(load_scene(source, 0, config(root, zero_is_ignored=True)).mask)) <= {
        0,
        1,
        255,
    }
    assert main(["data", "check", str(root)]) == 0
    out = capsys.readouterr().out
    assert "2 of 4 classes" in out and "--data.zero-is-ignored" in out


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda m: encoded(np.stack([m, m * 2, m], -1)), "colours instead of class numbers"),
        (lambda m: encoded(m, "JPEG"), "JPEG"),
        (lambda m: encoded(m, "WEBP"), "lossy WebP"),
        (lambda m: encoded(m[:-1]), "pixels, its image"),
        (lambda m: encoded(m + 1), "zero_is_ignored"),
        (lambda m: encoded(m.astype(np.uint16) * 300), "outside the 3 classes"),
        (lambda m: signed(m, -1), "labels -1 outside the 3 classes, which are labelled 0 to 2"),
        (lambda m: signed(m, -2), "labels -2 outside the 3 classes, which are labelled 0 to 2"),
        (
            lambda m: encoded(np.where(m == 2, 65535, m.astype(np.uint16))),
            "set data.ignored_label=65535",
        ),
        (lambda m: b"no image", r"scene_0.png.*\(not an image"),
        (lambda m: b"", r"scene_0.png.*\(the file is empty"),
    ],
)
def test_wrong_masks_are_named_with_the_fix(root, mask, message):
    file = root / "annotations/training/scene_0.png"
    with Image.open(file) as opened:
        labels = np.asarray(opened).copy()
    labels[labels == 255] = 2
    file.write_bytes(mask(labels))
    source = open_masks(config(root), "training")
    with pytest.raises(DecodeError, match=message) as raised:
        load_scene(source, 0, config(root))
    assert "scene_0" in str(raised.value)
    # In training they stop the run, or are replaced and counted.
    batches = make_train_iterator(config(root, batch_size=4), seed=0)
    with pytest.raises(DecodeError, match="max_corrupt"):
        next(batches)
    batches.close()
    batches = make_train_iterator(config(root, batch_size=4, max_corrupt=1), seed=0)
    next(batches)
    assert batches.corrupt == {0}
    batches.close()


def test_strips_are_trained_on_and_evaluated(root):
    """Keep a pixel of the width of a strip so long that its width is rounded to none."""
    assert fitted_size((2, 5000), 64, 32) == (1, 64) and fitted_size((5000, 2), 64, 32) == (64, 1)
    for folder, file in (("images", "scene_0.jpg"), ("annotations", "scene_0.png")):
        strip = np.zeros((2, 5000, 3) if folder == "images" else (2, 5000), np.uint8)
        Image.fromarray(strip).save(root / folder / "training" / file)
    few = config(root, batch_size=4, fit=(64, 32))
    batches = make_train_iterator(few, seed=0)
    assert next(batches)["size"].min() == 1 and not batches.corrupt
    batches.close()
    images = EvaluationImages(few, "training")
    assert next(iter(images)).image.shape == (1, 64, 3)
    images.close()


def test_a_set_without_a_good_mask_says_why(root):
    for file in (root / "annotations/training").iterdir():
        with Image.open(file) as opened:
            labels = np.asarray(opened).copy()
        file.write_bytes(encoded(np.where(labels == 255, 255, labels + 1).astype(np.uint8)))
    batches = make_train_iterator(config(root, max_corrupt=9), seed=0)
    with pytest.raises(UserError, match=r"cannot be read, the last because: .*zero_is_ignored"):
        next(batches)
    batches.close()


def test_lossless_webp_masks_are_read(rng):
    labels = rng.integers(0, 20, (9, 7), np.uint8)
    for options in ({}, {"exif": Image.Exif().tobytes()}):  # Metadata make an extended file.
        file = io.BytesIO()
        Image.fromarray(labels).save(file, "WEBP", lossless=True, **options)
        np.testing.assert_array_equal(read_mask(file.getvalue(), name="m"), labels)


def test_deep_grey_and_palette_masks_are_read():
    labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for data in (
        encoded(labels),
        encoded(labels.astype(np.uint16)),
        encoded(labels, palette=bytes(range(30))),
        encoded(np.stack([labels] * 3, -1)),
    ):
        np.testing.assert_array_equal(read_mask(data, name="mask"), labels)


def test_the_scan_lists_what_is_wrong(root):
    masks = root / "annotations/training"
    (masks / "scene_0.png").unlink()
    (masks / "other.png").write_bytes((masks / "scene_1.png").read_bytes())
    (masks / "scene_2.png").write_bytes(b"")
    settings = config(root)
    report = check_masks(open_masks(settings, "training", allow_missing=True), settings)
    assert [p.kind for p in report.problems] == ["missing", "stray", "unreadable"]
    assert report.records == 4 and report.images.tolist() == [2, 2, 2]
    shifted = config(root, zero_is_ignored=True)
    report = check_masks(open_masks(shifted, "training", allow_missing=True), shifted)
    assert report.problems[0].kind == "off by one"


def test_the_command_line_knows_the_layout(root, capsys):
    assert main(["data", "check", str(root)]) == 0
    out = capsys.readouterr().out
    assert "training: 4 images, 3 of 3 classes" in out and "validation: 2 images" in out
    assert "--model.num-classes 3 --data.no-zero-is-ignored" in out
    for folder in ("images", "annotations"):
        (root / folder / "training").rename(root / folder / "train_small")
    assert main(["data", "check", str(root)]) == 0
    assert (
        "--model.num-classes 3 --data.train-split train_small --data.no" in capsys.readouterr().out
    )
    for folder in ("images", "annotations"):
        (root / folder / "train_small").rename(root / folder / "training")
        (root / folder / "validation").rename(root.parent / f"{root.name}_{folder}")
    assert main(["data", "check", str(root)]) == 0
    assert "--model.num-classes 3 --data.eval-split training --data.no" in capsys.readouterr().out
    (root / "annotations/training/scene_1.png").unlink()
    assert main(["data", "check-masks", str(root), "--split", "training"]) == 1
    assert "missing: images/training/scene_1.jpg" in capsys.readouterr().out


def test_geometry_moves_image_mask_and_boxes_alike(rng):
    """Find a box drawn into image and mask where the boxes say, after every move."""
    image = np.zeros((20, 30, 3), np.uint8)
    image[4:12, 6:18] = 200
    scene = Scene(image, (image[..., 0] > 0).astype(np.uint8), np.asarray([[6.0, 4, 18, 12]]))
    moved = pad(flip(crop(resize(scene, (40, 60)), 4, 8, (30, 40))), (40, 64), image=7, mask=255)
    assert moved.size == (40, 64) and moved.mask.shape == (40, 64)
    x1, y1, x2, y2 = moved.boxes[0].astype(int)
    rows, columns = np.nonzero(moved.mask == 1)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (y1, y2, x1, x2)
    assert (moved.image[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] == 200).all()
    assert (moved.mask[30:] == 255).all() and (moved.image[30:] == 7).all()
    noise = rng.integers(0, 256, (17, 23, 3), dtype=np.uint8)
    whole = resize_image(noise, (31, 40))
    part = resize_image(noise, (31, 40), top=3, left=5, region=(20, 30))
    np.testing.assert_array_equal(part, whole[3:23, 5:35])

"""Objects move with their image, and bad annotations are counted, not fatal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.cli.main import main
from fastvim_jax.data.detection import (
    Placement,
    boxes_of,
    draw_placement,
    fit,
    fit_image,
    make_eval_iterator,
    make_train_iterator,
    open_coco,
    place,
    place_objects,
)
from fastvim_jax.data.detection_config import DetectionData
from fastvim_jax.data.sources.coco import draw_shape
from fastvim_jax.data.sources.coco_file import Objects, examine
from fastvim_jax.errors import UserError

masks = pytest.importorskip("pycocotools.mask")

WIDTH, HEIGHT = 60, 40


def write(root: Path, annotations: list[dict], images: int = 2, **fields) -> Path:
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    entries = []
    for i in range(images):
        pixels = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(root / "train" / f"{i}.png")
        entries.append({"id": 10 + i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT})
    content = {
        "images": entries,
        "annotations": [{"id": j, "iscrowd": 0, **a} for j, a in enumerate(annotations)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        **fields,
    }
    (root / "annotations/instances_train.json").write_text(json.dumps(content))
    return root


def box(x: float, y: float, w: float, h: float, image: int = 10, **more) -> dict:
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    base = {"image_id": image, "category_id": 7, "bbox": [x, y, w, h], "segmentation": [polygon]}
    return base | more


def config(root: Path, **fields) -> DetectionData:
    fields = {
        "image_size": 32,
        "batch_size": 2,
        "train_split": "train",
        "eval_split": "train",
        **fields,
    }
    return DetectionData(path=str(root), **fields)


def test_bad_annotations_are_counted(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        [
            box(4, 4, 20, 10),
            box(4, 4, 0, 10),
            box(100, 4, 20, 10),
            box(30, 4, 20, 10, segmentation=[[1, 2, 3, 4]]),
            box(1, 1, 5, 5, category_id=99),
            box(1, 1, 5, 5, image=77),
            box(1, 1, 5, 5, bbox=[1, 2, "x", 4]),
            box(
                0,
                0,
                9,
                9,
                iscrowd=1,
                segmentation={"size": [HEIGHT, WIDTH], "counts": [0, 100, 2300]},
            ),
            box(0, 0, 9, 9, segmentation={"size": [9, 9], "counts": [81]}),
        ],
    )
    source = open_coco(config(root), "train", training=True)
    assert source.problems == {
        "box without area": 1,
        "box outside the image": 1,
        "polygon of fewer than three points": 1,
        "unknown category": 1,
        "annotations of an image that is not listed": 1,
        "box that is no [x, y, width, height]": 1,
        "mask of another size than its image": 1,
        "images without objects": 1,
    }
    assert source.class_names == ("cat", "dog")
    assert source.category_ids == (3, 7)
    assert len(source) == 1
    objects = source[0].target
    assert len(objects.boxes) == 1 and objects.shapes[0] is not None
    assert len(source.notes) == 1 and "box without area (1)" in source.notes[0]
    boxes_alone = open_coco(config(root, masks=False), "train", training=True)
    shapes = boxes_alone[0].target.shapes
    assert [shape is None for shape in shapes] == [False, True, True]


def test_boxes_without_masks_are_refused_where_masks_are_trained(tmp_path: Path, capsys) -> None:
    """Do not train on images whose objects have all been left out, as in JSON files of boxes alone."""
    root = write(tmp_path, [box(4, 4, 20, 10, segmentation=[])] * 2 + [box(4, 4, 9, 9, image=11)])
    file = root / "annotations/instances_train.json"
    source = open_coco(config(root), "train", training=True)
    assert source.problems == {"object without a mask": 2, "images without objects": 1}
    assert (
        len(source) == 1 and len(open_coco(config(root, masks=False), "train", training=True)) == 2
    )
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    file.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="no object with a mask: .*--data.no-masks --model.no-masks"
    ):
        open_coco(config(root), "train", training=True)
    assert main(["data", "check", str(root)]) == 0
    told = capsys.readouterr().out
    assert "3 objects have no mask, of 3" in told
    assert "--data.no-masks --model.no-masks (docs" in told
    file.write_text(json.dumps({**content, "annotations": []}))
    assert main(["data", "check", str(root)]) == 1
    assert "no object: instances_train.json has no object" in capsys.readouterr().out


NOT_READ = [
    [[1, 1, 9, 1, 9, None]], [[1, 1, 9, 1, 9, "9"]], [[1, 1, 9, 1, 9, 1e300]], [[1, 1, 9, 1, 9, float("nan")]],
    [[1, 1, 9, 1, 9, 10**30]], [{"a": 1}], "text", {"size": [HEIGHT, WIDTH]},
    {"size": [HEIGHT, WIDTH], "counts": [10**9]}, {"size": [HEIGHT, WIDTH], "counts": [-1, HEIGHT * WIDTH + 1]},
    {"size": [HEIGHT, WIDTH], "counts": [1, [2]]}, {"size": [HEIGHT, WIDTH], "counts": "\x7f\x7f"},
    {"size": [HEIGHT, WIDTH], "counts": "abc"}, {"size": [HEIGHT, WIDTH], "counts": ""},
    {"size": [HEIGHT, WIDTH], "counts": "é"},
]  # fmt: skip


@pytest.mark.parametrize("crowd", [0, 1])
def test_masks_that_cannot_be_read_are_counted_and_never_drawn(tmp_path: Path, crowd: int) -> None:
    """Count them. pycocotools ends the process at some, and takes memory by a polygon's length at others."""
    whole = box(4, 4, 20, 10)
    bad = [box(4, 4, 20, 10, iscrowd=crowd, segmentation=shape) for shape in NOT_READ]
    root = write(tmp_path, [whole, *bad])
    source = open_coco(config(root), "train")
    assert source.problems == {"mask that cannot be read": len(NOT_READ)}
    boxes = source.truth("bbox")["annotations"]
    assert len(boxes) == 1 + len(NOT_READ) and all(each["area"] == 200 for each in boxes)
    assert len(source.truth("segm")["annotations"]) == 1
    assert source[0].target.shapes == (
        tuple(whole["segmentation"][:1] for _ in range(1)) + (None,) * (0 if crowd else len(bad))
    )


def test_run_lengths_are_unpacked_as_pycocotools_packs_them(rng: np.random.Generator) -> None:
    for _ in range(50):
        drawn = rng.random(rng.integers(1, 90, 2)) < rng.random()
        height, width = drawn.shape
        packed = masks.encode(np.asfortranarray(drawn, np.uint8))["counts"].decode()
        entry = box(0, 0, 1, 1, segmentation={"size": [height, width], "counts": packed})
        assert examine(entry, width, height) == ("", entry["segmentation"])
        entry["segmentation"]["counts"] = packed + "1"
        assert examine(entry, width, height) == ("mask that cannot be read", None)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("images", {"id": [1]}, "'id' that is no whole number or text"),
        ("images", {"file_name": ["0.png"]}, "'file_name' that is no text"),
        ("images", {"width": "60"}, "'width' that is no whole number"),
        ("images", {"height": 40.5}, "'height' that is no whole number"),
        ("images", {"height": 0}, "impossible size"),
        ("images", {"id": 11}, "several images have the same id, such as 11"),
        ("images", {"id": "11"}, "numbers and some texts as ids"),
        ("annotations", {"category_id": "7"}, "'category_id' that is no whole number"),
        ("annotations", {"image_id": None}, "'image_id' that is no whole number"),
        ("categories", {"id": 3.5}, "'id' that is no whole number"),
        ("categories", {"id": True}, "'id' that is no whole number"),
        ("categories", {"id": 3}, "several categories have the same id, such as 3"),
        ("categories", {"name": None}, "'name' that is no text"),
    ],
)
def test_entries_of_other_types_and_ids_that_come_twice_are_refused(
    tmp_path: Path, part: str, change: dict, message: str
) -> None:
    file = write(tmp_path, [box(4, 4, 20, 10)]) / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content[part][0] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        open_coco(config(tmp_path), "train")


def test_odd_fields_of_annotations_are_counted_or_computed(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        [
            box(4, 4, 20, 10, iscrowd=[1]),
            box(4, 4, 20, 10, area="big"),
            box(4, 4, 20, 10, bbox=["4", 4, 9, 9]),
        ],
    )
    source = open_coco(config(root), "train")
    wrong = "box that is no [x, y, width, height]"
    assert source.problems == {"iscrowd that is neither 0 nor 1": 1, wrong: 1}
    assert [each["area"] for each in source.truth("segm")["annotations"]] == [200]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "train/1.png").unlink(), "of 2 images.* 1 cannot be found"),
        (lambda root: (root / "annotations/instances_train.json").write_text("{"), "is no JSON"),
        (
            lambda root: (root / "annotations/instances_train.json").write_text("[" * 100_000),
            "is no JSON: it is nested too deeply",
        ),
        (
            lambda root: (root / "annotations/instances_train.json").write_text("{}"),
            "no list 'images'",
        ),
        (lambda root: (root / "annotations/instances_train.json").unlink(), "No such file"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, spoil, message: str) -> None:
    root = write(tmp_path, [box(4, 4, 20, 10), box(4, 4, 20, 10, image=11)])
    spoil(root)
    with pytest.raises(UserError, match=message):
        open_coco(config(root), "train")


@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_objects_move_with_their_image(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    # A rectangle painted white on black is found again, wherever flip, resize and crop bring it.
    settings = config(write(tmp_path, []), scale=(0.5, 3.0))
    for _ in range(20):
        x, y = rng.integers(0, WIDTH - 20), rng.integers(0, HEIGHT - 20)
        w, h = rng.integers(8, 20, 2)
        image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        image[y : y + h, x : x + w] = 255
        shape = box(float(x), float(y), float(w), float(h))["segmentation"]
        if kind == "rle":
            shape = masks.encode(np.asfortranarray(image[..., 0] // 255))
        corners = np.asarray([[x, y, x + w, y + h]], np.float32)
        objects = Objects(corners, np.asarray([1], np.int32), (shape,), WIDTH, HEIGHT)
        placement = draw_placement((HEIGHT, WIDTH), settings, rng)
        moved = place_objects(objects, placement, settings, "it")
        seen = place(image, placement, settings)[..., 0]
        bits = np.unpackbits(moved["masks"], axis=-1, count=32).astype(bool)
        painted = (seen > 127) & (seen != 114)
        # Half a pixel of difference along the border is a matter of rounding.
        # A line of pixels that one of the two misses is part of the border, so it is measured around both.
        around = boxes_of((bits[0] | painted)[None])[0]
        border = 2 * sum(around[2:] - around[:2]) + 8
        assert np.sum(bits[0] != painted) <= border
        np.testing.assert_array_equal(moved["boxes"][:1], boxes_of(bits[:1]))
        assert moved["present"].sum() == bits[0].any()
        without = place_objects(
            objects, placement, config(tmp_path, scale=(0.5, 3.0), masks=False), "it"
        )
        if moved["present"][0]:
            assert np.abs(without["boxes"][0] - moved["boxes"][0]).max() <= 1


def test_a_resized_rle_mask_lies_where_its_object_does(rng: np.random.Generator) -> None:
    """Compare centres: a mask that is always read at the pixels' corners is half a pixel off, to the right and down."""
    offsets = []
    for _ in range(60):
        x, y = rng.integers(0, WIDTH - 20), rng.integers(0, HEIGHT - 20)
        w, h = rng.integers(6, 20, 2)
        full = np.zeros((HEIGHT, WIDTH), np.uint8)
        full[y : y + h, x : x + w] = 1
        whole = (int(rng.integers(20, 90)), int(rng.integers(30, 130)))
        factor = whole[1] / WIDTH, whole[0] / HEIGHT
        mirrored = bool(rng.integers(2))
        drawn = draw_shape(
            masks.encode(np.asfortranarray(full)), whole, factor=factor, mirrored=mirrored, whole=whole
        )  # fmt: skip
        centre = np.asarray([x + w / 2, y + h / 2]) * factor
        centre[0] = whole[1] - centre[0] if mirrored else centre[0]
        found = boxes_of(drawn[None])[0]
        offsets.append((found[:2] + found[2:]) / 2 - centre)
    assert np.abs(offsets).max() <= 0.75
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.15


def test_an_object_without_an_area_is_judged_by_its_masks(tmp_path: Path) -> None:
    triangle = [[4.0, 4.0, 24.0, 4.0, 4.0, 24.0]]
    source = open_coco(config(write(tmp_path, [box(4, 4, 20, 20, segmentation=triangle)])), "train")
    areas = {kind: source.truth(kind)["annotations"][0]["area"] for kind in ("bbox", "segm")}
    assert areas["bbox"] == 400 and 180 < areas["segm"] < 220


def test_the_largest_objects_are_kept() -> None:
    corners = np.asarray([[0, 0, s, s] for s in (3, 9, 5, 7)], np.float32)
    objects = Objects(corners, np.arange(4, dtype=np.int32), (None,) * 4, 30, 30)
    settings = DetectionData(path="x", image_size=30, max_objects=2, masks=False)
    moved = place_objects(objects, Placement((30, 30)), settings, "it")
    assert list(moved["label"]) == [1, 3]
    assert moved["left_out"] == 2


def test_batches(tmp_path: Path) -> None:
    root = write(tmp_path, [box(4, 4, 20, 10), box(30, 4, 20, 10), box(4, 4, 20, 10, image=11)])
    settings = config(root, max_objects=3)
    iterator = make_train_iterator(settings, seed=1)
    first, second = next(iterator), next(iterator)
    assert first["image"].shape == (2, 32, 32, 3)
    assert first["masks"].shape == (2, 3, 32, 4)
    iterator.close()
    again = make_train_iterator(settings, seed=1)
    again.set_state({**iterator.get_state(), "batches": 1})
    for name, value in next(again).items():
        np.testing.assert_array_equal(value, second[name])
    again.close()
    evaluation = make_eval_iterator(settings, batch_size=3)
    (batch,) = list(evaluation)
    assert list(batch["valid"]) == [True, True, False]
    np.testing.assert_allclose(batch["scale"][0], [32 / 60, 21 / 40])
    assert (batch["image"][0, 21:] == 114).all()
    evaluation.close()


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (96, 64), (31, 500)])
@pytest.mark.parametrize("bounds", [(64, 96), (96, 64), (80, 80)])
def test_an_image_fits_whatever_its_orientation(size, bounds) -> None:
    """Keep the aspect, stay within height and width, and fill one of them."""
    fitted = fit(size, bounds)
    assert fitted[0] <= bounds[0] and fitted[1] <= bounds[1]
    assert fitted[0] == bounds[0] or fitted[1] == bounds[1]
    shares = [side / whole for side, whole in zip(fitted, size, strict=True)]
    assert max(shares) - min(shares) <= 0.5 / min(size) + 1e-9
    config = DetectionData(path="unused", image_size=bounds)
    image = np.full((*size, 3), 7, np.uint8)
    padded, scale = fit_image(image, config)
    assert padded.shape == (*bounds, 3) and scale == pytest.approx(shares[::-1], abs=1e-6)
    assert (padded[: fitted[0], : fitted[1]] == 7).all()


def test_evaluation_pads_to_the_smallest_size_that_holds_an_image(tmp_path: Path) -> None:
    """Compare with the batches of one size: the same pixels and factors, and every image once, in batches of a size."""
    root = write(tmp_path, [box(4, 4, 20, 10)], images=5)
    file = root / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    for i in (0, 3):  # portraits
        content["images"][i] |= {"width": HEIGHT, "height": WIDTH}
        with Image.open(root / f"train/{i}.png") as image:
            turned = image.transpose(Image.Transpose.ROTATE_90)
        turned.save(root / f"train/{i}.png")
    file.write_text(json.dumps(content))
    (root / "train/4.png").write_bytes(b"no image")
    settings = config(root, image_size=96, max_corrupt=1)
    several = dataclasses.replace(settings, eval_sizes=((64, 96), (96, 64)))

    def rows(data: DetectionData, process: int = 0, processes: int = 1) -> dict:
        found = {}
        options = {"process_index": process, "process_count": processes}
        with contextlib.closing(make_eval_iterator(data, batch_size=2, **options)) as batches:
            for batch in batches:
                for i in np.flatnonzero(batch["valid"]):
                    assert int(batch["index"][i]) not in found
                    found[int(batch["index"][i])] = batch["image"][i], batch["scale"][i]
        return found

    whole, chosen = rows(settings), rows(several)
    assert sorted(whole) == sorted(chosen) == [0, 1, 2, 3]
    for index, (image, scale) in chosen.items():
        size = (96, 64) if index in (0, 3) else (64, 96)
        assert image.shape == (*size, 3)
        np.testing.assert_array_equal(image, whole[index][0][: size[0], : size[1]])
        assert (whole[index][0][size[0] :] == settings.pad_value).all()
        np.testing.assert_array_equal(scale, whole[index][1])
    halves = rows(several, 0, 2), rows(several, 1, 2)
    assert sorted([*halves[0], *halves[1]]) == [0, 1, 2, 3]
    shapes = [
        [
            b["image"].shape
            for b in make_eval_iterator(several, batch_size=2, process_index=i, process_count=2)
        ]
        for i in range(2)
    ]
    assert shapes[0] == shapes[1]  # All processes run the same programs.
    for sizes, why in ((((128, 64),), "within image_size"), (((48, 64),), "multiples of 32")):
        with pytest.raises(UserError, match=f"data.eval_sizes.*{why}"):
            dataclasses.replace(settings, eval_sizes=sizes)


def test_transparent_pixels_show_the_background(tmp_path: Path) -> None:
    root = write(tmp_path, [box(4, 4, 20, 10)], images=1)
    Image.new("RGBA", (WIDTH, HEIGHT), (1, 2, 3, 0)).save(root / "train/0.png")
    settings = config(root, batch_size=1, background=70, scale=(1.0, 1.0))
    for make in (partial(make_train_iterator, seed=0), make_eval_iterator):
        with contextlib.closing(make(settings)) as batches:
            assert (next(batches)["image"][0, :21] == 70).all()


def test_an_image_of_another_size_than_its_entry_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, [box(4, 4, 20, 10), box(4, 4, 20, 10, image=11)])
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "train/0.png")
    iterator = make_train_iterator(config(root), seed=0)
    with pytest.raises(UserError, match="boxes would be misplaced"):
        next(iterator)
    iterator.close()


def test_a_path_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    root = write(tmp_path / "set", [box(4, 4, 20, 10)], images=1)
    (root / "train/0.png").rename(tmp_path / "secret.png")
    file = root / "annotations/instances_train.json"
    file.write_text(file.read_text().replace('"0.png"', '"../../secret.png"'))
    iterator = make_train_iterator(config(root, batch_size=1), seed=0)
    with pytest.raises(UserError):
        next(iterator)
    iterator.close()

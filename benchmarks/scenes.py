"""Compose scenes for segmentation from real images, so that class, outline and place of every object are known exactly.

A scene has a background of 128 pixels, a photograph of a place (Tiny-ImageNet), and two to five objects, later ones
over earlier ones. An object is a CIFAR-10 image, resized to 40 to 80 pixels and cut out with the outline of a COCO
object. Label 0 is background, label k + 1 is class k of CIFAR-10.

Scenes of `validation` measure generalisation: their objects, outlines and backgrounds are not in the training scenes.
They come from the test images of CIFAR-10 and the validation images of Tiny-ImageNet and COCO.

python benchmarks/scenes.py OUT --data FOLDER [--train 6000] [--validation 500]

FOLDER holds cifar10/, tiny_imagenet/ and coco_tiny/ as $FASTVIM_DATA_DIR does for other experiments.
"""

from __future__ import annotations

import argparse
import io
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 128
OBJECTS = (2, 5)
OBJECT_SIDE = (40, 80)
PLACES = (
    "alp", "altar", "barn", "beacon", "bridge", "butcher shop", "barbershop", "candy store", "cliff", "confectionery",
    "coral reef", "dam", "fountain", "lakeside", "obelisk", "seashore", "thatch", "triumphal arch", "viaduct",
    "water tower", "bannister", "maypole", "picket fence",
)  # fmt: skip
SPLITS = {"training": ("train", "train", "train2017"), "validation": ("test", "val", "val2017")}


class Parts:
    """Hold the objects, backgrounds and outlines of one split."""

    def __init__(self, data: Path, split: str):
        cifar, places, coco = SPLITS[split]
        self.jpeg, self.offsets, self.labels = _packed(data / "cifar10" / f"{cifar}.npz")
        table = (data / "tiny_imagenet" / "classes.tsv").read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t") for line in table[1:]]
        wanted = [int(row[0]) for row in rows if any(place in row[2].lower() for place in PLACES)]
        self.place_jpeg, self.place_offsets, labels = _packed(
            data / "tiny_imagenet" / f"{places}.npz"
        )
        self.places = np.nonzero(np.isin(labels, wanted))[0]
        instances = json.loads((data / f"coco_tiny/annotations/instances_{coco}.json").read_text())
        self.outlines = [
            outline
            for each in instances["annotations"]
            if not each["iscrowd"] and (outline := _outline(each)) is not None
        ]

    def object(self, index: int) -> Image.Image:
        """Decode a CIFAR-10 image."""
        return _decode(self.jpeg, self.offsets, index)

    def place(self, index: int) -> Image.Image:
        """Decode a photograph of a place."""
        return _decode(self.place_jpeg, self.place_offsets, int(self.places[index]))


def draw_scene(parts: Parts, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Draw one scene and its label map."""
    place = parts.place(int(rng.integers(len(parts.places))))
    scene = place.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    labels = Image.new("L", (SIDE, SIDE), 0)
    for _ in range(int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))):
        index = int(rng.integers(len(parts.labels)))
        side = int(rng.integers(OBJECT_SIDE[0], OBJECT_SIDE[1] + 1))
        thing = parts.object(index).resize((side, side), Image.Resampling.BICUBIC)
        outline = parts.outlines[int(rng.integers(len(parts.outlines)))]
        shape = Image.new("L", (side, side), 0)
        pen = ImageDraw.Draw(shape)
        for polygon in outline:
            pen.polygon([(x * side, y * side) for x, y in polygon], fill=255)
        if rng.random() < 0.5:
            shape = shape.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, top = (int(v) for v in rng.integers(-side // 4, SIDE - side * 3 // 4, 2))
        scene.paste(thing, (left, top), shape.filter(ImageFilter.GaussianBlur(0.7)))
        labels.paste(int(parts.labels[index]) + 1, (left, top), shape)
    return scene, labels


def write_scenes(numbers: range, data: Path, out: Path, split: str) -> None:
    """Write the scenes with these numbers. The number and the split seed a scene's draws."""
    parts = Parts(data, split)
    for number in numbers:
        rng = np.random.default_rng([list(SPLITS).index(split), number])
        scene, labels = draw_scene(parts, rng)
        scene.save(out / "images" / split / f"{number:05d}.jpg", quality=90)
        labels.save(out / "annotations" / split / f"{number:05d}.png", optimize=True)


def main() -> None:
    """Build both splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    names = (chosen.data / "cifar10" / "classes.txt").read_text().split()
    for split, count in (("training", chosen.train), ("validation", chosen.validation)):
        for kind in ("images", "annotations"):
            (chosen.out / kind / split).mkdir(parents=True, exist_ok=True)
        step = -(-count // (4 * chosen.workers))
        tasks = [range(i, min(i + step, count)) for i in range(0, count, step)]
        work = partial(write_scenes, data=chosen.data, out=chosen.out, split=split)
        with ProcessPoolExecutor(chosen.workers) as pool:
            list(pool.map(work, tasks))
        parts = Parts(chosen.data, split)
        print(
            f"{split}: {count} scenes of {len(parts.labels)} objects, {len(parts.outlines)} outlines and "
            f"{len(parts.places)} places"
        )
    (chosen.out / "classes.txt").write_text("\n".join(["background", *names]) + "\n")


def _packed(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.load(file, allow_pickle=False) as archive:
        return archive["jpeg"], archive["offsets"], archive["labels"]


def _decode(jpeg: np.ndarray, offsets: np.ndarray, index: int) -> Image.Image:
    data = jpeg[offsets[index] : offsets[index + 1]].tobytes()
    return Image.open(io.BytesIO(data)).convert("RGB")


def _outline(annotation: dict) -> list[list[tuple[float, float]]] | None:
    """Return an object's polygons in coordinates of its box, from 0 to 1, or None if it is small or thin."""
    left, top, width, height = annotation["bbox"]
    if min(width, height) < 24 or annotation["area"] < 0.4 * width * height:
        return None
    return [
        [((x - left) / width, (y - top) / height) for x, y in zip(p[::2], p[1::2], strict=True)]
        for p in annotation["segmentation"]
        if len(p) >= 6
    ]


if __name__ == "__main__":
    main()

"""`fastvim data check|prepare PATH`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastvim_jax.cli.progress import progress_bar
from fastvim_jax.cli.usage import UsageError, as_usage_error, command, parse
from fastvim_jax.errors import counted, suggest

HELP = """\
Usage: fastvim data check PATH [OPTIONS]
       fastvim data check-masks PATH [OPTIONS]
       fastvim data check-coco PATH [OPTIONS]
       fastvim data prepare PATH --out DIR [OPTIONS]
       fastvim data stats PATH --channels NAME... [OPTIONS]

  check     read and decode every record, and list what is wrong: undecodable images, labels outside the classes,
            classes without images, one image under several labels, files that are not read, shards that have changed;
            the exit status is 1 if something is wrong
            (a folder with annotations/ is taken as images with label maps, or as COCO's, as below)
  check-masks  the same for images with label maps (images/SPLIT/x.jpg, annotations/SPLIT/x.png, or other patterns):
            missing masks, other sizes, colours instead of labels, labels outside the classes or off by one
  check-coco   the same for images with objects in COCO's format: missing images, boxes without area or outside the
            image, polygons of two points, unknown categories, RLE that cannot be read
  prepare   write ArrayRecord shards with checksums, original bytes or resized, or shards of decoded pixels (--pixels);
            if it is interrupted, the same command continues
  stats     count mean and deviation of every channel and store them with the data, where training takes them from

PATH is a data set's folder: one folder per split with one folder per class (train/cat/1.jpg), one folder per class
(cat/1.jpg), tar shards, Parquet files as on the Hugging Face hub, packed .npz files, a set of TensorFlow Datasets, or
what `prepare` wrote. Microscope images: a plate's folder, its load_data.csv or Parquet index (also at a URL), or a
pattern of one file per channel, 'fields/{split}/{class}/{well}_s{site}_{channel}.tif'.
`fastvim data TASK --help` lists a task's options.
"""


@dataclasses.dataclass(frozen=True)
class _Where:
    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The data set's folder (or digits, a TFDS set's name, a plate's table, or a pattern with {channel})."""
    source: str = "auto"
    """Kind of the data set, as in data.source; auto: found out from the folder."""
    split: tuple[str, ...] = ()
    """Splits to read; by default all. Of a plate: train, val, test or all; for other plates than those of compounds
    crispr/train, orf/train and so on."""
    class_list: str = ""
    """A class list (.txt or .tsv) to use instead of the folder's own. For a plate: the folder of the plate maps."""
    channels: tuple[str, ...] = ()
    """Channels to read of a plate, or of a pattern with {channel}, in this order; by default all that are found, of a
    pattern by name."""
    follow_links: bool = False
    """Read files outside the folder that links in it lead to."""
    workers: int = 0
    """Worker processes; 0: this process alone."""


@dataclasses.dataclass(frozen=True)
class Check(_Where):
    """The data set to scan."""

    list: int = 20
    """Problems of each split to list; the others are counted."""
    json: bool = False
    """Print JSON, with every problem."""


_ROBOFLOW = "_annotations.coco.json"
"""Name of the file that Roboflow writes into the image folder of each split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare(_Where):
    """The shards to write."""

    out: Path
    """Folder of the shards."""
    max_size: int | None = None
    """Largest shorter side in pixels. Larger images are reduced to it (bicubic, JPEG quality 95)."""
    pixels: int | None = None
    """Store decoded pixels, with the shorter side at most this long. Readers then need not decode. Use 256 to train at
    224 pixels: about 0.26 MB per photograph."""
    shard_records: int = 4096
    """Records per shard."""
    max_corrupt: int = 0
    """Largest number of undecodable records to leave out; one more stops the command. Only images that are resized are
    decoded."""


def run(arguments: Sequence[str]) -> int:
    """Check a data set, or turn it into ArrayRecord shards."""
    from fastvim_jax.cli import channel_stats, check_coco, check_masks

    tasks: dict[str, Callable[[Sequence[str]], int]] = {
        "check": _check,
        "check-masks": check_masks.run,
        "check-coco": check_coco.run,
        "prepare": _prepare,
        "stats": channel_stats.run,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in tasks:
        raise UsageError(
            f"unknown task {name!r}: check, check-masks, check-coco, prepare or stats.{suggest(name, tasks)}"
        )
    if name == "check":
        name, more = _dense_task(rest)
        rest += more
    return tasks[name](rest)


def _dense_task(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Name the check for the folder that is named first, and its options: of COCO's layout, Roboflow's or ADE20K's."""
    root = Path(arguments[0]) if arguments else Path("-")
    annotations = root / "annotations"
    if "--source" in arguments:
        return "check", []
    if any(annotations.glob("*.json")):
        return "check-coco", []
    if any(root.glob(f"*/{_ROBOFLOW}")):
        return "check-coco", ["--annotations", f"{{split}}/{_ROBOFLOW}"]
    masks = annotations.is_dir() and (root / "images").is_dir()
    return "check-masks" if masks else "check", []


def _check(arguments: Sequence[str]) -> int:
    chosen = parse(Check, "data check", arguments, "List what is wrong with a data set.")
    from fastvim_jax.data.prepare.check import check

    kind, splits = _kind_and_splits(chosen)
    reports = {}
    said: set[str] = set()
    for split in splits:
        source = _open(chosen, kind, split)
        with progress_bar(f"checking {split}", quiet=chosen.json) as progress:
            reports[split] = report = check(source, workers=chosen.workers, progress=progress)
        if not chosen.json:
            classes = range(len(source.class_names))
            used = sum(report.counts.get(label, 0) > 0 for label in classes)
            print(
                f"{kind} {split}: {counted(report.records, 'record')}, {used} of "
                f"{counted(len(classes), 'class', 'classes')}, "
                f"{counted(report.duplicates, 'repeated image')}, {counted(len(report.problems), 'problem')}"
            )
            if report.unread:
                more = ", ..." if len(report.unread) > 5 else ""
                verb = "is" if len(report.unread) == 1 else "are"
                print(
                    f"  note: {counted(len(report.unread), 'file')} {verb} not read, being of an unknown extension or "
                    f"in no class's folder: {', '.join(report.unread[:5])}{more}"
                )
            if report.damaged_metadata:
                print(
                    f"  note: {counted(report.damaged_metadata, 'image has', 'images have')} EXIF that cannot be "
                    "read; taken as upright"
                )
            if report.absent:
                have = counted(report.absent, "class has", "classes have")
                print(f"  note: {have} no record in this part of the data")
            _say_once(report.notes, said)
            for problem in report.problems[: chosen.list]:
                print(f"  {problem.kind}: {problem.message}")
            if len(report.problems) > chosen.list:
                print(f"  ... and {len(report.problems) - chosen.list} more (--list, --json)")
    shared = [
        (a, b, len(reports[a].digests.keys() & reports[b].digests.keys()))
        for i, a in enumerate(splits)
        for b in splits[i + 1 :]
    ]
    found = any(report.problems for report in reports.values())
    if chosen.json:
        print(json.dumps(_as_json(kind, reports, shared), indent=2, ensure_ascii=False))
    else:
        for a, b, count in shared:
            if count:
                print(f"note: {a} and {b} share {counted(count, 'image')}")
        found = _print_advice(chosen, kind, reports, found) or found
    return int(found)


def _print_advice(chosen: Check, kind: str, reports: dict[str, Any], found: bool) -> bool:
    """Print the verdict and the command that trains on these images; return whether training would refuse them."""
    from fastvim_jax.data.prepare.advice import training_advice

    advice = training_advice(reports)
    if found:
        print("Something is wrong, see above.")
    elif not advice.refused:
        print("Nothing is wrong.")
    for note in advice.notes:
        print(f"note: {note}")
    if advice.refused:
        print("Training would refuse these data:")
        for reason in advice.refused:
            print(f"  {reason}")
        return not chosen.split
    if channels := max(report.channels for report in reports.values()):
        print(f"Train on images of {counted(channels, 'channel')}: see docs/cells.md.")
        return False
    options = {
        "data.path": "" if kind == "digits" else chosen.path,
        "data.source": "" if kind == "image_folder" else kind,
        "data.class-list": chosen.class_list,
        **advice.options,
    }
    given = [f"--{name} {shlex.quote(value)}" for name, value in options.items() if value]
    given += ["--data.follow-links"] if chosen.follow_links else []
    print("Train on it: " + " ".join([command(), "train your_images/fastvim", *given]))
    return False


def _prepare(arguments: Sequence[str]) -> int:
    chosen = parse(Prepare, "data prepare", arguments, "Write a data set as ArrayRecord shards.")
    from fastvim_jax.data.prepare.shards import prepare
    from fastvim_jax.data.sources import expand_path

    kind, splits = _kind_and_splits(chosen)
    path, out = expand_path(chosen.path), chosen.out.resolve()
    if path.is_dir() and (
        path.resolve() == out or (kind == "image_folder" and path.resolve() in out.parents)
    ):
        raise UsageError(
            f"--out {chosen.out} is the data set's own folder, or lies in it, where its shards would be taken for "
            "images or a split: choose one outside."
        )
    written = False
    said: set[str] = set()
    for split in splits:
        source = _open(chosen, kind, split)
        _say_once(getattr(source, "notes", ()), said)
        # A plate's splits are named after the kind of plate: "crispr/train".
        whole, bracket, part = split.partition("[")
        split = whole.rpartition("/")[2] + bracket + part if kind == "jump_cp" else split
        split = "train" if split == "." else split
        named = "://" in chosen.path or (kind == "tfds" and not path.exists())
        place = chosen.path if named else str(path.absolute())
        origin = {"source": kind, "path": place, "split": split}
        with progress_bar(f"preparing {split}") as progress:
            done = prepare(
                source,
                chosen.out,
                split,
                max_size=chosen.max_size,
                pixels=chosen.pixels,
                shard_records=chosen.shard_records,
                workers=chosen.workers,
                max_corrupt=chosen.max_corrupt,
                origin=origin,
                progress=progress,
            )
        notes = [counted(done.kept, "was", "were") + " there already"] if done.kept else []
        if done.changed:
            notes.append(f"{done.changed} written again, because records have changed")
        kept = f" ({'; '.join(notes)})" if notes else ""
        print(
            f"{split}: {counted(done.records, 'record')} of {counted(len(source.class_names), 'class', 'classes')}, "
            f"{done.bytes / 1e6:.1f} MB in {counted(done.shards, 'shard')}{kept}"
        )
        for reason in done.left_out:
            print(f"  left out: {reason}")
        for note in done.notes[:20]:
            print(f"  note: {note}")
        if len(done.notes) > 20:
            print(f"  ... and {len(done.notes) - 20} more notes, see {done.manifest}")
        written = written or done.kept < done.shards
    if channel_names := tuple(getattr(source, "channel_names", ())):
        _print_statistics(chosen.out, split, channel_names, written)
    reader = "array_record" if chosen.pixels is None else "pixels"
    print(
        f"Train on it with --data.source {reader} --data.path {chosen.out}; "
        f"`{command()} data check {chosen.out}` verifies the checksums."
    )
    return 0


def _print_statistics(out: Path, split: str, names: Sequence[str], written: bool) -> None:
    """Print how to count mean and deviation of the channels, if they are missing or older than the shards."""
    from fastvim_jax.data.statistics import FILE

    other = () if (out / "train.json").is_file() else ("--split", split)
    count = f"{command()} {shlex.join(('data', 'stats', str(out), *other, '--channels', *names))}"
    if not (out / FILE).is_file():
        print(f"Training needs mean and deviation of the channels: `{count}` counts them.")
    elif written:
        print(f"note: {out / FILE} is older than these shards: count again with `{count}`.")


def _kind_and_splits(chosen: _Where) -> tuple[str, list[str]]:
    from fastvim_jax.data.sources import SOURCES
    from fastvim_jax.data.sources.layout import guess_source, list_splits

    with as_usage_error():
        if chosen.source not in (*SOURCES, "auto"):
            raise UsageError(
                f"unknown source {chosen.source!r}: auto or one of {', '.join(SOURCES)}."
                + suggest(chosen.source, SOURCES)
            )
        kind = guess_source(chosen.path) if chosen.source == "auto" else chosen.source
        if chosen.channels and kind not in ("channel_files", "jump_cp"):
            raise UsageError(
                f"--channels chooses files of a plate or of a pattern with {{channel}}; the source {kind} holds its "
                "channels together."
            )
        if len(set(chosen.channels)) < len(chosen.channels):
            raise UsageError("--channels: name each channel once, in their order.")
        splits = [*chosen.split] or list_splits(kind, chosen.path)
        if not splits:
            raise UsageError(f"{chosen.path} holds no split of the source {kind}.")
    return kind, splits


def _open(chosen: _Where, kind: str, split: str) -> Any:
    """Open a split with whatever labels it has: `check` lists the stray ones, and `prepare` refuses them."""
    from fastvim_jax.data.sources import open_source

    source = open_source(
        kind,
        split,
        path=chosen.path,
        class_list=chosen.class_list,
        any_label=True,
        follow_links=chosen.follow_links,
        channels=chosen.channels,
    )
    if chosen.channels and not getattr(source, "channel_names", ()):
        raise UsageError(
            f"--channels chooses files of one channel each; each file of {chosen.path} holds all channels of an image."
        )
    return source


def _say_once(notes: Sequence[str], said: set[str]) -> None:
    """Print the notes that were not said yet: those of the whole data set come with each of its splits."""
    for note in notes:
        if note not in said:
            print(f"  note: {note}")
        said.add(note)


def _as_json(kind: str, reports: dict[str, Any], shared: list[tuple[str, str, int]]) -> Any:
    return {
        "source": kind,
        "splits": {
            split: {
                "records": report.records,
                "counts": report.counts,
                "duplicates": report.duplicates,
                "damaged_metadata": report.damaged_metadata,
                "classes_without_records": report.absent,
                "unread": list(report.unread),
                "notes": list(report.notes),
                "problems": [dataclasses.asdict(problem) for problem in report.problems],
            }
            for split, report in reports.items()
        },
        "shared": [{"splits": [a, b], "images": count} for a, b, count in shared if count],
    }

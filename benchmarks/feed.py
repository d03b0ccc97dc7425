"""Measure whether the data keep an accelerator busy: the trainer with the full ImageNet recipe on real photographs.

    python benchmarks/feed.py run --data shared/data --work /tmp/feed --json benchmarks/results/h100/feed.json
    python benchmarks/feed.py report benchmarks/results/h100/feed.json > benchmarks/feed.md

It takes about 4 minutes on 16 cores and one H100, and 16 GB of disk. It takes less if `--work` holds the shards already
(the command `prepare` writes them and measures nothing). To try it on a CPU, add `--tiny --records 300`.

1. Repeat the 41 ImageNet photographs of `--data` up to `--records`, and write them as `fastvim data prepare` does: as
   pixels (`pixels=256`) and as JPEG files of 256 pixels (`max_size=256`). All copies are read from the page cache.
2. For each model, start the trainer once (`training.train` with `experiments/imagenet`, one GPU's batch). It trains on
   shards of pixels, then on JPEG shards, then on one batch that stays on the device, which measures the step alone. In
   all three, flip, RandAugment, erasing, mixup and cutmix run in the step.
3. Time the augmentation alone.
4. Read the same JPEG files by a PyTorch DataLoader with Pillow and torchvision's transforms, without training.

A row is the mean of the last laps of the trainer's own log (`metrics.jsonl`); a lap is `--lap` steps. `host_us` is the
processor time in microseconds that the training process, with all its threads and without its workers, spends per
image. A sampling profiler such as py-spy shows what these threads do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fastvim_jax.bench.data import torch_loader
from fastvim_jax.bench.record import show
from fastvim_jax.data import ClassificationData, make_train_iterator, open_source
from fastvim_jax.data.augment import draw_augmentation
from fastvim_jax.data.batches import BatchIterator, open_split, owned
from fastvim_jax.data.device_transforms import make_augment
from fastvim_jax.data.prepare.shards import prepare
from fastvim_jax.data.records import Record, Source
from fastvim_jax.training import load_experiment, train
from fastvim_jax.training.classification import train as trainer
from pallas_kernels import timing

MODELS = {"FastVim-T": "imagenet/fastvim_tiny", "FastVim-S": "imagenet/fastvim_small"}
FEEDS = {"pixels": "pixels", "jpeg": "array_record", "step": ""}
"""Data source that feeds the step in each phase. The last phase has none: it repeats one batch."""
BEGIN = time.perf_counter()
LAPS = {"pixels": 6, "jpeg": 6, "step": 3}
"""Lines of the log in each phase. The first half is left out, because it includes starting workers and batches that
were read before."""
PROMISED = {
    ("FastVim-S", "pixels"): 0.95,
    ("FastVim-T", "pixels"): 0.85,
    ("FastVim-S", "jpeg"): 0.5,
}
"""Required throughput by (model, feed), as a share of the throughput of the step alone."""


@dataclasses.dataclass
class Repeated:
    """Repeat a source's records up to `count`."""

    source: Source
    count: int

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        return self.source[index % len(self.source)]

    def stamp(self, index: int) -> str:
        return f"{index} of {len(self.source)}"


class Feeds:
    """Hold the feeds' iterators open for all models, because starting workers takes long. Entering starts them."""

    def __init__(self, configs: dict[str, ClassificationData]) -> None:
        self._opened = {
            name: make_train_iterator(config, seed=0) for name, config in configs.items()
        }
        self._starts = {
            name: threading.Thread(target=self._start, args=(name,)) for name in configs
        }

    def _start(self, name: str) -> None:
        begin = time.perf_counter()
        next(self._opened[name])
        print(f"{name}: first batch after {time.perf_counter() - begin:.1f} s", flush=True)

    def __enter__(self) -> Feeds:
        for start in self._starts.values():
            start.start()
        return self

    def __exit__(self, *_: object) -> None:
        for name in self:
            self[name].close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened)

    def __getitem__(self, name: str) -> BatchIterator:
        self._starts[name].join()
        return self._opened[name]


class Relay:
    """Yield training batches of several feeds, one after the other, each for its number of steps. Then raise `Done`.

    It takes the place of the trainer's `BatchIterator`.
    """

    def __init__(self, feeds: Feeds, steps: dict[str, int]):
        self._feeds, self._steps = feeds, steps
        first = feeds[next(iter(feeds))]
        self.source, self.config = first.source, first.config
        self.host_seconds: dict[str, float] = {}
        self.steps_per_epoch = 10**6  # ended by `Done`
        self.corrupt: set[int] = set()
        self.lend = False
        self._batches = self._all()

    def _all(self) -> Iterator[Any]:
        batch: Any = None
        for name in self._feeds:
            running = self._feeds[name]
            print(f"{time.perf_counter() - BEGIN:.1f} s: {name}", flush=True)
            running.lend = self.lend
            for _ in self._timed(name):
                batch = next(running)
                yield batch
            batch = owned(batch)
        placed = jax.device_put(batch)
        for _ in self._timed("step"):
            yield placed

    def _timed(self, name: str) -> Iterator[int]:
        """Count a phase's steps, and record the processor time per step in its second half."""
        steps, half = self._steps[name], self._steps[name] // 2
        begin = 0.0
        for number in range(steps):
            if number == half:
                begin = time.process_time()
            yield number
        self.host_seconds[name] = (time.process_time() - begin) / (steps - half)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            raise Done from None

    def get_state(self) -> dict[str, Any]:
        return {"corrupt": []}

    def set_state(self, state: Any) -> None:
        pass

    def close(self) -> None:
        self._batches.close()


class Done(Exception):
    """All phases are measured."""


def write_shards(data: Path, work: Path, options: argparse.Namespace) -> None:
    """Prepare the repeated photographs, once as pixels and once as JPEG files."""
    folder = data / "imagenet_samples"
    photographs = open_source(
        "image_folder", "val", path=str(folder), class_list=str(folder / "imagenet1k_classes.tsv")
    )
    for name, how in (("pixels", {"pixels": 256}), ("jpeg", {"max_size": 256})):
        if _is_written(work / name / "train.json", options.records):
            continue
        begin = time.perf_counter()
        prepare(photographs, work / f"{name}_once", "train", **how)
        once = open_source(FEEDS[name], "train", path=str(work / f"{name}_once"))
        count = options.records
        done = prepare(
            Repeated(once, count), work / name, "train", workers=options.workers,
            shard_records=min(2048, -(-count // max(1, options.workers))), **how,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        print(
            f"{name}: {done.records} records, {done.bytes / 1e9:.2f} GB, {seconds:.0f} s",
            flush=True,
        )


def _is_written(manifest: Path, records: int) -> bool:
    """Return whether a manifest says that all records are written. Their checksums are not read again."""
    if not manifest.is_file():
        return False
    found = json.loads(manifest.read_text())
    return bool(found["complete"]) and found["source_records"] == records


def config_of(model: str, options: argparse.Namespace) -> Any:
    """Return the experiment's config for one device, augmented there."""
    config = load_experiment(MODELS[model])
    size = 32 if options.tiny else 224
    data = dataclasses.replace(
        config.data, path=str(options.work), batch_size=options.batch, workers=options.workers,
        augment_on="device", image_size=size, eval_split="train",
    )  # fmt: skip
    net = config.model
    if options.tiny:
        net = dataclasses.replace(
            net,
            image_size=(size, size),
            depth=2,
            embed_dim=16,
            dtype="float32",
            activations="wide",
        )
    return dataclasses.replace(
        config, model=net, data=data, log_every_steps=options.lap,
        checkpoint_every_steps=10**6,
    )  # fmt: skip


def feeds_of(options: argparse.Namespace) -> dict[str, ClassificationData]:
    """Return what each feed reads. It is the same for all models."""
    data = config_of(options.models[0], options).data
    return {
        name: dataclasses.replace(data, source=source, path=str(options.work / name))
        for name, source in FEEDS.items()
        if source
    }


def measure_model(
    model: str, feeds: Feeds, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Run the trainer through all phases, and yield a row for each."""
    config = config_of(model, options)
    steps = {name: laps * options.lap for name, laps in LAPS.items()}
    relays: list[Relay] = []

    def relay(data: Any, **_: Any) -> Relay:
        relays.append(Relay(feeds, steps))
        return relays[-1]

    original = trainer.make_train_iterator
    trainer.make_train_iterator = relay  # type: ignore[attr-defined, assignment]
    config = dataclasses.replace(config, data=feeds_of(options)["pixels"])
    folder = Path(tempfile.mkdtemp(prefix="feed-run-"))
    try:
        train(config, folder / "run", progress=True)
    except Done:
        pass
    finally:
        trainer.make_train_iterator = original  # type: ignore[attr-defined]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    shutil.rmtree(folder)
    lines = [line for line in lines if line["kind"] == "train"]
    start = 0
    rates = {}
    for name, laps in LAPS.items():
        phase = lines[start : start + laps]
        start += laps
        late = phase[-(laps // 2) :]
        rates[name] = _mean(late, "images_per_second")
        yield {
            "model": model, "feed": name, "batch": options.batch, "workers": options.workers,
            "images_per_s": rates[name], "data_wait": _mean(late, "data_wait"),
            "data_images_per_s": _mean(late, "data_images_per_second"),
            "host_us": 1e6 * relays[-1].host_seconds[name] / options.batch,
            "laps": [line["images_per_second"] for line in phase],
        }  # fmt: skip


def measure_torch(options: argparse.Namespace) -> dict[str, Any]:
    """Time a DataLoader on the JPEG files."""
    row: dict[str, Any] = {
        "model": "",
        "feed": "DataLoader",
        "batch": options.batch,
        "workers": options.workers,
    }
    config = config_of("FastVim-T", options).data
    config = dataclasses.replace(config, source="array_record", path=str(options.work / "jpeg"))
    try:
        batches = torch_loader(open_split(config, "train"), config)
    except ImportError as error:
        return row | {"skipped": str(error)}
    for _ in range(2 * max(1, options.workers) + 1):
        next(batches)
    begin, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begin) < options.seconds:
        next(batches)
        count += 1
    return row | {"images_per_s": count * options.batch / seconds}


def measure_augmentation(options: argparse.Namespace) -> dict[str, Any]:
    """Time the augmentation alone, that is what the step does to images before the model."""
    config = config_of("FastVim-T", options)
    size, rng = options.batch, np.random.default_rng(0)
    drawn = [draw_augmentation(config.data, rng) for _ in range(size)]
    batch = {
        "image": rng.integers(0, 256, (size, *config.data.height_width, 3), dtype=np.uint8),
        "label": np.zeros(size, np.int32),
        **{name: np.stack([each[name] for each in drawn]) for name in drawn[0]},
    }
    placed = jax.device_put(batch)
    augment = jax.jit(make_augment(config.data, config.model.num_classes, label_smoothing=0.1))

    def one(i: int) -> jax.Array:
        return augment(jax.random.key(i), placed)["image"]

    row: dict[str, Any] = {"model": "", "feed": "augment", "batch": size}
    if jax.default_backend() == "gpu":
        median, fastest, slowest, _ = timing.steady_clock(one)
        row["device_ms"] = timing.profile(one, 5).median
    else:
        median, fastest, slowest = timing.clock(one, steps=2, repeats=2)
    return row | {
        "ms": median, "fastest_ms": fastest, "slowest_ms": slowest, "images_per_s": 1e3 * size / median
    }  # fmt: skip


def _mean(lines: list[dict[str, Any]], name: str) -> float | None:
    found = [line[name] for line in lines if name in line]
    return sum(found) / len(found) if found else None


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield every row of the benchmark; without models, the DataLoader's alone."""
    if options.models:
        with Feeds(feeds_of(options)) as feeds:
            for model in options.models:
                yield from measure_model(model, feeds, options)
        yield measure_augmentation(options)
    if not options.no_torch:
        yield measure_torch(options)


def report(files: Sequence[Path]) -> str:
    """Return the page's text, given the records of runs with different models."""
    records = [json.loads(file.read_text()) for file in files]
    found = {(row["model"], row["feed"]): row for record in records for row in record["rows"]}
    runs = []
    for record in records:
        about = record["circumstances"]
        workers = next(row["workers"] for row in record["rows"] if "workers" in row)
        models = dict.fromkeys(row["model"] for row in record["rows"] if row["model"])
        runs.append(
            f"{' and '.join(models) or 'the DataLoader'} on {about['device']} with {workers} workers, "
            f"{about.get('date', '')}, commit "
            f"{about.get('commit', '')}"
        )
    lines = [
        "# Feeding one GPU", "",
        f"Generated by `benchmarks/feed.py report` from runs of {'; of '.join(runs)}. [feed.py](feed.py) says what is "
        "measured.", "",
        "| model | fed by | images/s | share of the step alone | required | waiting for data |",
        "|---|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    names = {
        "pixels": "shards of pixels",
        "jpeg": "256-px JPEG shards",
        "step": "one batch (the step alone)",
    }
    loader = found.get(("", "DataLoader"))
    for model in MODELS:
        alone = found.get((model, "step"))
        if alone is None:
            continue
        for feed, words in names.items():
            row = found[model, feed]
            share = row["images_per_s"] / alone["images_per_s"]
            required = PROMISED.get((model, feed))
            lines.append(
                f"| {model} | {words} | {row['images_per_s']:,.0f} | {share:.1%} | "
                f"{f'{required:.0%}' if required else '-'} | {row['data_wait']:.1%} |"
            )
        if loader and "images_per_s" in loader:
            rate = loader["images_per_s"]
            share = min(1.0, rate / alone["images_per_s"])
            lines.append(
                f"| {model} | PyTorch DataLoader, JPEG | {rate:,.0f} alone | at most {share:.1%} | - | - |"
            )
    if augmentation := found.get(("", "augment")):
        milliseconds = augmentation.get("device_ms", augmentation["ms"])
        lines += [
            "",
            f"Flip, RandAugment, normalisation, erasing, mixup and cutmix of a batch of {augmentation['batch']} take "
            f"{milliseconds:.2f} ms of the step.",
        ]
    if loader and "skipped" in loader:
        lines += ["", f"DataLoader: {loader['skipped']}."]
    return "\n".join(lines) + "\n"


COLUMNS = (
    ("model", 10, lambda r: r["model"]),
    ("feed", 10, lambda r: r["feed"]),
    ("images/s", 9, lambda r: f"{r['images_per_s']:.0f}" if "images_per_s" in r else r["skipped"]),
    ("host µs", 8, lambda r: f"{r['host_us']:.1f}" if "host_us" in r else "-"),
    ("data wait", 9, lambda r: f"{r['data_wait']:.1%}" if "data_wait" in r else "-"),
)


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    run, write = tasks.add_parser("run"), tasks.add_parser("prepare")
    for task in (run, write):
        task.add_argument(
            "--data", type=Path, required=True, help="folder that holds imagenet_samples"
        )
        task.add_argument(
            "--work", type=Path, required=True, help="folder of the shards; kept for the next run"
        )
        task.add_argument("--records", type=int, default=50_000)
        task.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    run.add_argument("--json", type=Path)
    run.add_argument("--batch", type=int, default=256)
    run.add_argument("--lap", type=int, default=50, help="steps between lines of the log")
    run.add_argument("--seconds", type=float, default=15.0, help="time of the DataLoader")
    run.add_argument("--models", nargs="*", choices=tuple(MODELS), default=tuple(MODELS))
    run.add_argument("--no-torch", action="store_true")
    run.add_argument("--tiny", action="store_true", help="a tiny model at 32 px, for a CPU")
    shown = tasks.add_parser("report")
    shown.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    if options.task == "report":
        print(report(options.files), end="")
        return
    options.work.mkdir(parents=True, exist_ok=True)
    write_shards(options.data, options.work, options)
    if options.task == "prepare":
        return
    show("feed", rows(options), COLUMNS, command=" ".join(sys.argv), file=options.json)


if __name__ == "__main__":
    main()

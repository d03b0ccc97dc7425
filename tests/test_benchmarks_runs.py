"""The programs that run trainings for real: order, dependencies and stops of jobs; pages made from records alone."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest

from tests.support import ROOT

WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).parent.joinpath('order').open('a').write(sys.argv[2])"
FOREVER = (
    "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); "
    "print('on', flush=True); time.sleep(60)"
)


@pytest.fixture
def programs(monkeypatch):
    """Import a program of benchmarks/ as its scripts do, from their own folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def load(name):
        for module in ("jobs", name):
            monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module(name)

    return load


def test_jobs_wait_for_what_they_start_from_and_failures_stop_only_their_own(
    programs, tmp_path, capsys
):
    jobs = programs("jobs")

    def job(name, code=WRITES, **options):
        return jobs.Job(name, ("-c", code, f"{{runs}}/{name}", name), **options)

    listed = [
        job("b", after="a"),
        job("a"),
        job("d", after="c"),
        job("c", code="raise SystemExit(3)"),
        job("e", like="c"),
        job("f", after="nowhere"),
    ]
    left = jobs.run(listed, tmp_path, ["0", "1"], seconds=30)
    assert left == ["d", "c", "f"]
    order = (tmp_path / "order").read_text()
    assert sorted(order) == ["a", "b", "e"] and order.index("a") < order.index("b")
    assert "c: exit status 3" in capsys.readouterr().out
    assert jobs.run(listed[:2], tmp_path, ["0"], seconds=30) == []
    assert (tmp_path / "order").read_text() == order  # What is done does not run again.


COMPILES = """
import pathlib, sys, time
log = pathlib.Path(sys.argv[1], "metrics.jsonl")
log.parent.mkdir()
log.touch()
time.sleep(0.7)
order = log.parent.parent / "order"
order.write_text("compiled, ")
log.write_text("{}")
"""


def test_a_job_like_another_starts_once_that_one_has_compiled(programs, tmp_path):
    jobs = programs("jobs")
    listed = [
        jobs.Job("a", ("-c", COMPILES, "{runs}/a")),
        jobs.Job("b", ("-c", WRITES, "{runs}/b", "b starts, "), like="a"),
    ]
    assert jobs.run(listed, tmp_path, ["0", "1"], seconds=30) == []
    order = (tmp_path / "order").read_text()
    assert (
        order.startswith("compiled, ") and "b starts, " in order
    )  # What came before is overwritten.


def test_a_gpu_has_room_for_shares_of_one_and_the_time_ends_with_a_stop(programs, tmp_path, capsys):
    jobs = programs("jobs")
    listed = [jobs.Job(name, ("-c", FOREVER), share=0.5) for name in "abc"]
    assert jobs.run(listed, tmp_path, ["0"], seconds=1.5) == ["a", "b", "c"]
    said = capsys.readouterr().out
    assert "GPU 0: b starts" in said and "c starts" not in said
    assert "a: exit status 75" in said


def record(job, epochs=60, **scores):
    return {
        "job": job, "experiment": "x", "arguments": [], "from": "", "seed": 0, "epochs": epochs, "device": "H100",
        "versions": {"jax": "1"}, "commit": "abcdefghij", "started": "2026-01-02T", "seconds": 60.0, "pool_scale": 1.0,
        "evaluation": {"count": 10, **scores}, "log": [{"epoch": epochs, "loss": 1.0, "images_per_second": 5.0}],
    }  # fmt: skip


def test_a_run_folder_becomes_a_record(programs, tmp_path):
    jobs = programs("jobs")
    run = tmp_path / "runs" / "tenth_s1"
    run.mkdir(parents=True)
    command = [
        "/x/fastvim",
        "train",
        "a/b",
        "--run-dir",
        "/x/tenth_s1",
        "--init",
        "/x/pre_s1",
        "--no-progress",
        "--seed",
        "1",
    ]
    start = {"command": command, "device": {"kind": "H100"}, "versions": {}, "started": "2026"}
    (run / "environment.json").write_text(json.dumps({"starts": [start, start]}))
    (run / "config.json").write_text(json.dumps({"seed": 1, "epochs": 4, "model": {}}))
    lines = [
        {"kind": "train", "epoch": 1.0, "loss": 2.0, "seconds": 30.0},
        {
            "kind": "train",
            "epoch": 2.0,
            "loss": 1.0,
            "seconds": 10.0,
        },  # the clock of the second start
        {"kind": "norms", "epoch": 2.0},
        {"kind": "eval", "epoch": 2.0, "count": 10, "raw_top1": 0.5, "step": 3},
    ]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert jobs.done(run) is False
    (run / "done").touch()
    listed = [jobs.Job("tenth_s1", ()), jobs.Job("tenth_s2", ())]
    jobs.collect(listed, tmp_path / "runs", "topic", "abc", tmp_path / "kept")
    (found,) = jobs.load(listed, "topic", tmp_path / "kept")["tenth"]
    assert (found["experiment"], found["arguments"], found["from"]) == (
        "a/b",
        ["--seed", "1"],
        "pre_s1",
    )
    assert (found["seconds"], found["starts"]) == (40.0, 2)
    assert found["evaluation"] == {"count": 10, "raw_top1": 0.5}
    assert jobs.load_unfinished("topic", tmp_path / "kept") == []
    (run / "done").unlink()
    jobs.collect(listed, tmp_path / "runs", "other", "abc", tmp_path / "kept")
    assert jobs.load(listed, "other", tmp_path / "kept") == {}
    (stopped,) = jobs.load_unfinished("other", tmp_path / "kept")
    assert stopped["evaluated_at_epoch"] == 2.0
    (run / "metrics.jsonl").write_text(json.dumps(lines[0]))  # It was never evaluated.
    jobs.collect(listed, tmp_path / "runs", "third", "abc", tmp_path / "kept")
    assert jobs.load_unfinished("third", tmp_path / "kept") == []


def test_records_lie_by_card_and_no_seed_counts_twice(programs, tmp_path):
    jobs = programs("jobs")
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-40GB", "cpu")
    assert [jobs.card(name) for name in names] == ["h100", "h200", "a100", "cpu"]
    assert jobs.cards([{"device": name} for name in names[:2]]) == "H100, H200"
    listed = [jobs.Job("x_s0", ()), jobs.Job("x_s1", ())]
    jobs.keep(record("x_s0"), tmp_path / "h100" / "topic")
    jobs.keep(record("x_s1"), tmp_path / "h200" / "topic")
    assert len(jobs.load(listed, "topic", tmp_path)["x"]) == 2
    jobs.keep(record("x_s1"), tmp_path / "h100" / "topic")
    with pytest.raises(ValueError, match="two records of one run"):
        jobs.load(listed, "topic", tmp_path)


def test_pages_of_runs_are_those_made_from_the_records(programs):
    masked, dense, small = programs("masked"), programs("dense"), programs("small_images")
    made = {
        "masked": masked.page(masked.load(masked.JOBS, masked.TOPIC)),
        "dense": dense.page(
            dense.load(dense.JOBS, dense.TOPIC), dense.load_unfinished(dense.TOPIC)
        ),
        "small_images": small.page(small.load()),
    }
    for name, text in made.items():
        kept = (ROOT / "benchmarks" / f"{name}.md").read_text()
        assert text == kept, f"run `python benchmarks/{name}.py report`"


def test_the_page_of_masked_runs_gives_the_verdict_that_the_numbers_give(
    programs, tmp_path, monkeypatch
):
    masked = programs("masked")
    runs = {
        "pretrain40": [record("pretrain40_s0", raw_loss=0.4)],
        "tenth_scratch": [
            record(f"tenth_scratch_s{i}", ema_top1=v) for i, v in enumerate((0.5, 0.52))
        ],
        "tenth40": [record(f"tenth40_s{i}", ema_top1=v) for i, v in enumerate((0.6, 0.51))],
        "probe40_unscaled": [record("probe40_unscaled_s0", raw_top1=0.1)],
    }
    page = masked.page(runs)
    assert "it is +4.50 points ahead (2 and 2 seeds; the seeds overlap)" in page
    assert "| pre-trained for 40 epochs | 55.50 ± 6.36 | 60.00, 51.00 |" in page
    assert "| no scaling factor | 10.00 | 10.00 | 1.0 | H100 | 0.02 (L) |" in page
    assert "Tiny-ImageNet, 100" not in page  # Nothing of that group has run.
    assert "does not collapse" not in page  # The scaled probe has not run.
    runs["probe40"] = [record("probe40_s0", raw_top1=0.2)]
    assert "it has 10.00 % instead of 20.00 (one seed each)" in masked.page(runs)
    runs["probe40_unscaled"] = [record("probe40_unscaled_s0", raw_top1=0.1001)]
    runs["tenth40"][0]["device"] = "NVIDIA H200"
    assert "different cards and dates (H100, H200)" in masked.page(runs)
    runs["tenth40"] = [record(f"tenth40_s{i}", ema_top1=0.6) for i in range(2)]
    assert "every pre-trained seed is ahead of every other seed" in masked.page(runs)
    runs["tenth"] = [record(f"tenth_s{i}", ema_top1=0.7) for i in range(2)]
    assert "`tenth` lacks 1 of 3 seeds" in masked.page(runs)
    runs["tenth"].append(record("tenth_s2", ema_top1=0.7))
    assert "lacks" not in masked.page(runs)
    monkeypatch.setattr(masked, "HERE", tmp_path)
    masked.plot(runs)
    assert (tmp_path / "masked.png").stat().st_size > 10_000


def test_the_page_of_dense_runs_says_what_is_met(programs):
    dense = programs("dense")
    runs = {
        "coco": [record("coco_s0", raw_bbox_ap=0.89, raw_bbox_ap50=0.98, raw_segm_ap=0.8)],
        "ade20k": [record("ade20k_s0", raw_aacc=0.96, raw_miou=0.7, raw_macc=0.7)],
        "start_vit": [record("start_vit_s0", ema_top1=0.71)],
        "scenes_vit": [record("scenes_vit_s0", raw_miou=0.2, raw_aacc=0.8)],
        "scenes_vit_started": [record("scenes_vit_started_s0", raw_miou=0.4, raw_aacc=0.9)],
    }
    page = dense.page(runs)
    assert "box AP | **89.0** | 90 | no | AP50 98.0, mask AP 80.0 |" in page
    assert "pixels right | **96.0** | 95 | yes | mIoU 70.0 |" in page
    assert "| vit | nothing | 20.0 | 80.0 | 60 | 1.0 |" in page
    assert "| vit | CIFAR-10 (71.0 %) | 40.0 | 90.0 |" in page
    missing = "fastvim from nothing, fastvim from the supervised run, vim from nothing"
    assert f"Not run: scenes with {missing}, vim from the supervised run." in page
    assert "FastVim ahead of Vim, from" not in page  # Neither has run.
    assert "Is FastVim ahead of Vim" in dense.page({})  # Questions come before answers.
    for name, scores in (("fastvim", (0.5, 0.6, 0.55)), ("fastvim_started", (0.61, 0.7, 0.8))):
        runs[f"scenes_{name}"] = [
            record(f"scenes_{name}_s{i}", raw_miou=score, raw_aacc=0.8)
            for i, score in enumerate(scores)
        ]
    runs["scenes_vim"] = [record("scenes_vim_s0", raw_miou=0.3, raw_aacc=0.8)]
    more = dense.page(runs)
    answer = "raises FastVim's mIoU: **yes** (+15.3 points; by seed 61.0, 70.0, 80.0 against 50.0,"
    assert answer in more
    assert "FastVim ahead of Vim, from nothing: **open, for it needs 3 seeds a side**" in more
    runs["scenes_fastvim_started"][0]["evaluation"]["raw_miou"] = 0.59
    assert "raises FastVim's mIoU: **not decided by these seeds**" in dense.page(runs)
    stopped = record("coco_s0", raw_bbox_ap=0.873, raw_segm_ap=0.8) | {"evaluated_at_epoch": 30.0}
    assert "Not finished" not in dense.page(runs, [stopped])  # It has finished since.
    del runs["coco"]
    assert "at epoch 30, gave a box AP of 87.3 %" in dense.page(runs, [stopped])


def test_the_page_of_channels_has_a_row_for_each_kept_one(programs, tmp_path, monkeypatch):
    channels = programs("channels")
    monkeypatch.setattr(channels, "HERE", tmp_path)
    monkeypatch.setattr(channels, "RESULTS", tmp_path / "kept")
    stopped = "fastchannelvim_two_axes"  # before its subsets were scored
    for row, seed in (("vit", 0), ("vit", 1), ("fastchannelvim", 0), (stopped, 0)):
        folder = tmp_path / "runs" / f"{row}_s{seed}"
        folder.mkdir(parents=True)
        subsets = [
            {"channels": list(s), "count": 9, "top1": 0.5 + seed / 10} for s in channels.subsets()
        ]
        scores = {
            "row": row,
            "seed": seed,
            "epochs": 6,
            "images": 20000,
            "train_seconds": 9,
            "top1": 0.5,
            "subsets": subsets[:1] if row == stopped else subsets,
        }
        (folder / "channels.json").write_text(json.dumps(scores))
        start = {"device": {"kind": "H100"}, "versions": {"jax": "1"}, "started": "2026-01-02T"}
        (folder / "environment.json").write_text(json.dumps({"starts": [start]}))
    channels.collect(tmp_path / "runs", "abcdefghij")
    channels.report()
    page = (tmp_path / "channels.md").read_text()
    assert (
        "| vit | all | 55.0 ± 7.1 |" in page
        and "| fastchannelvim | sampled, sorted | 50.0 |" in page
    )
    assert f"| {stopped} | sampled, sorted | 50.0 | – | – | – | – |" in page and "nan" not in page
    assert (
        "6 epochs of the first 20,000 training images" in page
        and "H100, JAX 1, 2026-01-02, commit abcdefg" in page
    )
    assert (tmp_path / "channels.png").stat().st_size > 1000


def speed_row(bench, **row):
    about = {"device": "H100", "jax": "1", "date": "2026-01-02 UTC", "commit": "abcdefghij"}
    return {"bench": bench, "complete": True, "about": about, "quiet": True} | row


def test_the_page_of_speeds_says_what_is_met(programs):
    family = programs("family")
    fast, wide = "fastchannelvim_small_patch8_224", {"pixels": 1024, "batch": 4, "blocks": "scan"}
    parts = {
        "backbone": 5,
        "neck": 3,
        "rpn": 1,
        "proposals": 1,
        "boxes": 1,
        "detections": 0.5,
        "masks": 0.5,
    }
    rows = [
        speed_row(
            "masked_speed",
            row="step",
            model="mae_fastvim_base_patch16_224",
            images_per_s=800.0,
            device_ms=1.0,
        ),
        speed_row("masked_peer", model="pytorch mae vit-b, eager", images_per_s=500.0, ms=2.0),
        speed_row("masked_peer", model="pytorch mae vit-b, default", images_per_s=1000.0, ms=1.0),
        speed_row(
            "model", model=fast, batch=8, precision="bf16", images_per_s=300.0, device_ms=1.0
        ),
        speed_row(
            "channel_peer",
            model="ChannelViT-S/8 (timm)",
            batch=8,
            dtype="bfloat16",
            images_per_s=200.0,
            ms=1.0,
        ),
        speed_row(
            "channel_train", model=fast, batch=8, images_per_s=30.0, sampled_images_per_s=60.0
        ),
        speed_row("segment", model="fastvim_tiny", part="whole", images_per_s=1.0, ms=3.0, **wide),
        speed_row("segment", model="vit_tiny", part="whole", images_per_s=1.0, ms=6.0, **wide),
        *(
            speed_row(
                "detect",
                model="fastvim_tiny",
                part=part,
                images_per_s=1.0,
                ms=ms,
                gmacs=ms**2,
                **wide,
            )
            for part, ms in parts.items()
        ),
        *(
            speed_row("detect", model="fastvim_base", part=part, images_per_s=1.0, ms=ms, **wide)
            for part, ms in (("backbone", 2), ("neck", 2))
        ),
        speed_row("detect", model="torchvision", pixels=1024, batch=1, images_per_s=1.0, ms=9.0),
    ]
    page = family.page(rows)
    named = "fastest of PyTorch's in the same run: mae_fastvim_base_patch16_224 0.80"
    assert named in page and "as the compiled PyTorch ViT-B; met: no." in page
    assert "At batch 8 in bfloat16 it is 1.50 times as fast; met: yes." in page
    assert f"| {fast} | 8 | 30 | 60 |" in page
    faster = [
        row | {"about": row["about"] | {"device": "NVIDIA H200"}}
        for row in rows
        if "peer" not in row["bench"]
    ]
    both = family.page(rows + [row | {"images_per_s": 9e6} for row in faster])
    first, second = both.split("# One H100\n")[1].split("# One H200\n")
    alone = page.split("# One H100\n")[1].split("# Counted")[0]
    assert first.strip() == alone.strip()
    assert "9,000,000" in second and "the same run" not in second  # It has no peer on that card.
    assert "At 1024 px and batch 4 it is 2.00 times as fast; met: yes." in page
    assert "fastvim_tiny, 1024 px, batch 4: 33% of the sum of all parts" in page
    assert "of the multiply-adds they have 9% (4 of 38 billion); met: yes." in page
    # The base model's heads are those of the tiny one.
    assert "fastvim_base, 1024 px, batch 4: 50% of the sum" in page and "masks); met: no." in page
    assert "| torchvision | 1024 | 1 | whole |" in page
    assert "| fastvim_base_patch16_224 | 353 | 72 | 103 | 387 | 159 | 60% | 2.8 |" in page


def test_trials_for_cifar_read_no_test_image(programs, monkeypatch):
    """Every trial's command is valid, and trains and evaluates on disjoint parts of the training images."""
    from fastvim_jax.cli import train as command

    class Started(Exception):
        pass

    def start(config, *_, **__):
        raise Started(config)

    monkeypatch.setattr("fastvim_jax.training.train", start)
    trials = programs("cifar_trials")
    for job, (epochs, *_) in zip(trials.JOBS, trials.TRIALS.values(), strict=True):
        with pytest.raises(Started) as started:
            command.run(job.command[3:])
        (config,) = started.value.args
        assert (config.data.train_split, config.data.eval_split) == ("train[5000:]", "train[:5000]")
        assert config.epochs == epochs and config.data.resident
    record = {"epochs": 56, "log": [{"loss": 1.25}], "seconds": 330.0}
    found = {
        name: [{**record, "evaluation": {"ema_top1": top1, "raw_top1": top1 - 0.01}}]
        for name, top1 in (("light", 0.9), ("half", 0.91))
    }
    rows = [line.split(" | ") for line in trials.table(found).splitlines()[2:]]
    assert [row[2:4] for row in rows] == [["91.00", "90.00"], ["90.00", "89.00"]]
    kept = trials.table(programs("jobs").load(trials.JOBS, trials.TOPIC))
    assert kept in (ROOT / "benchmarks" / "small_images_notes.md").read_text()


def test_folders_of_cifar_hold_the_first_images_of_each_class(programs, tmp_path, monkeypatch):
    folders = programs("cifar_folders")
    monkeypatch.setattr(
        folders, "SETS", {"source": (range(2), 2, 1), "target": (range(2, 3), 1, 2)}
    )
    (tmp_path / "classes.txt").write_text("cat\ndog\nship\n")
    labels = np.array([2, 0, 1, 0, 0, 2, 2])
    for split in ("train", "test"):  # Image i of a split is the bytes "i split".
        files = [f"{i} {split}".encode() for i in range(len(labels))]
        np.savez(
            tmp_path / f"{split}.npz",
            jpeg=np.frombuffer(b"".join(files), np.uint8),
            offsets=np.cumsum([0, *map(len, files)]),
            labels=labels,
        )
    folders.write(tmp_path, tmp_path / "out")
    found = {
        str(file.relative_to(tmp_path / "out")): file.read_text()
        for file in (tmp_path / "out").rglob("*.jpg")
    }
    assert found == {
        "source/train/cat/00001.jpg": "1 train",
        "source/train/cat/00003.jpg": "3 train",
        "source/train/dog/00002.jpg": "2 train",
        "source/val/cat/00001.jpg": "1 test",
        "source/val/dog/00002.jpg": "2 test",
        "target/train/ship/00000.jpg": "0 train",
        "target/val/ship/00000.jpg": "0 test",
        "target/val/ship/00005.jpg": "5 test",
    }

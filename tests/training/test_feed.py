"""What a run says of its data pipeline."""

from __future__ import annotations

import dataclasses

import pytest

from fastvim_jax.data import CellsData, ClassificationData
from fastvim_jax.data.segmentation_config import SegmentationData
from fastvim_jax.training import feed
from fastvim_jax.training.feed import FeedMeter


def _second_lap(meter: FeedMeter, wait: float, seconds: float) -> str | None:
    for step in (0.5, 0.2, 0.3):
        meter.add_step(step)
    assert meter.message(meter.lap(0.01) | {"data_wait": 0.9}) is None
    numbers = meter.lap(seconds) | {"data_wait": wait}
    assert numbers["step_images_per_second"] == pytest.approx(500)
    return meter.message(numbers)


def test_it_says_once_whether_the_data_keep_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "own_cores", lambda: 16)
    meter = FeedMeter(100, ClassificationData(workers=4, rand_augment=9.0))
    assert _second_lap(meter, 0.01, 0.05) == (
        "The step takes up to 500 images/s, the data pipeline gives at least 500: it keeps up."
    )
    assert meter.message(meter.lap(0.5) | {"data_wait": 0.9}) is None
    data = ClassificationData(source="image_folder", path="x", workers=4, rand_augment=9.0)
    said = _second_lap(FeedMeter(100, data), 0.6, 0.5)
    assert said is not None and "gives 200: the step waits for data 60% of the time" in said
    for option in ("data.workers=16", "data.augment_on=device", "prepare --pixels"):
        assert option in said
    best = dataclasses.replace(data, source="pixels", workers=16, augment_on="device")
    said = _second_lap(FeedMeter(100, best), 0.6, 0.5)
    assert said is not None and said.endswith(
        "More cores, or a resident set (data.resident), would help."
    )
    said = _second_lap(FeedMeter(100, dataclasses.replace(best, workers=0)), 0.6, 0.5)
    assert said is not None and said.endswith("What helps: data.workers=4, four a GPU at most.")
    plate = CellsData(source="jump_cp", path="x", workers=16)
    said = _second_lap(FeedMeter(100, plate), 0.6, 0.5)
    assert said is not None and said.endswith(
        "What helps: shards (fastvim data prepare, data.source=array_record)."
    )
    for other in (None, CellsData(path="x", workers=16), SegmentationData(path="x", workers=16)):
        said = _second_lap(
            FeedMeter(100, other), 0.6, 0.5
        )  # None of them takes pixels or is resident.
        assert said is not None and said.endswith("of the time. More cores would help.")


def test_without_numbers_it_is_silent() -> None:
    meter = FeedMeter(100)
    meter.lap(None)
    assert meter.lap(None) == {} and meter.message({"data_wait": 0.5}) is None


def test_lines_before_the_probed_steps_do_not_silence_it() -> None:
    """Say it at a later line; and no rate of the step below the one that the run had."""
    meter = FeedMeter(100)
    for _ in range(3):
        assert meter.message(meter.lap(0.01) | {"data_wait": 0.5}) is None
    meter.add_step(0.5)
    said = meter.message(meter.lap(0.01) | {"data_wait": 0.01, "images_per_second": 400.0})
    assert said is not None and said.startswith("The step takes up to 400 images/s, ")
    assert meter.message(meter.lap(0.01) | {"data_wait": 0.01}) is None

"""The summary picture: there after a run, not drawn too often, and never the end of a run."""

import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from fastvim_jax.analysis.plots import draw_loss, draw_score
from fastvim_jax.training import summary
from fastvim_jax.training.classification.evaluation import HEADLINE
from fastvim_jax.training.summary import SummaryPicture

SCORES = {"count": 9, "raw_top1": 0.5, "raw_loss": 1.0, "ema_top1": 0.25, "ema_loss": 2.0}


@pytest.fixture
def folder(tmp_path):
    train = {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "param_norm": 9.0, "mfu": 0.3}
    records = [{"kind": "train", "step": i, "epoch": i / 2, **train} for i in (1, 2, 3)]
    records += [{"kind": "norms", "step": 2, "epoch": 1.0, "grad/head.bias": 1.0}]
    records += [{"kind": "eval", "step": 2, "epoch": 1.0, **SCORES}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


def test_it_is_drawn_at_most_once_a_minute_and_at_the_end(folder, monkeypatch):
    now = [50.0]
    monkeypatch.setattr(summary.time, "monotonic", lambda: now[0])
    picture = SummaryPicture(folder, 3, HEADLINE)
    file = folder / "summary.png"
    picture.draw()
    assert not file.exists()
    now[0] += 61
    picture.draw()
    first = file.stat().st_mtime_ns
    with Image.open(file) as image:
        assert image.size == (1500, 750)
        assert len(image.convert("RGB").getcolors(10**6)) > 50
    picture.draw()
    assert file.stat().st_mtime_ns == first
    picture.draw(at_once=True)
    assert file.stat().st_mtime_ns > first
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.jsonl", "summary.png"]


def test_a_picture_that_cannot_be_written_is_a_warning(folder, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(summary, "plot_summary", fail)
    SummaryPicture(folder, 3, HEADLINE).draw(at_once=True)
    assert "summary.png could not be written" in caplog.text


def test_a_log_without_a_line_can_be_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    SummaryPicture(tmp_path, 3, HEADLINE).draw(at_once=True)
    assert (tmp_path / "summary.png").stat().st_size > 10_000


@pytest.mark.parametrize("draw", [draw_loss, draw_score])
@pytest.mark.parametrize("top1", [(0.277, 0.174, 0.192), (0.3, 0.7, 0.93)])
def test_the_legend_covers_no_score(draw, top1):
    """Draw the curves of a run that does not learn: its last loss and its last accuracy lay under the legends."""
    found = zip((5, 10, 15), (1.383, 1.416, 1.415), top1, strict=True)
    records = [
        {"kind": "eval", "epoch": epoch, "raw_loss": loss, "raw_top1": score}
        for epoch, loss, score in found
    ]
    records += [{"kind": "train", "epoch": 4 * i, "loss": 1.39 - 0.01 * i} for i in range(1, 4)]
    axes = Figure(figsize=(4, 2.8)).subplots()
    draw(axes, records, HEADLINE)
    axes.figure.draw_without_rendering()
    box = axes.get_legend().get_window_extent()
    points = [point for line in axes.lines for point in axes.transData.transform(line.get_xydata())]
    assert len(points) >= 3 and not any(box.contains(*point) for point in points)


@pytest.mark.parametrize("top1", [0.0, 0.5, 0.93, 0.999, 1.0])
def test_no_tick_of_an_accuracy_is_above_all(top1):
    axes = Figure(figsize=(4, 2.8)).subplots()
    draw_score(axes, [{"kind": "eval", "epoch": 9, "raw_loss": 1.0, "raw_top1": top1}], HEADLINE)
    low, high = axes.get_ylim()
    assert low <= top1 < high and low < 1
    assert max(tick for tick in axes.get_yticks() if low <= tick <= high) <= 1.0 + 1e-9

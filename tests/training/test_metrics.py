"""The run's numbers: JSON lines that survive a crash, event files that TensorBoard reads."""

import contextlib
import json
import os
import subprocess
import sys
import threading

import pytest

from fastvim_jax.training.metrics import RunLog, read_metrics


def write_run(folder, steps, *, start=0):
    with RunLog(folder, step=start, total_steps=20, progress=False) as log:
        for step in steps:
            log.advance()
            log.write("train", step, {"epoch": step / 10, "loss": 1 / step})
        log.write("eval", steps[-1], {"epoch": steps[-1] / 10, "raw_top1": 0.5})


def test_lines_are_json_and_floats_exact(tmp_path):
    write_run(tmp_path, [3, 6, 9])
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [3, 6, 9, 9]
    assert records[0] == {"kind": "train", "step": 3, "epoch": 0.3, "loss": 1 / 3}
    assert read_metrics(tmp_path, "eval") == [records[-1]]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records


def test_what_was_written_past_the_checkpoint_is_dropped_on_resume(tmp_path):
    write_run(tmp_path, [3, 6, 9])
    write_run(tmp_path, [9, 12], start=6)
    assert [r["step"] for r in read_metrics(tmp_path, "train")] == [3, 6, 9, 12]
    assert [r["step"] for r in read_metrics(tmp_path, "eval")] == [12]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    write_run(tmp_path, [3, 6])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "st')
    assert [r["step"] for r in read_metrics(tmp_path)] == [3, 6, 6]
    write_run(tmp_path, [9], start=6)
    assert [r["step"] for r in read_metrics(tmp_path)] == [3, 6, 6, 9, 9]


DAMAGED = [
    b"1",
    b"null",
    b"[]",
    b'{"kind": 3}',
    b'{"step": 3}',
    b'{"kind": "train", "st',
    b"\xff\xfe",
]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_costs_itself_alone(tmp_path, damage, caplog):
    write_run(tmp_path, [3, 6])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    before = b"\n".join([lines[0], damage, *lines[1:]]) + b"\n"
    path.write_bytes(before)
    assert [r["step"] for r in read_metrics(tmp_path)] == [3, 6, 6]
    with RunLog(tmp_path, step=6, total_steps=20) as log:
        log.write("train", 9, {"epoch": 0.9, "loss": 1 / 9})
    assert [r["step"] for r in read_metrics(tmp_path)] == [3, 6, 6, 9]
    assert "1 lines of metrics.jsonl cannot be read" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before


def test_a_log_with_a_hole_says_so(tmp_path, caplog):
    with RunLog(tmp_path, step=6, total_steps=20, progress=False):
        pass
    assert "holds nothing of steps 1 to 6" in caplog.text


LOGGING = """
import sys
from pathlib import Path
from fastvim_jax.training.metrics import RunLog, read_metrics
folder, text = Path(sys.argv[1]), "x" * int(sys.argv[2])
sys.stdin.read()
with RunLog(folder, step=0, total_steps=5) as log:
    for step in range(1, 6):
        log.advance()
        log.show(loss=0.25)
        log.say(text)
        print("another library", file=sys.stderr)
        log.write("train", step, {"loss": 1.0})
sys.exit(0 if len(read_metrics(folder)) == 5 else 1)
"""


def write_in_a_process(folder, length, stderr):
    return subprocess.Popen(
        [sys.executable, "-c", LOGGING, str(folder), str(length)],
        stdin=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"},
    )


@pytest.mark.drawn("trainings", one_in=6)
@pytest.mark.parametrize("terminal", [False, True])
def test_nobody_reading_the_output_ends_nothing(tmp_path, terminal):
    """Go on without a reader, as in `fastvim train ... 2>&1 | head`.

    A job in the background loses its reader when its terminal is closed.
    """
    reading, writing = os.openpty() if terminal else os.pipe()
    process = write_in_a_process(tmp_path, 100_000, writing)
    os.close(writing)
    os.close(reading)
    process.stdin.close()
    assert process.wait(timeout=120) == 0


def test_a_terminal_shows_the_bar_and_every_line(tmp_path):
    reading, writing = os.openpty()
    process = write_in_a_process(tmp_path, 20, writing)
    os.close(writing)
    process.stdin.close()
    watch = threading.Timer(120, process.kill)  # so that a hang fails
    watch.start()
    shown = bytearray()
    with contextlib.suppress(OSError):  # a terminal that its last process has left
        while part := os.read(reading, 2**16):
            shown += part
    os.close(reading)
    assert process.wait() == 0
    watch.cancel()
    assert shown.count(b"x" * 20) == shown.count(b"another library") == 5
    assert b"5/5" in shown and b"loss 0.25" in shown


def test_a_missing_folder_has_no_records(tmp_path):
    assert read_metrics(tmp_path / "nothing") == []


def test_event_files_hold_the_same_numbers(tmp_path):
    write_run(tmp_path, [3, 6])
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = list((tmp_path / "tensorboard").iterdir())
    assert len(files) == 1
    found = {}
    for event in EventFileLoader(str(files[0])).Load():
        for value in event.summary.value:
            number = value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
            found[value.tag, event.step] = number
    assert abs(found["train/loss", 3] - 1 / 3) < 1e-6
    assert abs(found["eval/raw_top1", 6] - 0.5) < 1e-6


def test_progress_goes_to_standard_error_and_can_be_silenced(tmp_path, capsys):
    for shown in (True, False):
        with RunLog(tmp_path, step=0, total_steps=5, progress=shown) as log:
            log.advance()
            log.show(loss=0.25)
            log.say("epoch 1: done [not markup]")
        printed = capsys.readouterr()
        assert printed.out == ""
        assert ("epoch 1: done [not markup]" in printed.err) == shown

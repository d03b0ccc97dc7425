"""Records of image files: written as they are made, gone on with after an interruption, the same in every format."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvim_jax.errors import UserError
from fastvim_jax.inference.row_files import KINDS, already_written, claim, reserved, write_records
from tests.support import read_table

COLUMNS = {"file": "string", "value": "float32", "error": "string"}


@dataclasses.dataclass
class Said:
    file: str
    value: float | None = None
    error: str | None = None
    rows: int = 1

    def to_dict(self) -> dict[str, Any]:
        return {"file": self.file, "value": self.value, "error": self.error}

    def to_rows(self) -> list[tuple]:
        return [(self.file, self.value, self.error)] * self.rows


@pytest.fixture
def records(rng: np.random.Generator) -> list[Said]:
    names = ["a.png", "b, with a comma.png", 'c "quoted".png', "d\u2028line.png", "e.png"]
    said = [Said(name, float(np.float32(rng.normal()))) for name in names]
    return [*said, Said("bad.png", error="cannot be read")]


def read(out: Path) -> list[tuple[Any, ...]]:
    if out.suffix == ".jsonl":
        lines = out.read_text("utf-8").split("\n")[:-1]
        return [tuple(json.loads(line).values()) for line in lines]
    table = read_table(out)
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_holds_the_same(records: list[Said], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "new folder" / f"found{kind}"
    assert already_written(out) == {}
    assert list(write_records(records, out, COLUMNS)) == records
    expected = [tuple(each.to_dict().values()) for each in records]
    for (*names, value, error), (*wanted, number, reason) in zip(read(out), expected, strict=True):
        assert (names, error) == (wanted, reason)
        assert value == pytest.approx(number, rel=1e-6) if number is not None else value is None
    assert [file.name for file in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("kind", (".jsonl", ".csv"))
def test_an_interrupted_file_is_gone_on_with(
    records: list[Said], tmp_path: Path, kind: str
) -> None:
    whole, out = tmp_path / f"whole{kind}", tmp_path / f"out{kind}"
    for each in records[:5]:
        each.rows = 3
    list(write_records(records, whole, COLUMNS))
    made = write_records(records, out, COLUMNS)
    for _ in range(3):
        next(made)
    assert set(already_written(out)) == {
        each.file for each in records[:3]
    }  # Before the fourth is made.
    made.close()
    torn = out.read_bytes()
    list(write_records(records[3:4], out, COLUMNS))
    line = out.read_bytes()[len(torn) :]
    out.write_bytes(torn + line[:-4])  # A crash in the middle of the fourth line.
    done = already_written(out)
    assert set(done) == {each.file for each in records[:3]}
    list(write_records([each for each in records if each.file not in done], out, COLUMNS))
    assert out.read_bytes() == whole.read_bytes()
    assert already_written(out) == {each.file: each.error is not None for each in records}


def test_an_interrupted_parquet_file_is_gone_on_with(records: list[Said], tmp_path: Path) -> None:
    """Interrupt a table whose texts look like nulls and have line breaks: it ends as one that was written at once."""
    texts = ["NA", "null", "nan", "two\nlines", 'a "quoted", one']
    for each, text in zip(records, texts, strict=False):
        each.file, each.rows = text, 2
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    list(write_records(records, whole, COLUMNS))
    claim(out, {"model": "a"})
    made = write_records(records, out, COLUMNS)
    for _ in range(4):
        next(made)
    made.close()
    assert not out.exists()
    with pytest.raises(UserError, match="another model: name another file"):
        claim(out, {"model": "b"})
    claim(out, {"model": "a"})
    done = already_written(out)
    assert list(done) == texts[:4]
    list(write_records([each for each in records if each.file not in done], out, COLUMNS))
    assert read(out) == read(whole) and [row[0] for row in read(out)][:4:2] == texts[:2]
    assert {file.name for file in tmp_path.iterdir()} == {"out.parquet", "whole.parquet"}
    list(write_records([], tmp_path / "none.parquet", COLUMNS))
    assert read(tmp_path / "none.parquet") == []


def test_a_process_killed_behind_its_last_step_leaves_no_rows(
    records: list[Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill a command when the Parquet file is complete and its rows still lie there: the next one deletes them."""
    out = tmp_path / "out.parquet"
    claim(out, {"model": "a"})
    replace = os.replace

    def killed(*files: Path) -> None:
        replace(*files)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with contextlib.suppress(KeyboardInterrupt):
        list(write_records(records, out, COLUMNS))
    rows = tmp_path / "out.parquet.partial.csv"
    whole = rows.read_bytes()
    rows.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])  # Of another file, as it seems.
    with pytest.raises(UserError, match="is complete"):
        already_written(out)
    assert rows.exists()
    rows.write_bytes(whole)
    with pytest.raises(UserError, match="is complete"):
        already_written(out)
    assert [file.name for file in tmp_path.iterdir()] == ["out.parquet"]
    assert len(read(out)) == len(records)


@pytest.mark.parametrize("kept", (1, 2, 3))
def test_a_crash_between_two_rows_of_an_image_loses_none(tmp_path: Path, kept: int) -> None:
    """Cut a table where a row ends, after `kept` images and a part of the next one, and go on."""
    said = [Said(name, 1.5, rows=3) for name in "abcd"]
    said[1] = Said("b", error="two\nlines")
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    list(write_records(said, whole, COLUMNS))
    list(write_records(said[:kept], out, COLUMNS))
    there = out.stat().st_size
    assert list(already_written(out)) == list("a" if kept > 1 else "") + list("bc"[: kept - 1])
    next_one = whole.read_bytes()[there:].partition(b"\n")[0] + b"\n"  # A row, or a part of one.
    out.write_bytes(out.read_bytes() + next_one)
    done = already_written(out)
    assert list(done) == list("abc"[:kept]), "images without all rows count as done"
    list(write_records([each for each in said if each.file not in done], out, COLUMNS))
    assert out.read_bytes() == whole.read_bytes()


def test_two_commands_do_not_write_one_file(tmp_path: Path) -> None:
    """Refuse the second from before it reads what is there. Nothing is left beside the file."""
    out = tmp_path / "new folder" / "out.parquet"
    with reserved(out):
        with pytest.raises(UserError, match="is in use by process .*choose another file"):
            with reserved(out):
                pass
        with reserved(out.with_suffix(".csv")):
            pass
    with reserved(out):
        pass
    assert not [*out.parent.iterdir()]


def test_only_regular_files_are_written(tmp_path: Path) -> None:
    """Refuse a FIFO, which stood still until somebody wrote to it."""
    os.mkfifo(tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="is no regular file"), reserved(tmp_path / "out.jsonl"):
        pass


def test_what_cannot_be_gone_on_with_is_refused(records: list[Said], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ends in .jsonl"):
        already_written(tmp_path / "found.txt")
    table = tmp_path / "found.parquet"
    list(write_records(records, table, COLUMNS))
    with pytest.raises(UserError, match="is complete, and Parquet files cannot be added to"):
        already_written(table)
    other = tmp_path / "other.csv"
    list(write_records(records, other, {"file": "string", "size": "int64", "error": "string"}))
    with pytest.raises(UserError, match="another model or option"):
        list(write_records(records, other, COLUMNS))
    (tmp_path / "notes.jsonl").write_text("no JSON\n")
    with pytest.raises(UserError, match="holds no results"):
        already_written(tmp_path / "notes.jsonl")


def test_a_file_is_continued_only_by_what_made_it(records: list[Said], tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "found.csv"
    claim(out, {"model": "a", "top_k": 5})
    claim(out, {"model": "b", "top_k": 5})  # No record is there yet.
    list(write_records(records, out, COLUMNS))
    claim(out, {"model": "b", "top_k": 5})
    with pytest.raises(UserError, match="another model and top_k: name another file"):
        claim(out, {"model": "a", "top_k": 1})
    (tmp_path / "new folder" / "found.csv.made_by.json").unlink()
    with pytest.raises(UserError, match="says what made its records, cannot be read"):
        claim(out, {"model": "b", "top_k": 5})
    assert [file.name for file in out.parent.iterdir()] == [out.name]

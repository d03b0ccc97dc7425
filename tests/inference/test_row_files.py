"""Records of image files: written as they are made, gone on with after an interruption, the same in every format."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvim_jax.errors import UserError
from fastvim_jax.inference.row_files import KINDS, already_written, claim, write_records
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


def test_what_cannot_be_gone_on_with_is_refused(records: list[Said], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ends in .jsonl"):
        already_written(tmp_path / "found.txt")
    table = tmp_path / "found.parquet"
    made = write_records(records, table, COLUMNS)
    next(made)
    made.close()
    assert already_written(table) == {}  # Without its last part a Parquet file is none.
    list(write_records(records, table, COLUMNS))
    with pytest.raises(UserError, match="cannot be continued"):
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
    claim(tmp_path / "found.parquet", {"model": "b"})
    assert [file.name for file in out.parent.iterdir()] == [out.name]

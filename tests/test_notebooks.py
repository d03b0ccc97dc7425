"""The notebooks: committed as they ran, from top to bottom, without noise; and they still run."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.support import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Runs each cell as it stands but for less training, which is most of the time: (as written, as tested).
SHORTER = {
    "cells": [("steps = 240", "steps = 30")],
    "fine_tune": [("epochs=6)", "epochs=2)"), ("epochs=12,", "epochs=2,")],
    "masked": [("steps = 300", "steps = 40")],
    "pooling": [("steps=150", "steps=20")],
    "scans": [("[16, 256, 1024]", "[16, 64]")],
    "tour": [("range(200)", "range(25)")],
}
each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def test_the_notebooks_of_the_pages_are_there() -> None:
    names = {file.stem for file in NOTEBOOKS}
    assert {"tour", "scans", "fine_tune", "masked", "cells", "pooling"} <= names
    assert sum(file.stat().st_size for file in NOTEBOOKS) < 1.5e6


@each_notebook
def test_the_outputs_are_those_of_one_run_in_order(file: Path) -> None:
    notebook = json.loads(file.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) >= 2
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    for cell in code:
        ast.parse("".join(cell["source"]))


@each_notebook
def test_it_opens_with_what_it_shows_and_how_long_it_takes(file: Path) -> None:
    first = json.loads(file.read_text())["cells"][0]
    text = "".join(first["source"])
    assert first["cell_type"] == "markdown" and text.startswith("# ")
    assert "**Shows**" in text and re.search(r"\*\*Takes\*\* about \d+ seconds", text)


@each_notebook
def test_nothing_is_stored_but_sources_and_outputs(file: Path) -> None:
    notebook = json.loads(file.read_text())
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    for number, cell in enumerate(notebook["cells"]):
        assert cell["metadata"] == {} and cell["id"] == f"cell-{number}"
        assert not any(output.get("metadata") for output in cell.get("outputs", ()))
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    assert file.read_text() == text, "run `make notebooks`"
    assert not re.search(r"/(home|tmp|root|work)/", text)


@pytest.mark.drawn
@pytest.mark.slow
@each_notebook
def test_it_runs_from_top_to_bottom(file: Path) -> None:
    for module in ("nbclient", "nbformat", "ipykernel"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'fastvim-jax[notebooks]'")
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
    assert spec is not None and spec.loader is not None
    scripts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scripts)
    notebook = scripts.tidy(scripts.run_notebook(file, replace=SHORTER.get(file.stem, ())))
    committed = json.loads(file.read_text())

    def kinds(notebook: dict) -> list[list[str]]:
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        return [[output["output_type"] for output in cell["outputs"]] for cell in cells]

    assert kinds(notebook) == kinds(committed)

"""Run the notebooks and write them back with their outputs: `python scripts/notebooks.py [NAME ...]`.

What is written depends on the sources and the outputs alone: no times, no machine, no versions, so that a diff shows
what a reader would see.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def run_notebook(file: Path, *, seconds: int = 600, replace: Sequence[tuple[str, str]] = ()) -> Any:
    """Run a notebook in a fresh kernel and return it with its outputs.

    Args:
        file: the notebook; its folder becomes the working directory.
        seconds: limit of one cell.
        replace: pairs of texts; each first one, which must stand in the code exactly once, becomes the second.

    Raises:
        ValueError: a text to replace does not stand in the code once.
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(file, as_version=4)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for written, tested in replace:
        if sum(cell["source"].count(written) for cell in code) != 1:
            raise ValueError(f"{file.name} has not one {written!r}")
        for cell in code:
            cell["source"] = cell["source"].replace(written, tested)
    # A backend chosen outside would keep the kernel from showing figures.
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    paths = [str(FOLDER.parent), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    resources = {"metadata": {"path": str(file.parent)}}
    client = NotebookClient(notebook, timeout=seconds, kernel_name="python3", resources=resources)
    client.execute(env=env)
    return notebook


def tidy(notebook: Any) -> dict[str, Any]:
    """Keep sources and outputs only; cells are numbered in order."""
    cells = []
    for i, cell in enumerate(notebook["cells"]):
        kept = {"cell_type": cell["cell_type"], "id": f"cell-{i}", "metadata": {}}
        if cell["cell_type"] == "code":
            kept |= {
                "execution_count": cell["execution_count"],
                "outputs": [_tidy_output(output) for output in _joined(cell["outputs"])],
            }
        source = cell["source"]
        text = source if isinstance(source, str) else "".join(source)
        cells.append(kept | {"source": text.splitlines(keepends=True)})
    return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def _joined(outputs: list[Any]) -> list[Any]:
    """Join neighbouring pieces of one stream: where a stream is cut is a matter of time."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if (
            last
            and output["output_type"] == last["output_type"] == "stream"
            and output["name"] == last["name"]
        ):
            last["text"] += output["text"]
        else:
            joined.append(dict(output))
    return joined


def _tidy_output(output: dict[str, Any]) -> dict[str, Any]:
    if output["output_type"] == "stream":
        return output | {"text": output["text"].splitlines(keepends=True)}
    return output | {"metadata": {}}


def main(names: list[str]) -> None:
    """Run and rewrite the named notebooks, or all."""
    for file in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        begin = time.perf_counter()
        notebook = tidy(run_notebook(file))
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
        file.write_text(text + "\n")
        print(f"{file.name}: {time.perf_counter() - begin:.0f} s, {len(text) // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])

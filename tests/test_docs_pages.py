"""The pages of docs/: their code runs, every link and anchor leads somewhere, and the site builds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastvim_jax.analysis import activations, count_parameters, gmacs
from fastvim_jax.layers.pooling import Pooling
from fastvim_jax.models import MaskedAutoencoderConfig, list_models, model_config
from tests.support import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
)


def run_page(name: str, *changes: tuple[str, str]) -> dict:
    """Return the names that the page's Python code leaves behind, run from top to bottom.

    Each of the changes is a text that stands on the page once, and what is run in its place.
    """
    names: dict = {}
    text = (ROOT / "docs" / f"{name}.md").read_text()
    for written, tested in changes:
        assert text.count(written) == 1
        text = text.replace(written, tested)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, f"docs/{name}.md", "exec"), names)
    return names


def test_the_code_of_the_kernels_page_runs() -> None:
    assert run_page("kernels")["y"].shape == (2, 14, 8)


def test_the_code_of_the_pooling_page_runs() -> None:
    names = run_page("pooling")
    assert isinstance(names["windows"], Pooling)
    assert names["windows"].scan_length == 4 and names["logits"].shape == (2, 1000)


@pytest.mark.slow
def test_the_code_of_the_masked_page_runs() -> None:
    """Run it with a small model of one block, because compiling twelve would take most of the time."""
    small = "depth=1, embed_dim=32, decoder_depth=1, decoder_dim=32"
    names = run_page("masked", ('_224", rngs', f'_224", {small}, rngs'))
    assert names["config"].epochs == 400
    assert names["out"].predicted.shape == (2, 196, 768)
    assert names["out"].latent.shape == (2, 160, 32)
    kept = (~names["removed"]).sum((1, 2))
    for latent, count in zip(np.asarray(names["out"].latent), kept, strict=True):
        assert np.any(latent[count - 1]) and not np.any(latent[count:])


def prose(page: Path) -> str:
    """Return the page without its code blocks."""
    return re.sub(r"^( *)(`{3,})[^\n]*\n.*?^\1\2`* *$", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings: lower case, punctuation gone, spaces to hyphens."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", prose(page), re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = 0
        while (name := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_and_anchor_leads_somewhere(page: Path) -> None:
    broken = []
    links = re.findall(r"\]\(<?([^)>\s]+)>?(?: [^)]*)?\)", prose(page))
    links += re.findall(r"(?:src|href)=\"([^\"]+)\"", prose(page))
    for link in links:
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        if not target.exists():
            broken.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            broken.append(f"{link}: no such heading")
    assert not broken, "\n".join(broken)


def test_a_broken_anchor_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c!\n\n## Twice\n\n## Twice\n\n```sh\n# no heading\n```\n")
    assert anchors(page) == {"a-b-c", "twice", "twice-1"}


def test_the_model_table_lists_every_model_with_its_costs() -> None:
    text = (ROOT / "docs" / "model_table.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    costs = {row[0].strip("`"): row[1:] for row in rows}
    assert set(list_models()) <= set(costs)
    for name in list_models("*_tiny_*"):
        config = model_config(name)
        expected = [f"{count_parameters(config):,}", f"{gmacs(config):.2f}"]
        if not isinstance(config, MaskedAutoencoderConfig):
            expected.append(f"{activations(config):.1f}")
        assert costs[name][: len(expected)] == expected, "run `make figures`"


@pytest.mark.slow
def test_the_site_builds_strictly_with_every_page(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'fastvim-jax[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "docs" / f"{page.stem}.html").is_file()
    models = (tmp_path / "api" / "models.html").read_text()
    assert "Build the model called" in models and "pool_axes" in models

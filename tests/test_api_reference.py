"""The API reference: every public name has its place on a page of docs/site/api."""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType

import pytest

from tests.support import ROOT

PAGES = sorted((ROOT / "docs" / "site" / "api").glob("*.md"))
# Constants and types without a docstring of their own, which the pages cannot show; the version.
PLAIN = {"__version__", "AnyModelConfig", "ModelConfig", "Loss", "STOPPED_STATUS"}


def shown() -> set[tuple[str, str]]:
    """Collect (module, name) of all that the pages show."""
    found: set[tuple[str, str]] = set()
    for page in PAGES:
        for block in re.split(r"^::: ", page.read_text(), flags=re.MULTILINE)[1:]:
            path = block.split()[0]
            members = re.search(r"members: \[(.*?)\]", block)
            try:
                module = importlib.import_module(path)
            except ModuleNotFoundError:
                place, name = path.rsplit(".", 1)
                assert hasattr(importlib.import_module(place), name), f"{page.name}: {path}"
                found.add((place, name))
                continue
            names = members[1].replace(" ", "").split(",") if members else of(module)
            assert all(hasattr(module, name) for name in names), f"{page.name}: {path}"
            found |= {(path, name) for name in names}
    return found


def of(module: ModuleType) -> list[str]:
    """List the public functions and classes that a module defines."""
    return [
        name
        for name, each in vars(module).items()
        if not name.startswith("_") and getattr(each, "__module__", None) == module.__name__
    ]


@pytest.mark.parametrize(
    "package",
    ["fastvim_jax", "fastvim_jax.models", "fastvim_jax.training", "fastvim_jax.inference",
     "fastvim_jax.interop", "pallas_kernels"],
)  # fmt: skip
def test_every_public_name_is_on_a_page(package: str) -> None:
    module = importlib.import_module(package)
    pages = shown()
    missing = []
    for name in sorted(set(module.__all__) - PLAIN):
        each = inspect.unwrap(getattr(module, name))
        if (each.__module__, name) not in pages:
            missing.append(f"{each.__module__}.{name}")
    assert not missing

"""Write the model card of a saved model, README.md with the header that the Hugging Face hub reads, and its licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fastvim_jax.errors import counted
from fastvim_jax.regular_file import read_regular_file

CARD_FILE = "README.md"
LICENCE = "Licence"
"""Heading of the section that names the licence. Its first line is the licence's name."""

# The hub's names of licences that weights have; any other licence is "other" there, with a name of its own.
_HUB_NAMES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0
    isc lgpl lgpl-2.1 lgpl-3.0 mit mpl-2.0 ms-pl ncsa odbl odc-by openrail osl-3.0 pddl unlicense wtfpl zlib
    """.split()
)


def card_text(
    about: Mapping[str, Any], parameters: int, sections: Mapping[str, str], dtype: str
) -> str:
    """Return the text of a model card.

    Args:
        about: the contents of the saved model's config.json.
        parameters: number of the model's parameters.
        sections: text by heading. The hub's header names the licence of the section `LICENCE`, if there is one.
        dtype: of the stored weights.
    """
    config = about["model"]
    classes = len(about["class_names"]) or config.get("num_classes", 0)
    size = "x".join(map(str, about["preprocessing"]["image_size"]))
    header = [
        "library_name: fastvim-jax",
        *_licence_header(sections.get(LICENCE, "")),
        f"tags: [{_task(config)}, jax, mamba, vision]",
    ]
    parts = [
        "\n".join(["---", *header, "---"]),
        f"# {config['class'].removesuffix('Config')}",
        f"{parameters:,} parameters, stored as {dtype}; images of {size} pixels"
        + (f"; {counted(classes, 'class', 'classes')}." if classes else "."),
        '```python\nfrom fastvim_jax import from_pretrained\n\nmodel = from_pretrained("FOLDER_OR_OWNER/NAME")\n```',
        *(f"## {heading}\n\n{text}" for heading, text in sections.items()),
        f"Written by fastvim-jax {about['fastvim_jax']}, JAX {jax.__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def _task(config: Mapping[str, Any]) -> str:
    """Return the hub's name for what a model does."""
    tasks = {"UperNetConfig": "image-segmentation", "DetectorConfig": "object-detection"}
    plain = "image-classification" if config.get("num_classes") else "image-feature-extraction"
    return tasks.get(config["class"], plain)


def _licence_header(licence: str) -> list[str]:
    """Return the header's lines for a licence: the hub's name of it, or "other" and a name in the hub's letters."""
    name = licence.strip().partition("\n")[0].lower()
    name = re.sub(r"\b(the|licen[cs]e|version)\b", " ", name)
    name = re.sub(r"[^a-z0-9.]+", "-", name).strip("-.")
    if not name:
        return []
    if name in _HUB_NAMES:
        return [f"license: {name}"]
    return ["license: other", f"license_name: {name[:60]}"]


def read_licence(folder: Path | str) -> str:
    """Return the licence that a saved model's card names: the text of its section, else the header's name, or ""."""
    try:
        text = read_regular_file(Path(folder) / CARD_FILE).decode("utf-8", "replace")
    except OSError:
        return ""
    if section := re.search(rf"(?ms)^## {LICENCE}\n+(.*?)(?=^## |^Written by |\Z)", text):
        return section[1].strip()
    header = re.match(r"(?s)---\n(.*?)\n---", text)
    if header and (found := re.search(r"(?m)^license: *['\"]?([^'\"\n]+)", header[1])):
        return found[1].strip()
    return ""

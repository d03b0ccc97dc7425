"""Bring the repository's pages into the site under their own paths, and turn links to what is no page into plain text.

A page of the repository links to its neighbours, to pictures and to source files. The first two are part of the site;
a link to a source file, a folder or a notebook would lead nowhere, so its text stays and the link goes.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("*.md", "docs/*.md", "benchmarks/*.md")
PICTURES = ("docs/*.png", "docs/*.svg", "docs/figures/*.png", "benchmarks/*.png")
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's pages and pictures."""
    for pattern in (*PAGES, *PICTURES):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Unlink what is in the repository and not in the site."""
    if page.file.src_uri.startswith("api/"):
        return markdown
    folder = PurePosixPath(page.file.src_uri).parent

    def keep(match: re.Match[str]) -> str:
        text, link = match.group(1), match.group(2)
        if "://" in link:
            return match.group(0)
        target = (ROOT / folder / link).resolve()
        inside = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        if files.get_file_from_path(inside):
            return match.group(0)
        if target.is_dir() and files.get_file_from_path(f"{inside}/README.md"):
            return f"[{text}]({link.rstrip('/')}/README.md)"
        if target.exists():
            return text
        return match.group(0)  # The build reports a link that leads nowhere.

    return _LINK.sub(keep, markdown)

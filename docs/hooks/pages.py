"""The site's pages that are no files of docs/: README.md, CONTRIBUTING.md, experiments/ and the API reference.

mkdocs calls ``on_files`` before it reads a page. API pages come from the folders of the package as they are, so a new
file or folder shows up by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rlhf_lit"
AT_THE_ROOT = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}


def api_pages() -> dict[str, str]:
    """API page → its Markdown: one page for the package's own files, one for each of its folders that has code."""
    rooms = sorted(folder for folder in PACKAGE.iterdir() if list(folder.glob("*.py")))
    pages = {"api/rlhf_lit.md": _api_page(PACKAGE, PACKAGE.glob("*.py"))}
    return pages | {f"api/{room.name}.md": _api_page(room, room.rglob("*.py")) for room in rooms}


def _api_page(folder: Path, files: Iterator[Path]) -> str:
    """One ``:::`` of mkdocstrings for each public file, the folder's own ``__init__`` first."""
    public = sorted(file for file in files if file.stem == "__init__" or not file.stem.startswith("_"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in public]
    own = ".".join(folder.relative_to(ROOT).parts)
    first = f"::: {own}\n    options: {{members: false, show_root_heading: false, show_root_toc_entry: false}}\n"
    return "\n".join([f"# {own}\n", first, *(f"::: {name}\n" for name in names if name != own)])


def experiment_pages() -> list[str]:
    """Pages of experiments/, by their paths in the repository."""
    return sorted(str(page.relative_to(ROOT)) for page in (ROOT / "experiments").rglob("*.md"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and complete the navigation."""
    repository = AT_THE_ROOT | {page: page for page in experiment_pages()}
    for uri, path in repository.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    api = api_pages()
    for uri, text in api.items():
        files.append(File.generated(config, uri, content=text))
    docs = sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").glob("*.md"))
    found = {"experiments/": experiment_pages(), "api/": list(api)}
    config.nav = _complete(config.nav, docs, found)
    return files


def _complete(nav: Any, docs: list[str], found: dict[str, list[str]]) -> Any:
    """The navigation with patterns and folders replaced by their pages."""
    if isinstance(nav, list):
        return [page for entry in nav for page in _pages(entry, docs, found)]
    return found.get(nav, nav)


def _pages(entry: Any, docs: list[str], found: dict[str, list[str]]) -> list[Any]:
    if isinstance(entry, dict):
        return [{title: _complete(below, docs, found) for title, below in entry.items()}]
    return [page for page in docs if fnmatch(page, entry)] if "*" in entry else [entry]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page without sections gives the room of its table of contents to its tables."""
    if not re.search(r"^(## |:::)", markdown, flags=re.M):
        page.meta["hide"] = ["toc"]
    return markdown

"""Links between pages, written as they resolve in the repository, made to resolve in the site.

A page that is linked leads to its place in the site; any other file that is linked (a picture, a config, a table) is
copied there. A folder leads to ``repo_url``, or loses its link where mkdocs.yml has none. A link to nothing is left as
it is: mkdocs warns, and ``--strict`` fails.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"(^```.*?^```$)", re.S | re.M)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links rewritten; fenced code is left alone."""
    source = Path(page.file.abs_src_path or "")
    if ROOT not in source.parents:  # an API page
        return markdown

    def rewritten(match: re.Match[str]) -> str:
        picture, text, target, anchor = match.group(1, 2, 3, 4)
        path = (source.parent / target).resolve()
        if ":" in target or not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        if path.is_dir():
            address = f"{config.repo_url.rstrip('/')}/tree/main/{path.relative_to(ROOT)}" if config.repo_url else ""
            return f"[{text}]({address})" if address else text
        uri = place(path)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        return f"{picture}[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{anchor or ''})"

    parts = FENCED.split(markdown)
    return "".join(part if index % 2 else LINK.sub(rewritten, part) for index, part in enumerate(parts))


def place(path: Path) -> str:
    """Where a file of the repository stands in the site: docs/ is its root, README.md its first page."""
    if path == ROOT / "README.md":
        return "index.md"
    return path.relative_to(ROOT / "docs" if path.is_relative_to(ROOT / "docs") else ROOT).as_posix()


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Sphinx's roles (``:class:`PPO```) lose their marks in the API pages."""
    return re.sub(r":(?:class|func|meth|mod|attr):<code>~?", "<code>", html)

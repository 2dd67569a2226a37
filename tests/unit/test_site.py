"""The site of the documents: its navigation, links to headings and, where mkdocs is installed, its build."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments").rglob("*.md")),
]
FROM_ELSEWHERE = {"index.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/", "api/"}  # by docs/hooks/pages.py


def entries(nav: Any) -> Iterator[str]:
    """The pages and patterns of a navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for below in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(below)


def test_every_page_is_in_the_navigation_once() -> None:
    nav = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = [page.name for page in (ROOT / "docs").glob("*.md")]
    found = [page for entry in nav for page in pages if fnmatch(page, entry)]
    assert sorted(found) == sorted(pages), "docs/ and the `nav` of mkdocs.yml differ"
    empty = [entry for entry in nav if entry not in FROM_ELSEWHERE and not any(fnmatch(page, entry) for page in pages)]
    assert not empty, "in the `nav` of mkdocs.yml, but not in docs/"
    assert set(nav) >= FROM_ELSEWHERE


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and Python-Markdown make them of plain headings."""
    text = re.sub(r"^```.*?^```\n", "", page.read_text(), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_page_or_heading_resolves(page: Path) -> None:
    """The paths that pages name in code are in tests/unit/test_docs.py."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), f"{link}: no such heading"


def test_the_citation_has_the_version_and_licence_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {key: citation[key] for key in ("title", "version", "license")} == {
        "title": project["name"],
        "version": project["version"],
        "license": project["license"],
    }


def test_hooks_and_workflow_name_what_exists() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert len(hooks) == 4
    for hook in hooks:
        assert hook["entry"].startswith(".venv/bin/")
        assert all((ROOT / word).exists() for word in hook["entry"].split() if word.startswith("tests/"))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert "make test" in commands
    assert {command.removeprefix("make ") for command in commands} <= set(targets)


@pytest.mark.soak
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed: `make docs` installs it")
def test_the_site_is_built_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for room in (folder for folder in (ROOT / "rlhf_lit").iterdir() if list(folder.glob("*.py"))):
        text = (tmp_path / "api" / f"{room.name}.html").read_text()
        missing = [file.stem for file in room.glob("[a-z]*.py") if f'id="rlhf_lit.{room.name}.{file.stem}' not in text]
        assert not missing, room.name
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link rel="?stylesheet"?)[^>]*(?:src|href)="?https?://[^">]*', page.read_text()
        )
        assert not fetched, page.name

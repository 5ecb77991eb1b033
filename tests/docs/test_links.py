"""No link of README, CONTRIBUTING or the documentation leads nowhere: files exist, and so do the headings that anchors name.

``make docs`` checks the links of the site; this checks those of the repository, and that each page is in the site's navigation.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.snippets import FENCED, PAGES, ROOT

FILES = (*PAGES, "SECURITY.md", "CHANGELOG.md", "bench/results/README.md")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub and the site make them of its headings."""
    found: set[str] = set()
    for line in FENCED.sub("", page.read_text()).splitlines():
        if match := re.match(r"#+ +(.*)", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1])
            found.add(re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower()))
    return found


def faults(source: str, text: str) -> list[str]:
    """Links of a text that lead nowhere. ``source``: the path of the file that it is of."""
    found = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / source).parent / path if path else ROOT / source
        if not file.exists():
            found.append(f"{target}: no such file")
        elif anchor and anchor not in headings(file):
            found.append(f"{target}: no such heading")
    return found


@pytest.mark.parametrize("source", [file for file in FILES if (ROOT / file).exists()])
def test_links_lead_somewhere(source):
    assert faults(source, (ROOT / source).read_text()) == []


def test_dead_links_are_found():
    text = "[a](docs/gone.md) [b](docs/index.md#gone) [c](docs/index.md#install) [d](https://example.org) `[e](gone)`"
    assert faults("README.md", text) == ["docs/gone.md: no such file", "docs/index.md#gone: no such heading"]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = set(re.findall(r"[\w/-]+\.md", navigation))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= named
    assert len(named) == len(re.findall(r"[\w/-]+\.md", navigation))


def test_paths_that_pages_name_exist():
    """Files of the repository in backticks: those that a page of the documentation names in prose."""
    named = re.compile(r"`((?:tests|rana_fx|passes|kernels|bench|examples|docs)/[\w/.-]+\.(?:py|md|cu|cuh|json|h))`")
    gone = []
    for page in PAGES:
        for path in named.findall((ROOT / page).read_text()):
            # docs/reference/testing.md names tests by their path below tests/
            if not any((folder / path).exists() for folder in (ROOT, ROOT / "tests")) and "NAME" not in path:
                gone.append(f"{page}: {path}")
    assert gone == []

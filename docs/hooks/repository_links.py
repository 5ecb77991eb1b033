"""Links from pages of the site to files of the repository, which the site has not.

In: Markdown whose relative links work in the repository. Out: the same for the site: files of ``PUBLISHED`` are pages of it; of
another file the link becomes its text and path. A link to nothing is a warning, which ends a strict build.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# files outside of docs/ that are pages of the site
PUBLISHED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "rana_fx/data/tiny-llama-prose-5m/MODEL_CARD.md": "embedded-model.md",
    "examples/README.md": "examples.md",
    "README.md": "index.md",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_log = logging.getLogger("mkdocs.hooks.repository_links")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages of ``PUBLISHED`` that docs/ has not."""
    for source, page in PUBLISHED.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:  # noqa: ARG001
    """Rewrite the links of one page."""
    here = {site: source for source, site in PUBLISHED.items()}.get(page.file.src_uri)
    source = f"docs/{page.file.src_uri}" if here is None or page.file.src_uri == "index.md" else here
    parts = _FENCE.split(markdown)
    # every second part is code
    parts[::2] = [_LINK.sub(lambda found: _rewritten(found, source, page.file.src_uri), part) for part in parts[::2]]
    return "".join(parts)


def _rewritten(found: re.Match[str], source: str, page: str) -> str:
    image, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    if not target or re.match(r"[a-z]+:", target):
        return found[0]
    path = os.path.normpath(PurePosixPath(source).parent / target)
    if not (ROOT / path).exists():
        _log.warning("%s: link to %s, which is not in the repository", source, path)
        return found[0]
    if path in PUBLISHED:
        return f"{image}[{text}]({_relative(PUBLISHED[path], page)}{anchor if path != 'README.md' else ''})"
    if path.startswith("docs/"):
        return f"{image}[{text}]({_relative(path.removeprefix('docs/'), page)}{anchor})"
    return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"


def _relative(target: str, page: str) -> str:
    return os.path.relpath(target, PurePosixPath(page).parent)

"""What pages of the documentation show: their code blocks, found by Sybil, in order and with what marks those that do not run.

A block in ``python`` or ``bash`` runs unless the line before it says why not: ``<!--- skip: next "REASON" -->``. Other blocks are
output or formulas.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from sybil import Example, Sybil
from sybil.document import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples/README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_PROGRAMS = ("rana-fx", "python", "make", "pip", ".venv/bin/python", "git")
_SHELL = ("for", "do", "done", "cd", "run=")


@dataclass(frozen=True)
class Command:
    """A line of a ``bash`` block. ``line``: of the page."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {' '.join(self.words[:3])}"


def parsed(page: str, run: object = None) -> Document:
    """The blocks of a page. ``run``: evaluates those in bash, if any is evaluated."""

    def shell(example: Example) -> None:
        for words in words_of(example.parsed):
            run(words)  # type: ignore[operator]

    parsers = [CodeBlockParser("python", PythonEvaluator()), CodeBlockParser("bash", shell), SkipParser()]
    return Sybil(parsers=parsers).parse(ROOT / page)


def words_of(block: str) -> list[tuple[str, ...]]:
    """The commands of a block in bash, without comments; variables, loops and other words of the shell are left out."""
    lines = block.replace("\\\n", " ").splitlines()
    split = [shlex.split(part, comments=True) for line in lines for part in re.split(r" && ", line)]
    found = []
    for words in split:
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words and words[0] in _PROGRAMS:
            found.append(tuple(words))
        else:
            assert not words or words[0] in _SHELL or words[0].startswith("$") or "=" in words[0], words
    return found


def commands(page: str) -> list[Command]:
    """All commands of a page, those that do not run as well."""
    blocks = [example for example in parsed(page).examples() if example.region.lexemes.get("arguments") == "bash"]
    return [Command(page, block.line, words) for block in blocks for words in words_of(block.parsed)]

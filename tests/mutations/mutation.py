"""One deliberate defect: a text in one source file, its replacement, and the tests that have to fail then."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """``old`` occurs once in ``file`` (relative to the repository). ``tests``: arguments of pytest, split as a shell does."""

    name: str
    wrong: str  # the wrong behaviour, in one sentence
    file: str
    old: str
    new: str
    tests: str

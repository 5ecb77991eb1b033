"""Result rows of a bench that resumes: a row that the file has already is not computed again.

In: a JSONL file, whose last line may be incomplete after an interrupted run. Out: the same file with further rows, each with a
key: a digest of its stage and settings. A row is valid for its settings at its commit; rows of other commits, or of a tree with
uncommitted changes, stay in the file and are computed again unless ``any_commit`` is set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.common.record import append
from rana_fx.atomic import write_bytes

Row = dict[str, Any]


class ResultStore:
    """``common``: the first fields of new rows (``record.head``). ``any_commit``: rows of all commits are valid."""

    def __init__(self, path: Path, common: Mapping[str, Any], *, any_commit: bool = False) -> None:
        self.path, self.common, self._any = path, dict(common), any_commit
        self.rows = whole_rows(path)

    def has(self, stage: str, settings: Mapping[str, Any]) -> bool:
        """Whether there is a valid row of these settings."""
        return self.get(stage, settings) is not None

    def get(self, stage: str, settings: Mapping[str, Any]) -> Row | None:
        """The last valid row of these settings."""
        key = key_of(stage, settings)
        return next((row for row in reversed(self.rows) if row["key"] == key and self._valid(row)), None)

    def add(self, stage: str, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> Row:
        """Append a row to the file and return it."""
        row = self.common | {"stage": stage, "key": key_of(stage, settings)} | dict(settings) | dict(facts)
        append(self.path, row)
        self.rows.append(row)
        return row

    def _valid(self, row: Row) -> bool:
        return self._any or all(row.get(name) == self.common.get(name) for name in ("commit", "dirty"))


def key_of(stage: str, settings: Mapping[str, Any]) -> str:
    """Digest of a stage and its settings, 16 hex digits."""
    return hashlib.sha256(json.dumps([stage, settings], sort_keys=True).encode()).hexdigest()[:16]


def whole_rows(path: Path) -> list[Row]:
    """Rows of a file. An incomplete last line is removed from the file, so that the next row begins on a new line."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_bytes(path, whole.encode())
    return [json.loads(line) for line in whole.splitlines()]


def latest(rows: list[Row], *names: str) -> dict[tuple[Any, ...], Row]:
    """The last row of each combination of values."""
    return {tuple(row.get(name) for name in names): row for row in rows}

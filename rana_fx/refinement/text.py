"""The text of a refinement in two parts: pieces to train on, and the rows of the last fourth, to judge the result on.

In: batches, by default those that calibration runs on, passed on to it one by one. Out: both parts. A piece between them is
left out, for packed rows share a document with their neighbours. What calibration has seen of the rows is in favour of the plan
before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, cast

import torch

from rana_fx.calibration.batches import check_batches, count_tokens, leading, padding_masks, part_of, to_device
from rana_fx.errors import TooLittleToRefine
from rana_fx.recipes.intervals import LEAST

_HELD = 4  # one row in so many judges
_MOST_HELD = 16_384  # tokens
_PIECE = 2048  # tokens of a step, at most


class RefinementText:
    """Iterates over the batches, once, and remembers so many tokens to train on, and a third as many.

    Raises TooLittleToRefine, having read as many of the batches as it takes to know; InvalidOption.
    """

    def __init__(self, batches: Iterable[Any], tokens: int, *, name: str = "batches") -> None:
        self._given = check_batches(batches, name=name)
        self._rest = iter(self._given)
        self._most = -(-tokens * _HELD // (_HELD - 1))
        self._read: list[Any] = []  # and not passed on yet
        self._pieces: list[tuple[Any, int]] = []  # with the number of their rows
        self._tokens = 0
        for batch in self._rest:
            self._read.append(batch)
            self._remember(batch)
            if self._rows >= _HELD * LEAST:
                return
        if self._rows:
            raise TooLittleToRefine(got=self._rows, needed=_HELD * LEAST, held=LEAST)

    def __len__(self) -> int:
        """Number of batches. Raises TypeError where it is not known before they come."""
        return len(cast(Sized, self._given))

    def __iter__(self) -> Iterator[Any]:
        while self._read:
            yield self._read.pop(0)
        for batch in self._rest:
            if self._tokens < self._most:
                self._remember(batch)
            yield batch

    def read(self) -> None:
        """Read as many of the batches as are remembered, where nobody else iterates over them."""
        for _ in self:
            if self._tokens >= self._most and not self._read:
                return

    def parts(self) -> tuple[list[Any], list[Any]]:
        """(pieces to train on, rows held out), of what was iterated over."""
        wanted, rows, first = max(LEAST, self._rows // _HELD), 0, len(self._pieces)
        while first > 1 and rows < wanted:
            first -= 1
            rows += self._pieces[first][1]
        held: list[Any] = []
        for piece, count in self._pieces[first:]:
            held += [piece] if count == 1 else [part_of(piece, index, index + 1) for index in range(count)]
        gap = 1 if first > _HELD else 0
        return [piece for piece, _ in self._pieces[: first - gap]], _few(held)

    @property
    def _rows(self) -> int:
        return sum(count for _, count in self._pieces)

    def _remember(self, batch: Any) -> None:
        batch = to_device(batch, torch.device("cpu"))
        tokens, rows = tokens_of(batch), leading(batch)
        if not tokens:
            return
        self._tokens += tokens
        if rows is None or rows == 1:
            self._pieces.append((batch, 1))
            return
        size = max(1, min(_PIECE * rows // tokens, rows // _HELD))
        starts = range(0, rows, size)
        pieces = [(part_of(batch, start, start + size), min(size, rows - start)) for start in starts]
        self._pieces += [(piece, count) for piece, count in pieces if tokens_of(piece)]


def tokens_of(batch: Any) -> int:
    """Of a batch, padding not counted."""
    return count_tokens(batch, padding_masks(batch))


def _few(rows: list[Any]) -> list[Any]:
    """Those with tokens, and no more than it takes to judge."""
    found: list[Any] = []
    tokens = 0
    for row in rows:
        tokens += tokens_of(row)
        if tokens_of(row) and (tokens <= _MOST_HELD or len(found) < LEAST):
            found.append(row)
    return found

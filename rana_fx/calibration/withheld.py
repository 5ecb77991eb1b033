"""Batches that only judge finished plans: calibration, recipes and the choice of their options see none of them.

In: the batches that ``adapt`` is given, and held-out ones, if the caller has any. Out: the batches to calibrate on; afterwards
those to measure on. Without held-out ones every fourth batch is withheld, up to so many tokens. (Batches that ``Tee`` holds out
do not serve: recipes judge their choices on them, so they are no longer unseen.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rana_fx.calibration.batches import check_batches, count_tokens, padding_masks
from rana_fx.calibration.holdout import in_pieces

EVERY = 4
MOST_TOKENS = 16_384  # withheld of the calibration text: a longer one need not be measured on a quarter of it


class Withheld:
    """Iterates over the batches to calibrate on.

    ``given``: batches to measure on; None: some of ``batches`` are withheld. Raises InvalidOption where either is one batch.
    """

    def __init__(self, batches: Iterable[Any], given: Iterable[Any] | None = None) -> None:
        self._batches = check_batches(batches)
        self._withholds = given is None
        self._held: list[Any] = [] if given is None else list(check_batches(given, name="held_out"))
        self._tokens = 0

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self._batches):
            if self._withholds and index % EVERY == EVERY - 1 and self._tokens < MOST_TOKENS:
                self._tokens += count_tokens(batch, padding_masks(batch))
                self._held.append(batch)
                continue
            yield batch

    def batches(self) -> list[Any]:
        """What to measure on, after the iteration; large batches of token ids in pieces."""
        return [piece for batch in self._held for piece in in_pieces(batch)]

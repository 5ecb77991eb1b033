"""How many scores reach a threshold, and how much the others hold, for any threshold at once.

In: scores of inputs, squares in units of loss, (tokens, inputs), perhaps what each really holds. Out: means per token over the
threshold, from counts in bins of the fp32 number's leading bits, 128 to an octave; scores are taken to lie evenly inside a bin.
"""

from __future__ import annotations

import bisect
from array import array

import torch
from torch import Tensor

_SHIFT = 16  # of the 23 mantissa bits, 7 are kept
_CHUNK = 512  # tokens at a time


class Tails:
    """Counts and sums above and below every threshold."""

    def __init__(self, squares_TI: Tensor, norms_I: Tensor, held_TI: Tensor | None = None) -> None:
        """Of the scores ``squares_TI * norms_I``. ``held_TI``: what is summed; default: the scores."""
        bins = (0x7F800000 >> _SHIFT) + 1
        counts = torch.zeros(bins, dtype=torch.float64, device=squares_TI.device)
        sums = torch.zeros_like(counts)
        for start, chunk in zip(range(0, len(squares_TI), _CHUNK), squares_TI.split(_CHUNK), strict=False):
            flat = (chunk * norms_I).reshape(-1)
            index = flat.view(torch.int32) >> _SHIFT
            counts += torch.bincount(index, minlength=bins)
            held = flat if held_TI is None else held_TI[start : start + _CHUNK].reshape(-1)
            sums += torch.bincount(index, weights=held.double(), minlength=bins)
        rows = max(1, len(squares_TI))
        used = counts.nonzero().flatten()
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        self._first, self._last = first, last
        self._below, self._lost = (array("d", [0.0, *(part[first:last].cumsum(0) / rows).tolist()]) for part in (counts, sums))
        self.total = self._below[-1]

    def at(self, bar: float) -> tuple[float, float]:
        """(scores >= bar, sum over those below), per token."""
        at, share = self._place(bar)
        below = self._below[at] + share * (self._below[at + 1] - self._below[at])
        return self.total - below, self._lost[at] + share * (self._lost[at + 1] - self._lost[at])

    def bar(self, dropped: float) -> float:
        """The edge of a bin at which this share of the scores is below."""
        at = bisect.bisect_left(self._below, dropped * self.total)
        return _number(self._first + min(at, self._last - self._first))

    def _place(self, bar: float) -> tuple[int, float]:
        """Index of the bin, and the share of it that lies below ``bar``."""
        bits = int(torch.tensor(min(max(bar, 0.0), 3e38), dtype=torch.float32).view(torch.int32)) >> _SHIFT
        if bits < self._first:
            return 0, 0.0
        if bits >= self._last:
            return self._last - self._first - 1, 1.0
        low, high = _number(bits), _number(bits + 1)
        # what is exactly zero lies in the lowest bin, and below any threshold
        share = 1.0 if bits == 0 and bar > 0 else (bar - low) / (high - low)
        return bits - self._first, min(1.0, max(0.0, share))


def _number(bits: int) -> float:
    return float(torch.tensor(min(bits << _SHIFT, 0x7F7FFFFF), dtype=torch.int32).view(torch.float32))

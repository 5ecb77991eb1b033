"""Log-binned histogram of scores: its survival function and the partial sums below any threshold, in one pass.

In: scores of inputs, squares in units of loss, (tokens, inputs). Out: means per token over any threshold, from counts in bins of
the fp32 number's leading bits, 128 to an octave; scores are taken to be uniform inside a bin.
"""

from __future__ import annotations

import bisect
from array import array

import torch
from torch import Tensor

_SHIFT = 16  # of the 23 mantissa bits, 7 are kept
_CHUNK = 512  # tokens at a time


class Survival:
    """Counts and sums above and below every threshold, for the scores ``squares_TI * norms_I``."""

    def __init__(self, squares_TI: Tensor, norms_I: Tensor) -> None:
        bins = (0x7F800000 >> _SHIFT) + 1
        counts = torch.zeros(bins, dtype=torch.float64, device=squares_TI.device)
        sums = torch.zeros_like(counts)
        for chunk in squares_TI.split(_CHUNK):
            scores = (chunk * norms_I).reshape(-1)
            index = scores.view(torch.int32) >> _SHIFT
            counts += torch.bincount(index, minlength=bins)
            sums += torch.bincount(index, weights=scores.double(), minlength=bins)
        rows = max(1, len(squares_TI))
        used = counts.nonzero().flatten()
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        self._first, self._last = first, last
        self._below, self._lost = (array("d", [0.0, *(part[first:last].cumsum(0) / rows).tolist()]) for part in (counts, sums))
        self.total = self._below[-1]

    def at(self, threshold: float) -> tuple[float, float]:
        """(number of scores >= threshold, sum of those below it), per token."""
        index, share = self._bin_of(threshold)
        below = self._below[index] + share * (self._below[index + 1] - self._below[index])
        return self.total - below, self._lost[index] + share * (self._lost[index + 1] - self._lost[index])

    def threshold(self, share: float) -> float:
        """The edge of a bin below which ``share`` of the scores lie."""
        index = bisect.bisect_left(self._below, share * self.total)
        return _edge(self._first + min(index, self._last - self._first))

    def _bin_of(self, threshold: float) -> tuple[int, float]:
        """Index of the bin, and the share of it that lies below ``threshold``."""
        bits = int(torch.tensor(min(max(threshold, 0.0), 3e38), dtype=torch.float32).view(torch.int32)) >> _SHIFT
        if bits < self._first:
            return 0, 0.0
        if bits >= self._last:
            return self._last - self._first - 1, 1.0
        low, high = _edge(bits), _edge(bits + 1)
        # what is exactly zero lies in the lowest bin, and below any threshold
        share = 1.0 if bits == 0 and threshold > 0 else (threshold - low) / (high - low)
        return bits - self._first, min(1.0, max(0.0, share))


def _edge(bits: int) -> float:
    """The number at the lower end of a bin."""
    return float(torch.tensor(min(bits << _SHIFT, 0x7F7FFFFF), dtype=torch.int32).view(torch.float32))

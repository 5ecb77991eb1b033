"""Log-binned histograms of non-negative scores, in place of sorting them: survival functions and partial sums.

In: scores in chunks (z^2 per rank, squared importance per input). A bin is the leading bits of the fp32 number. Out, by what is
looked up:

    Histogram   grows over chunks of text, for blocks of columns apart; for any number of kept scores, the threshold that keeps
                exactly so many and the energy they hold. 1024 bins to an octave over 56 octaves: a threshold is within 0.1 % of
                the exact one (less by interpolation); the energy of a bin is its count times its middle.
    Survival    made once from all scores; for any threshold, how many scores reach it and the sum over those that do
                not, exact per bin. 128 bins to an octave, over all of fp32.

They are two classes since neither holds what the other answers: a second sum per bin would double the memory of the first, of
which there is one per block of ranks, and 1024 bins to an octave would make the second, of which there are several per
candidate, eight times as long.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_SHIFT = 13  # of the 23 mantissa bits, 10 are kept
_PER_OCTAVE = 1 << (23 - _SHIFT)
_OCTAVES = 56
_BINS = _PER_OCTAVE * _OCTAVES
_COARSE_SHIFT = 16  # of the 23 mantissa bits, 7 are kept
_CHUNK = 512  # tokens at a time


class Histogram:
    """Counts of scores, per block of columns.

    Args:
        blocks_C: for each column (rank), the block it belongs to; on the device of the scores.
        top: an upper bound of the scores; what lies 56 octaves below shares the lowest bin.
    """

    def __init__(self, blocks_C: Tensor, top: float) -> None:
        count = int(blocks_C.max()) + 1
        self._base = _bin(max(top, 1e-30), _SHIFT) - _BINS + 2
        self._first_C = (blocks_C * _BINS).to(torch.int32)  # where the block of each column begins
        self.counts = torch.zeros(count, _BINS, dtype=torch.int64, device=blocks_C.device)

    def add(self, scores_TC: Tensor) -> None:
        """Take scores of shape (tokens, columns), fp32, non-negative."""
        bins = (scores_TC.contiguous().view(torch.int32) >> _SHIFT).sub_(self._base).clamp_(0, _BINS - 1).add_(self._first_C)
        # adds in place: a bincount of each chunk would write all bins of all blocks anew
        self.counts.view(-1).index_add_(0, bins.view(-1), self.counts.new_ones(1).expand(bins.numel()))

    def merged(self) -> Profile:
        """All blocks together."""
        return Profile(self.counts.sum(0).cpu(), self._middles(), self._base)

    def prefixes(self, wanted: Iterable[int]) -> Iterator[tuple[int, Profile]]:
        """(b, blocks 0..b together) for each b of ``wanted``, ascending. One at a time: a profile is larger than a block."""
        counts, middles, done = torch.zeros(_BINS, dtype=torch.int64, device="cpu"), self._middles(), 0
        for block in wanted:
            counts += self.counts[done : block + 1].sum(0).cpu()
            done = block + 1
            yield block, Profile(counts, middles, self._base)

    def _middles(self) -> Tensor:
        bits = (torch.arange(_BINS + 1, device="cpu") + self._base).clamp_min(0) << _SHIFT
        edges = bits.to(torch.int32).view(torch.float32).double()
        middles = (edges[1:] + edges[:-1]) / 2
        middles[0] = 0.0  # everything far below the top: its energy is nothing
        return middles


class Profile:
    """Scores from the largest down."""

    def __init__(self, counts_B: Tensor, middles_B: Tensor, base: int) -> None:
        self._counts = counts_B.flip(0)
        self._above = self._counts.cumsum(0)
        energy = (counts_B * middles_B).flip(0)
        self._energy = energy
        self._energy_above = energy.cumsum(0)
        self._base = base
        self.total = int(self._above[-1])
        self.energy = float(self._energy_above[-1])

    def keep(self, count: int) -> tuple[float, float]:
        """(threshold, energy) of the ``count`` largest scores: scores >= threshold are kept."""
        if count <= 0:
            return float("inf"), 0.0
        if count >= self.total:
            return 0.0, self.energy
        at = int(torch.searchsorted(self._above, torch.tensor(count, device="cpu")))
        inside = int(self._counts[at])
        before = int(self._above[at]) - inside
        fraction = (count - before) / inside
        index = _BINS - 1 - at
        low, high = _edge(index + self._base, _SHIFT), _edge(index + 1 + self._base, _SHIFT)
        if index == 0:
            return (0.0 if fraction > 0.5 else high), float(self._energy_above[at]) - (1 - fraction) * float(self._energy[at])
        mean = float(self._energy[at]) / inside
        # the bin's scores spread evenly around their mean: the upper part of them holds a little more than its share
        taken = fraction * inside * (mean + 0.5 * (1 - fraction) * (high - low))
        return high - fraction * (high - low), float(self._energy_above[at]) - float(self._energy[at]) + min(
            taken, float(self._energy[at])
        )


class Survival:
    """Counts of scores at or above any threshold, and sums over those below it, per token.

    Args:
        squares_TI: with ``norms_I``, the scores ``squares_TI * norms_I``, fp32; they are taken to be uniform inside a bin.
    """

    def __init__(self, squares_TI: Tensor, norms_I: Tensor) -> None:
        bins = (0x7F800000 >> _COARSE_SHIFT) + 1
        counts = torch.zeros(bins, dtype=torch.float64, device=squares_TI.device)
        sums = torch.zeros_like(counts)
        for chunk in squares_TI.split(_CHUNK):
            scores = (chunk * norms_I).reshape(-1)
            index = scores.view(torch.int32) >> _COARSE_SHIFT
            counts += torch.bincount(index, minlength=bins)
            sums += torch.bincount(index, weights=scores.double(), minlength=bins)
        rows = max(1, len(squares_TI))
        used = counts.nonzero().flatten()
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        self._first, self._last = first, last
        self._below, self._lost = (array("d", [0.0, *(part[first:last].cumsum(0) / rows).tolist()]) for part in (counts, sums))
        self.total = self._below[-1]

    def at(self, threshold: float) -> tuple[float, float]:
        """(scores >= threshold, sum over those below), per token."""
        at, share = self._place(threshold)
        below = self._below[at] + share * (self._below[at + 1] - self._below[at])
        return self.total - below, self._lost[at] + share * (self._lost[at + 1] - self._lost[at])

    def threshold(self, dropped: float) -> float:
        """The edge of a bin below which this share of the scores lies."""
        at = bisect.bisect_left(self._below, dropped * self.total)
        return _edge(self._first + min(at, self._last - self._first), _COARSE_SHIFT)

    def _place(self, threshold: float) -> tuple[int, float]:
        """Index of the bin, and the share of it that lies below ``threshold``."""
        bits = _bin(min(max(threshold, 0.0), 3e38), _COARSE_SHIFT)
        if bits < self._first:
            return 0, 0.0
        if bits >= self._last:
            return self._last - self._first - 1, 1.0
        low, high = _edge(bits, _COARSE_SHIFT), _edge(bits + 1, _COARSE_SHIFT)
        # what is exactly zero lies in the lowest bin, and below any threshold
        share = 1.0 if bits == 0 and threshold > 0 else (threshold - low) / (high - low)
        return bits - self._first, min(1.0, max(0.0, share))


def _bin(score: float, shift: int) -> int:
    """The bin of a score: its fp32 bits without the last ``shift``."""
    return int(torch.tensor(score, dtype=torch.float32, device="cpu").view(torch.int32)) >> shift


def _edge(index: int, shift: int) -> float:
    """The lowest number of a bin; of bins beyond fp32, the nearest finite one."""
    bits = min(max(index, 0) << shift, 0x7F7FFFFF)
    return float(torch.tensor(bits, dtype=torch.int32, device="cpu").view(torch.float32))

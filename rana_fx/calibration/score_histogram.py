"""Thresholds and kept energy from logarithmic histograms, instead of sorting every score.

In: non-negative scores in chunks (z^2 per rank, or squared importance per input). Out: for any number of kept scores,
the threshold that keeps exactly so many and the energy they hold. Bins follow the bits of the fp32 number, 1024 to an
octave, so a threshold is within 0.1 % of the exact one (less by interpolation) and the energy of whole bins is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_SHIFT = 13  # of the 23 mantissa bits, 10 are kept
_PER_OCTAVE = 1 << (23 - _SHIFT)
_OCTAVES = 56
_BINS = _PER_OCTAVE * _OCTAVES


class Histogram:
    """Counts of scores, per block of columns.

    Args:
        blocks_C: for each column (rank), the block it belongs to; on the device of the scores.
        top: an upper bound of the scores; what lies 56 octaves below shares the lowest bin.
    """

    def __init__(self, blocks_C: Tensor, top: float) -> None:
        count = int(blocks_C.max()) + 1
        self._base = (int(torch.tensor(max(top, 1e-30), dtype=torch.float32).view(torch.int32)) >> _SHIFT) - _BINS + 2
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
        counts, middles, done = torch.zeros(_BINS, dtype=torch.int64), self._middles(), 0
        for block in wanted:
            counts += self.counts[done : block + 1].sum(0).cpu()
            done = block + 1
            yield block, Profile(counts, middles, self._base)

    def _middles(self) -> Tensor:
        bits = (torch.arange(_BINS + 1) + self._base).clamp_min(0) << _SHIFT
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
        at = int(torch.searchsorted(self._above, torch.tensor(count)))
        inside = int(self._counts[at])
        before = int(self._above[at]) - inside
        fraction = (count - before) / inside
        index = _BINS - 1 - at
        low, high = _edge(index + self._base), _edge(index + 1 + self._base)
        if index == 0:
            return (0.0 if fraction > 0.5 else high), float(self._energy_above[at]) - (1 - fraction) * float(self._energy[at])
        mean = float(self._energy[at]) / inside
        # the bin's scores spread evenly around their mean: the upper part of them holds a little more than its share
        taken = fraction * inside * (mean + 0.5 * (1 - fraction) * (high - low))
        return high - fraction * (high - low), float(self._energy_above[at]) - float(self._energy[at]) + min(
            taken, float(self._energy[at])
        )


def _edge(bits: int) -> float:
    return float(torch.tensor(max(bits, 0) << _SHIFT, dtype=torch.int32).view(torch.float32))

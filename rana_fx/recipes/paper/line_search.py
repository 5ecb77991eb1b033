"""The line search of RaNA's Algorithm 1: the rank and the threshold with the most energy at a given cost.

In: B of a basis, a sample of the layer's inputs and fractions of its dense cost. Out: for each fraction the number of rows of B
and the threshold on (B x)_k^2 that keep most of the output's energy, or None where no rank is feasible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rana_fx.calibration.score_histogram import Histogram
from rana_fx.recipes.basis import RankThreshold

STEP = 10  # the paper's line search tries every tenth rank
_CHUNK = 2048  # tokens at a time


def candidate_ranks(width: int, *, step: int = STEP) -> list[int]:
    """d, d - 10, d - 20, ... down to the last positive one."""
    return list(range(width, 0, -step))


@dataclass(eq=False)
class Energies:
    """z^2 of every component over the sample, as a histogram whose first blocks are the sets of components the search tries."""

    ranks: list[int]  # ascending; blocks 0..j are the first ranks[j] components
    histogram: Histogram
    rows: int


def energies(b_DI: Tensor, rows_TI: Tensor, *, step: int = STEP) -> Energies:
    """Measure z = B x over the sample."""
    width = len(b_DI)
    ranks = sorted(candidate_ranks(width, step=step))
    ends, places = torch.tensor(ranks, device="cpu"), torch.arange(width, device="cpu")
    blocks_D = torch.searchsorted(ends, places, right=True).to(rows_TI.device)
    # Cauchy-Schwarz: an upper bound of z^2 without a matmul
    longest = max(float(torch.linalg.vector_norm(chunk.float(), dim=1).max()) for chunk in rows_TI.split(_CHUNK))
    histogram = Histogram(blocks_D, (longest * float(torch.linalg.vector_norm(b_DI, dim=1).max())) ** 2)
    for chunk in rows_TI.split(_CHUNK):
        histogram.add((chunk.float() @ b_DI.t()).square_())
    return Energies(ranks, histogram, len(rows_TI))


def feasible_kept(rank: int, out_features: int, in_features: int, fraction: float, rows: int) -> float | None:
    """Components left to multiply beside a router of ``rank`` rows at a cost of ``fraction`` of the dense layer.

    The router costs in * r and leaves k(r) = fraction * in - in * r / out; a rank is feasible when 0 < k(r) < r, and
    when at least one score of ``rows`` tokens is kept. None: it is not.
    """
    kept = fraction * in_features - in_features * rank / out_features
    return kept if 0 < kept < rank and int(rows * kept) > 0 else None


def line_search(
    measured: Energies, out_features: int, in_features: int, fractions: Sequence[float]
) -> list[RankThreshold | None]:
    """For each fraction of the dense layer's cost, the rank with the best coverage (Algorithm 1), or None."""
    total = measured.histogram.merged().energy
    best: list[RankThreshold | None] = [None] * len(fractions)
    points = [
        [feasible_kept(rank, out_features, in_features, fraction, measured.rows) for fraction in fractions]
        for rank in measured.ranks
    ]
    wanted = [index for index, kept in enumerate(points) if any(kept)]
    for index, profile in measured.histogram.prefixes(wanted):
        for which, kept in enumerate(points[index]):
            if kept is None:
                continue
            threshold, energy = profile.keep(int(measured.rows * kept))
            coverage = energy / total if total > 0 else 1.0
            held = best[which]
            if held is None or coverage >= held.coverage:
                best[which] = RankThreshold(measured.ranks[index], kept, threshold, coverage)
    return best

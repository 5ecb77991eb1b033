"""The basis in which a linear layer's output has the most energy in the fewest components, and its line search.

In: a weight W (out, in) and a sample of its inputs. Out: A = U (out, d) with orthonormal columns, B = U^T W (d, in),
d = min(out, in), so that A (B x) = W x, and components ordered by energy (RaNA Algorithm 1: U are the left singular
vectors of Y^T = W X^T). U is found inside the range of W, so full rank reproduces W on every input, also on inputs
the sample does not span. All of it in fp64; the factors are returned in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rana_fx.calibration.score_histogram import Histogram, Profile

STEP = 10  # the paper's line search tries every tenth rank
_CHUNK = 2048  # tokens at a time


@dataclass(frozen=True, eq=False)
class Basis:
    """a_OD: orthonormal columns. b_DI: the router's rows. Error: |W - A B| <= 1e-6 |W| in fp32."""

    a_OD: Tensor
    b_DI: Tensor


@dataclass(frozen=True)
class Choice:
    """One point of the line search: ``rank`` rows of B, ``kept`` of them per token on average, threshold on z^2."""

    rank: int
    kept: float
    threshold: float
    coverage: float


def second_moment(rows_TI: Tensor) -> Tensor:
    """Sum of x x^T over the sample, (in, in), fp64."""
    width = rows_TI.shape[1]
    total = torch.zeros(width, width, dtype=torch.float64, device=rows_TI.device)
    # it is symmetric: of each panel of rows only what lies right of the diagonal is multiplied
    panel = max(128, -(-width // 8))
    for chunk in rows_TI.split(4 * _CHUNK):
        wide = chunk.double()
        for start in range(0, width, panel):
            total[start : start + panel, start:].addmm_(wide[:, start : start + panel].t(), wide[:, start:])
    return total.triu_().add_(total.triu(1).t())


def output_basis(weight_OI: Tensor, moment_II: Tensor) -> Basis:
    """Principal directions of the layer's output over the sample (uncentred)."""
    weight = weight_OI.double()
    if weight.shape[0] > weight.shape[1]:
        q_OI, r_II = torch.linalg.qr(weight)
    else:
        q_OI, r_II = None, weight
    vectors = torch.linalg.eigh(r_II @ moment_II.to(r_II.device) @ r_II.t()).eigenvectors.flip(1)
    a_OD = vectors if q_OI is None else q_OI @ vectors
    return Basis(a_OD.float().contiguous(), (vectors.t() @ r_II).float().contiguous())


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
    blocks_D = torch.searchsorted(torch.tensor(ranks), torch.arange(width), right=True).to(rows_TI.device)
    # Cauchy-Schwarz: an upper bound of z^2 that costs no product
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


def line_search(measured: Energies, out_features: int, in_features: int, fractions: Sequence[float]) -> list[Choice | None]:
    """For each fraction of the dense layer's cost, the rank with the best coverage (Algorithm 1), or None."""
    total = measured.histogram.merged().energy
    best: list[Choice | None] = [None] * len(fractions)
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
                best[which] = Choice(measured.ranks[index], kept, threshold, coverage)
    return best


def importance_profile(rows_TI: Tensor, norms_I: Tensor) -> Profile:
    """Squared importances (x_j |W_:,j|)^2 of every input over the sample (neuron adapter)."""
    norms = norms_I.float()
    top = max((float((chunk.float() * norms).abs().max()) ** 2 for chunk in rows_TI.split(_CHUNK)), default=0.0)
    histogram = Histogram(torch.zeros(rows_TI.shape[1], dtype=torch.long, device=rows_TI.device), top)
    for chunk in rows_TI.split(_CHUNK):
        histogram.add((chunk.float() * norms).square_())
    return histogram.merged()


def neuron_threshold(profile: Profile, fraction: float) -> float:
    """Threshold on squared importance that keeps ``fraction`` of all inputs."""
    return profile.keep(round(profile.total * fraction))[0]

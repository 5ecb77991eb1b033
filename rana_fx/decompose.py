"""The basis in which a linear layer's output has the most energy in the fewest components, and its line search.

In: a weight W (out, in) and a sample of its inputs. Out: A = U (out, d) with orthonormal columns, B = U^T W (d, in),
d = min(out, in), so that A (B x) = W x, and components ordered by energy (RaNA Algorithm 1: U are the left singular
vectors of Y^T = W X^T). U is found inside the range of W, so full rank reproduces W on every input, also on inputs
the sample does not span. All of it in fp64; the factors are returned in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rana_fx.histogram import Histogram, Profile

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
    total = torch.zeros(rows_TI.shape[1], rows_TI.shape[1], dtype=torch.float64, device=rows_TI.device)
    for chunk in rows_TI.split(4 * _CHUNK):
        wide = chunk.double()
        total.addmm_(wide.t(), wide)
    return total


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
    """z^2 of every component over the sample, as histograms of the nested sets of components the search tries."""

    ranks: list[int]
    profiles: list[Profile]  # profiles[j]: the first ranks[j] components
    rows: int

    @property
    def total(self) -> float:
        return self.profiles[0].energy


def energies(b_DI: Tensor, rows_TI: Tensor, *, step: int = STEP) -> Energies:
    """Measure z = B x over the sample."""
    width = len(b_DI)
    ranks = candidate_ranks(width, step=step)
    ascending = torch.tensor(sorted(ranks))
    blocks_D = torch.searchsorted(ascending, torch.arange(width), right=True)
    # Cauchy-Schwarz: an upper bound of z^2 that costs no product
    longest = max(float(torch.linalg.vector_norm(chunk.float(), dim=1).max()) for chunk in rows_TI.split(_CHUNK))
    histogram = Histogram(blocks_D, (longest * float(torch.linalg.vector_norm(b_DI, dim=1).max())) ** 2)
    for chunk in rows_TI.split(_CHUNK):
        histogram.add((chunk.float() @ b_DI.t()).square_())
    return Energies(ranks, histogram.prefixes()[::-1], len(rows_TI))


def line_search(measured: Energies, out_features: int, in_features: int, fraction: float) -> Choice | None:
    """The rank with the best coverage at a cost of ``fraction`` of the dense layer (Algorithm 1), or None.

    A router of r rows costs in * r and leaves k(r) = fraction * in - in * r / out components to multiply; a rank is
    feasible when 0 < k(r) < r.
    """
    best: Choice | None = None
    for rank, profile in zip(measured.ranks, measured.profiles, strict=True):
        kept = fraction * in_features - in_features * rank / out_features
        count = int(measured.rows * kept)
        if not 0 < kept < rank or count <= 0:
            continue
        threshold, energy = profile.keep(count)
        coverage = energy / measured.total if measured.total > 0 else 1.0
        if best is None or coverage > best.coverage:
            best = Choice(rank, kept, threshold, coverage)
    return best


def importance_profile(rows_TI: Tensor, norms_I: Tensor) -> Profile:
    """Squared importances (x_j |W_:,j|)^2 of every input over the sample (neuron adapter)."""
    norms = norms_I.float()
    top = max((float((chunk.float() * norms).abs().max()) ** 2 for chunk in rows_TI.split(_CHUNK)), default=0.0)
    histogram = Histogram(torch.zeros(rows_TI.shape[1], dtype=torch.long), top)
    for chunk in rows_TI.split(_CHUNK):
        histogram.add((chunk.float() * norms).square_())
    return histogram.merged()


def neuron_threshold(profile: Profile, fraction: float) -> float:
    """Threshold on squared importance that keeps ``fraction`` of all inputs."""
    return profile.keep(round(profile.total * fraction))[0]

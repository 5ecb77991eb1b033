"""A basis of a linear layer's output, in which few components carry most of its energy.

In: a weight W (out, in) and a sample of its inputs. Out: ``Basis``: W = A B, components ordered by energy, and what the line
search or a fixed rank chooses of them. All in fp64; factors are returned in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 8192  # tokens at a time


@dataclass(frozen=True, eq=False)
class Basis:
    """a_OD (out, d), b_DI (d, in), fp32: W = A B up to directions that carry nothing, components ordered by energy."""

    a_OD: Tensor
    b_DI: Tensor


@dataclass(frozen=True)
class RankThreshold:
    """A rank adapter's parameters: ``rank`` rows of B, ``kept`` of them per token on average, ``threshold`` on z^2.

    ``coverage``: kept energy over all of it, in [0, 1].
    """

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
    for chunk in rows_TI.split(_CHUNK):
        x = chunk.double()
        for start in range(0, width, panel):
            total[start : start + panel, start:].addmm_(x[:, start : start + panel].t(), x[:, start:])
    return total.triu_().add_(total.triu(1).t())


def output_basis(weight_OI: Tensor, moment_II: Tensor) -> Basis:
    """Principal directions of the layer's output over the sample (uncentred): A = U with orthonormal columns, B = U^T W.

    U are the left singular vectors of Y^T = W X^T (RaNA, arXiv 2503.18216, Algorithm 1), found inside the range of W: full rank
    reproduces W on every input, also on inputs that the sample does not span. Error: |W - A B| <= 1e-6 |W| in fp32.
    """
    weight = weight_OI.double()
    if weight.shape[0] > weight.shape[1]:
        q_OI, r_II = torch.linalg.qr(weight)
    else:
        q_OI, r_II = None, weight
    vectors = torch.linalg.eigh(r_II @ moment_II.to(r_II.device) @ r_II.t()).eigenvectors.flip(1)
    a_OD = vectors if q_OI is None else q_OI @ vectors
    return Basis(a_OD.float().contiguous(), (vectors.t() @ r_II).float().contiguous())

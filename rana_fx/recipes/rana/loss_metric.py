"""One unit (linears stacked over one input) in coordinates where the size of an error is what it does to the loss.

In: the stacked weight W, the second moment of its inputs and, where known, of the gradients at its output (sensitivity.py).
Out: W = lift read, such that half of |read (x - x^)|^2 is the expected increase of the loss when x^ is multiplied in place of
x; and the basis whose components, ordered by energy there, a rank adapter keeps: router B = U^T read, factor A = lift U. They
are orthonormal in these coordinates, so z_k^2 is what dropping component k costs, and one threshold serves all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SHRINK = 0.1  # towards equal weights: moments over thousands of tokens are noisy in hundreds of dimensions
_ISOTROPIC = 0.1  # of the inputs' mean energy, in every direction: principal directions of some documents are not those of others
_RELATIVE = 1e-9  # directions below this share of the largest carry nothing


@dataclass(frozen=True, eq=False)
class Geometry:
    """lift_OD, read_DI: W = lift read. norms_I: |read_:,j|^2, what dropping a unit of input j costs.

    ``even``: what a unit of error of an output costs, outputs alike: for errors that W could not have made, such as rounding.
    """

    lift_OD: Tensor
    read_DI: Tensor
    even: float

    @property
    def norms_I(self) -> Tensor:
        return self.read_DI.square().sum(0)


def site_norms(weight_OI: Tensor, given_I: Tensor) -> Tensor:
    """As ``Geometry.norms_I`` for one linear of the unit, from the mean square of W^T g there."""
    columns_I = weight_OI.float().square().sum(0)
    even = given_I.sum() / columns_I.sum().clamp_min(1e-30)
    return (1 - _SHRINK) * given_I + _SHRINK * even * columns_I


@dataclass(frozen=True, eq=False)
class LossBasis:
    """a_OD, b_DI: W = A B up to directions that carry nothing, components by energy."""

    a_OD: Tensor
    b_DI: Tensor


def geometry(weight_OI: Tensor, moment: Tensor | None, *, even: float | None = None) -> Geometry:
    """The unit's geometry; all in fp64, the result in fp32.

    Args:
        moment: of gradients at the output, (out, out); with more outputs than inputs of W^T g, (in, in). None: all equal.
        even: without a moment, what a unit of error of an output costs; default: as much as the outputs are large.
    """
    weight = weight_OI.double()
    out, width = weight.shape
    wide = out > width
    gram = weight.t() @ weight if wide else torch.eye(out, dtype=torch.float64, device=weight.device)
    size = float(gram.diagonal().sum())
    if moment is None:
        even = even or 1 / max(1e-30, float(weight.square().sum()))
        metric = gram * even
    else:
        given = moment.double()
        even = float(given.diagonal().sum()) / max(1e-30, size)
        metric = (1 - _SHRINK) * given + _SHRINK * gram * even
    # any root of the metric will do: components are told apart by the basis
    factor, failed = torch.linalg.cholesky_ex(metric, upper=True)
    pivots = factor.diagonal().square()
    if int(failed) == 0 and float(pivots.min()) > _RELATIVE * float(pivots.max()):
        if wide:
            lift = torch.linalg.solve_triangular(factor, weight, upper=True, left=False)
            return Geometry(lift.float(), factor.float(), even)
        return Geometry(torch.linalg.solve_triangular(factor, gram, upper=True).float(), (factor @ weight).float(), even)
    values, vectors = torch.linalg.eigh(metric)
    sound = values > _RELATIVE * values[-1].clamp_min(1e-30)
    root, vectors = values[sound].sqrt(), vectors[:, sound]
    if wide:
        return Geometry((weight @ vectors / root).float(), (root[:, None] * vectors.t()).float(), even)
    return Geometry((vectors / root).float(), (root[:, None] * (vectors.t() @ weight)).float(), even)


def loss_basis(found: Geometry, moment_II: Tensor) -> LossBasis:
    """``moment_II``: sum or mean of x x^T over the sample."""
    read, moment = found.read_DI.double(), moment_II.to(found.read_DI.device, torch.float64)
    even = _ISOTROPIC * moment.diagonal().mean()
    target_DD = read @ moment @ read.t() + even * (read @ read.t())
    # on an accelerator fp32, twice as fast: the even part keeps it well conditioned
    precision = torch.float64 if read.device.type == "cpu" else torch.float32
    vectors = torch.linalg.eigh(target_DD.to(precision)).eigenvectors.flip(1).double()
    return LossBasis((found.lift_OD.double() @ vectors).float(), (vectors.t() @ read).float())

"""The loss metric of one unit (linears stacked over one input): coordinates in which half of an error's square is its loss.

In: the stacked weight W, the second moment of its inputs and, where known, of the gradients at its output (sensitivity.py).
Out: a factorisation W = L R such that half of |R (x - x^)|^2 is the expected increase of the loss when x^ is multiplied in place
of x; and the basis whose components, ordered by energy there, a rank adapter keeps: router B = U^T R, factor A = L U. They
are orthonormal in these coordinates, so z_k^2 is twice the loss of dropping component k, and one threshold serves all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rana_fx.recipes.basis import Basis

_SHRINK = 0.1  # towards equal weights: moments over thousands of tokens are noisy in hundreds of dimensions
_ISOTROPIC = 0.1  # of the inputs' mean energy, in every direction: principal directions of some documents are not those of others
_RELATIVE = 1e-9  # directions below this share of the largest carry nothing


@dataclass(frozen=True, eq=False)
class LossMetric:
    """left_OD (out, d), right_DI (d, in), fp32: W = L R.

    ``isotropic_scale``: twice the loss of a unit error of an output, were all outputs alike: for errors outside the range of W,
    such as those of rounding. ``outputs_O``: the same for each output, where it is known.
    """

    left_OD: Tensor
    right_DI: Tensor
    isotropic_scale: float
    outputs_O: Tensor | None = None

    def loss_of_outputs(self, squares_O: Tensor) -> Tensor:
        """Loss of independent errors of the outputs, given their mean squares, (..., out)."""
        if self.outputs_O is None:
            return self.isotropic_scale * squares_O.sum(-1) / 2
        return squares_O @ self.outputs_O / 2

    @property
    def norms_I(self) -> Tensor:
        """|R_:,j|^2: twice the loss of dropping input j, per unit of its square."""
        return self.right_DI.square().sum(0)


def site_norms(weight_OI: Tensor, given_I: Tensor) -> Tensor:
    """As ``LossMetric.norms_I`` for one linear of the unit, from the mean square of W^T g there."""
    columns_I = weight_OI.float().square().sum(0)
    isotropic_scale = given_I.sum() / columns_I.sum().clamp_min(1e-30)
    return (1 - _SHRINK) * given_I + _SHRINK * isotropic_scale * columns_I


def shrunk(outputs_O: Tensor) -> Tensor:
    """Twice the loss of a unit error of each output, from the mean square of the gradient there."""
    return (1 - _SHRINK) * outputs_O + _SHRINK * outputs_O.mean()


def loss_metric(weight_OI: Tensor, moment: Tensor | None, *, isotropic_scale: float | None = None) -> LossMetric:
    """The unit's metric; computed in fp64, returned in fp32.

    Args:
        moment: of gradients at the output, (out, out); with more outputs than inputs of W^T g, (in, in). None: isotropic.
        isotropic_scale: without a moment, the scale; default: one over the squared size of the weight.
    """
    weight = weight_OI.double()
    out, width = weight.shape
    tall = out > width
    gram = weight.t() @ weight if tall else torch.eye(out, dtype=torch.float64, device=weight.device)
    size = float(gram.diagonal().sum())
    if moment is None:
        scale = isotropic_scale or 1 / max(1e-30, float(weight.square().sum()))
        metric = gram * scale
    else:
        given = moment.double()
        scale = float(given.diagonal().sum()) / max(1e-30, size)
        metric = (1 - _SHRINK) * given + _SHRINK * gram * scale
    # any root of the metric will do: the basis decides which components there are
    factor, failed = torch.linalg.cholesky_ex(metric, upper=True)
    pivots = factor.diagonal().square()
    if int(failed) == 0 and float(pivots.min()) > _RELATIVE * float(pivots.max()):
        if tall:
            left = torch.linalg.solve_triangular(factor, weight, upper=True, left=False)
            return LossMetric(left.float(), factor.float(), scale)
        return LossMetric(torch.linalg.solve_triangular(factor, gram, upper=True).float(), (factor @ weight).float(), scale)
    values, vectors = torch.linalg.eigh(metric)
    sound = values > _RELATIVE * values[-1].clamp_min(1e-30)
    root, vectors = values[sound].sqrt(), vectors[:, sound]
    if tall:
        return LossMetric((weight @ vectors / root).float(), (root[:, None] * vectors.t()).float(), scale)
    return LossMetric((vectors / root).float(), (root[:, None] * (vectors.t() @ weight)).float(), scale)


def loss_basis(metric: LossMetric, moment_II: Tensor) -> Basis:
    """Principal directions of R x. ``moment_II``: sum or mean of x x^T over the sample."""
    right, moment = metric.right_DI.double(), moment_II.to(metric.right_DI.device, torch.float64)
    isotropic = _ISOTROPIC * moment.diagonal().mean()
    target_DD = right @ moment @ right.t() + isotropic * (right @ right.t())
    # on an accelerator fp32, twice as fast: the isotropic part keeps it well conditioned
    precision = torch.float64 if right.device.type == "cpu" else torch.float32
    vectors = torch.linalg.eigh(target_DD.to(precision)).eigenvectors.flip(1).double()
    return Basis((metric.left_OD.double() @ vectors).float(), (vectors.t() @ right).float())

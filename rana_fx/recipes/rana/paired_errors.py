"""Loss of dropped components of an output head, on other tokens than those whose gradients made the basis.

In: a basis W = A B, rows x of the head's input, and for the same tokens W^T g, g the gradient at its output. Out: how many times
the loss is that the metric predicts, for a rule that drops components.

The metric is a moment of gradients over a few thousand tokens, in hundreds of dimensions, with one label drawn for each token.
Dropped components are those in which it is smallest, also by chance, so that they lose several times as much on other text.
That holds for components of all units, but a head of a large vocabulary competes with its own copies in few bits, which have no
such bias. Here the error e = sum of dropped z_k a_k meets the gradient of its own token: the loss is half of the mean of
(g^T e)^2 = (sum of dropped z_k h_k)^2, with h = A^T g from W^T g = B^T h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rana_fx.recipes.basis import Basis

LEAST, MOST = 0.25, 8.0  # of the ratio: one label is drawn for each token, so few dropped components make it noisy


class PairedErrors:
    """Components z_PD, and h_PD, of some tokens, fp32."""

    def __init__(self, basis: Basis, rows_PI: Tensor, inner_PI: Tensor) -> None:
        """``rows_PI``: x. ``inner_PI``: W^T g, of the same tokens."""
        b_DI = basis.b_DI.double()
        self._z_PD = (rows_PI.to(b_DI.device).double() @ b_DI.t()).float()
        self._h_PD = torch.linalg.lstsq(b_DI.t(), inner_PI.to(b_DI.device).double().t()).solution.t().float()

    def ratio(self, threshold: float, ranks: int) -> float:
        """Loss over the predicted one where components from ``ranks`` on are dropped, and those with z_k^2 < ``threshold``."""
        dropped_PD = self._z_PD.square() < threshold
        dropped_PD[:, ranks:] = True
        lost_PD = self._z_PD * dropped_PD
        predicted = float(lost_PD.square().sum())
        found = float((lost_PD * self._h_PD).sum(1).square().sum())
        return min(MOST, max(LEAST, found / predicted)) if predicted > 0 else 1.0

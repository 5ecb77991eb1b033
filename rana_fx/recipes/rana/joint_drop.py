"""Cross-term correction for dropping several inputs together: their joint loss over the sum of their single losses.

In: a unit's loss metric and rows of its input, of which those with the lowest scores are dropped. Out: the ratio, at any
threshold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rana_fx.calibration.score_histogram import Survival
from rana_fx.recipes.rana.loss_metric import LossMetric

_DROPPED = (0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 0.995)  # shares of inputs at which it is measured
_ROWS = 512


class JointDropCorrection:
    """Measured at a few thresholds; linear in their logarithm between two of them, constant outside, 1 where there are none."""

    def __init__(self, metric: LossMetric, x_TI: Tensor) -> None:
        step = max(1, len(x_TI) // _ROWS)
        x_TI = x_TI[::step]
        single_TI = x_TI.square() * metric.norms_I  # twice the loss of dropping each input alone
        survival = Survival(single_TI, torch.ones_like(single_TI[:1]))
        self._points: list[tuple[float, float]] = []
        for share in _DROPPED:
            threshold = survival.threshold(share)
            dropped_TI = single_TI < threshold
            single = float((single_TI * dropped_TI).sum())
            if single > 0 and threshold > 0:
                joint = float(((x_TI * dropped_TI) @ metric.right_DI.t()).square().sum())
                self._points.append((math.log(threshold), joint / single))

    def at(self, threshold: float) -> float:
        """Loss of dropping every input with a score below ``threshold`` together, over the sum of dropping each alone."""
        log_threshold = math.log(threshold)
        for (left, low), (right, high) in zip(self._points, self._points[1:], strict=False):
            if log_threshold < left:
                return low
            if log_threshold < right:
                return low + (high - low) * (log_threshold - left) / (right - left)
        return self._points[-1][1] if self._points else 1.0

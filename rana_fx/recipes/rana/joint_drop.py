"""How what dropping several inputs costs differs from the sum of what dropping each would.

In: a unit's geometry and rows of its input, of which those that cost least are dropped. Out: the ratio of both, at any threshold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rana_fx.calibration.score_histogram import Survival
from rana_fx.recipes.rana.loss_metric import Geometry

_DROPPED = (0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 0.995)  # shares of inputs at which it is measured
_ROWS = 512


class Interplay:
    """Measured at a few thresholds; linear in their logarithm between two of them, constant outside, 1 where there are none."""

    def __init__(self, geometry: Geometry, x_TI: Tensor) -> None:
        step = max(1, len(x_TI) // _ROWS)
        x_TI = x_TI[::step]
        each_TI = x_TI.square() * geometry.norms_I  # what dropping each input would cost, doubled
        survival = Survival(each_TI, torch.ones_like(each_TI[:1]))
        self._points: list[tuple[float, float]] = []
        for share in _DROPPED:
            bar = survival.threshold(share)
            dropped_TI = each_TI < bar
            each = float((each_TI * dropped_TI).sum())
            if each > 0 and bar > 0:
                together = float(((x_TI * dropped_TI) @ geometry.read_DI.t()).square().sum())
                self._points.append((math.log(bar), together / each))

    def at(self, bar: float) -> float:
        """Loss of dropping all that cost less than half of ``bar`` together, over the sum of what dropping each would cost."""
        place = math.log(bar)
        for (left, low), (right, high) in zip(self._points, self._points[1:], strict=False):
            if place < left:
                return low
            if place < right:
                return low + (high - low) * (place - left) / (right - left)
        return self._points[-1][1] if self._points else 1.0

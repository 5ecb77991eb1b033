"""Importances of a linear's inputs over a sample, and the threshold that keeps a given fraction of them (neuron adapters)."""

from __future__ import annotations

import torch
from torch import Tensor

from rana_fx.calibration.score_histogram import Histogram, Profile

_CHUNK = 2048  # tokens at a time


def importance_profile(rows_TI: Tensor, norms_I: Tensor) -> Profile:
    """Squared importances (x_j norm_j)^2 of every input over the sample. ``norms_I``: |W_:,j|, or ones."""
    norms = norms_I.float()
    top = max((float((chunk.float() * norms).abs().max()) ** 2 for chunk in rows_TI.split(_CHUNK)), default=0.0)
    histogram = Histogram(torch.zeros(rows_TI.shape[1], dtype=torch.long, device=rows_TI.device), top)
    for chunk in rows_TI.split(_CHUNK):
        histogram.add((chunk.float() * norms).square_())
    return histogram.merged()


def neuron_threshold(profile: Profile, fraction: float) -> float:
    """Threshold on squared importance that keeps ``fraction`` of all inputs."""
    return profile.keep(round(profile.total * fraction))[0]

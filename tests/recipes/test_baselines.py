"""Thresholds of the input baselines: TEAL by the size of an input, WINA by that times the norm of its column."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rana_fx


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x)


@pytest.mark.parametrize("recipe", ["teal", "wina"])
def test_thresholds_follow_the_columns(recipe):
    model = Residual()
    with torch.no_grad():
        model.linear.weight *= torch.linspace(0.2, 2.0, 8)
    x = torch.randn(400, 8)
    plan = rana_fx.adapt(model, [x], budget=0.5, recipe=recipe, progress=False)
    (adapter,) = plan.adapters
    norms = model.linear.weight.detach().norm(dim=0) if recipe == "wina" else torch.ones(8)
    scores = (x * norms).square()
    threshold = scores.flatten().quantile(0.5)
    torch.testing.assert_close(adapter.tau * norms.square(), threshold.expand(8), rtol=2e-2, atol=0)

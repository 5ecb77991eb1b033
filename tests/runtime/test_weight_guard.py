"""A function of a weight, compiled once, recompiles for another weight of the same shape, which has other factors."""

from __future__ import annotations

import torch
from torch import nn

import rana_fx
from rana_fx._backend import rewritten


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        return x + self.second(x)


def test_each_weight_runs_by_its_own_adapter():
    model = Residual().requires_grad_(False)
    plan = rana_fx.adapt(model, [torch.randn(200, 16)], budget=0.6, recipe="static", progress=False)
    assert len(plan.adapters) == 2
    compiled = torch.compile(lambda x, weight: nn.functional.linear(x, weight), backend=rewritten)
    x = torch.randn(3, 16)
    for adapter, weight in zip(plan.adapters, (model.first.weight, model.second.weight), strict=True):
        torch.testing.assert_close(compiled(x, weight), x @ adapter.router.t() @ adapter.weight)

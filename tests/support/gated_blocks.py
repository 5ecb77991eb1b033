"""A small model of gated blocks, and its compilation by options of the backend."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F

import rana_fx

WIDTH, FFN = 16, 40


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b) for a, b in ((WIDTH, FFN), (WIDTH, FFN), (FFN, WIDTH)))

    def forward(self, x):
        return self.down(self.between(F.silu(self.gate(x)) * self.up(x)))

    def between(self, h):
        return h


class Model(nn.Module):
    """Two blocks with a residual stream, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Mlp(), Mlp()]), nn.Linear(WIDTH, 5)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def planned_model():
    """A model of its own with a plan of recipe ``cats``, which adapts the down projections."""
    return copy.deepcopy(_planned())


@functools.cache
def _planned():
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    rana_fx.adapt(model, [torch.randn(64, WIDTH) for _ in range(3)], budget=0.7, recipe="cats", progress=False)
    return model


X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))


def compiled(model, **options):
    return torch.compile(model, backend=rana_fx.backend, options=options)

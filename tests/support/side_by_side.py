"""Several modules in one model and one graph, for tests that would compile each of them alone."""

from __future__ import annotations

from torch import nn


class SideBySide(nn.Module):
    """Every module has an input of its own, so that nothing is fused across modules."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, xs, *same):
        return [part(x, *same) for part, x in zip(self.parts, xs, strict=True)]

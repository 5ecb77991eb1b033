"""Recipe rana selects the allocation with the smaller change of the output on held-out batches."""

from __future__ import annotations

import pytest
import torch

import rana_fx
from rana_fx.recipes import RECIPES
from rana_fx.recipes.rana.options import ALLOCATIONS
from rana_fx.recipes.rana.recipe import Rana
from tests.support.architectures import build, ids, output


def test_the_best_allocation_is_taken(monkeypatch):
    found = {}
    for allocations in [(name,) for name in ALLOCATIONS] + [ALLOCATIONS]:
        model, _ = build("plain_llama", 1)
        batches = [ids(tokens=24) for _ in range(9)]
        held = batches[7]
        monkeypatch.setitem(RECIPES, "rana", Rana(allocations=allocations))
        plan = rana_fx.adapt(model, batches, budget=0.6, progress=False)
        with torch.no_grad():
            dense = output(model(**held)).log_softmax(-1)
            adapted = output(torch.compile(model, backend=rana_fx._backend.rewritten)(**held)).log_softmax(-1)
        found[allocations] = float((dense.exp() * (dense - adapted)).sum(-1).mean()), plan.digest()
        torch.compiler.reset()
    *alone, best = found.values()
    assert abs(alone[0][0] - alone[1][0]) > 0.01 * best[0], "both are equally good, so nothing is tested"
    assert best[0] == pytest.approx(min(alone)[0], rel=1e-3)

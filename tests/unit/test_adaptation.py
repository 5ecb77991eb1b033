"""The steps of ``adapt`` by themselves make the plan that ``adapt`` makes."""

from __future__ import annotations

import pytest
import torch

import rana_fx
from rana_fx.adaptation import calibrated, planned, solved
from rana_fx.calibration.records import records
from rana_fx.recipes import RECIPES
from rana_fx.runtime.attachment import attached
from tests.support.architectures import build, ids


@pytest.mark.parametrize("recipe", ["static", "paper"])
def test_steps_make_the_same_plan(recipe):
    torch.manual_seed(0)
    batches = [ids() for _ in range(4)]
    model, _ = build("plain_llama", 1)
    expected = rana_fx.adapt(model, batches, budget=0.8, recipe=recipe, progress=False, seed=3)
    rana_fx.detach(model)
    calibration = calibrated(model, batches, RECIPES[recipe], seed=3)
    problem = calibration.problem(budget=0.8, metric="flops", recipe=recipe)
    plan = planned(calibration, problem, solved(problem, RECIPES[recipe]))
    assert plan.digest() == expected.digest()
    assert attached(model) is None  # attaching is a separate step
    assert any("residual join" in skip.reason for skip in plan.left)  # the head


def test_records_without_digests():
    model, batch = build("plain_llama", 1)
    layout = calibrated(model, [batch], RECIPES["dense"]).layout
    whole, bare = records(layout), records(layout, hashed=False)
    assert all(one.digest for one in whole) and not any(one.digest for one in bare)
    assert [one.name for one in whole] == [one.name for one in bare] == list(layout.sites)

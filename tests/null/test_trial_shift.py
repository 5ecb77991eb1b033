"""An adapter with a shift does the same where a recipe tries it as where a plan applies it."""

from __future__ import annotations

import torch

from rana_fx.calibrate import calibrate
from rana_fx.recipes.trial import attempt
from rana_fx.rehearse import Keeper
from tests.storages import stored_plan


def test_everything_kept_behind_a_shift_is_the_dense_model():
    model, batch, plan = stored_plan("llama", 1, "hybrid", shift=0.3)
    layout, _, _ = calibrate(model, [batch], wanted=lambda _: set(), progress=False)
    keeper = Keeper([batch])
    assert len(list(keeper)) == 1
    with torch.no_grad(), keeper.rehearsal(model).opened(layout) as stage:
        dense = [stage.run(batch)]
        outcome = attempt(stage, layout, plan.adapters, [batch], dense)
    assert abs(outcome.divergence) < 1e-6

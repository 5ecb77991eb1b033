"""An adapter with a shift has the same output in the simulation as in an attached plan."""

from __future__ import annotations

import torch

from rana_fx.calibration.calibrate import calibrate
from rana_fx.calibration.holdout import Tee
from rana_fx.recipes.simulate import simulate
from tests.support.storages import stored_plan


def test_everything_kept_behind_a_shift_is_the_dense_model():
    model, batch, plan = stored_plan("plain_llama", 1, "hybrid", shift=0.3)
    layout = calibrate(model, [batch], progress=False).layout
    tee = Tee([batch])
    assert len(list(tee)) == 1
    with torch.no_grad(), tee.holdout(model).instrumented(layout) as instrumented:
        dense = [instrumented.run(batch)]
        outcome = simulate(instrumented, layout, plan.adapters, [batch], dense)
    assert abs(outcome.divergence) < 1e-6

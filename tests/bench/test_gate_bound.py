"""The gate's bound for fixed masks: a model that enlarges rounding errors is not refused for it, and a wrong factor still is."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import rana_fx
from bench.common.models import SHAPES, build, layers_of
from bench.speed.decoding import Decoder
from bench.speed.random_plan import RecordingMeter, attach_unchecked, layout_of, plan_configs
from bench.speed.variants import Variant, on_model, reference
from bench.speed.verify import bound, check_logits
from rana_fx.calibration.batches import evaluating, observing
from rana_fx.kernels.ops import implementation


def in_fp32(model, plan):
    """The model and its plan, the same numbers, computed without rounding to 16 bits."""
    wide = copy.deepcopy(model)
    rana_fx.detach(wide)
    plan = replace(plan, adapters=tuple(adapter.to(torch.float32) for adapter in plan.adapters))
    vars(plan)["_digest"] = "0" * 64
    wide = wide.float()
    plan = attach_unchecked(wide, plan)
    return wide, plan


@pytest.mark.parametrize("sharp", [1.0, 30.0])
def test_errors_that_the_model_enlarges(sharp, monkeypatch):
    """Saturated attention, as after training: queries are ``sharp`` times as large as random weights make them."""
    config = SHAPES["tiny"]()
    config.num_hidden_layers = 1
    monkeypatch.setitem(SHAPES, "tiny", lambda: config)
    model = build("tiny", device=torch.device("cpu"), dtype="bfloat16")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.mul_(sharp)
    (storage,) = plan_configs("neuron:16/8", density=0.5, stacked=True)
    variant, decoder = Variant("rana", "rana", "default", 0.25, config=storage), Decoder(model, batch=1, room=128)
    limit = bound(model.dtype, layers_of(model), 160)
    with on_model(variant, model, layout_of(model), seed=0) as prepared, torch.no_grad():
        script, expected = reference(variant, prepared, decoder, seed=0)
        wide, plan = in_fp32(model, prepared.plan)
        exact = Decoder(wide, batch=1, room=128)
        with implementation("reference"), evaluating(wide), observing(wide):
            watch = RecordingMeter(wide, plan)
            good = check_logits(lambda: exact.logits(watch, script), plan, expected, limit=limit)
            scale = next(adapter for adapter in plan.adapters if "down" in adapter.name).weight_scale
            scale.mul_(2)
            bad = check_logits(lambda: exact.logits(watch, script), plan, expected, limit=limit)
        rana_fx.detach(wide)
    assert good.fixed_error <= good.fixed_bound < 0.5
    assert (good.fixed_error > limit) == (sharp > 1)
    assert bad.fixed_error > bad.fixed_bound and not bad.passed

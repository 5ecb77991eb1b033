"""The plan of a trained model compiles to the same outputs; thresholds are re-estimated to keep the budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rana_fx
from rana_fx.curve import Curve, CurvePoint
from rana_fx.errors import NoBatches, NoPlan
from rana_fx.evaluation.measure import measuring
from rana_fx.runtime.attachment import attached
from rana_fx.training import rethreshold, trainable, trained_plan
from tests.support.architectures import build, ids, output
from tests.support.trained import adapted, compiled


def test_trained_plan_is_what_the_model_computes(tmp_path):
    model, batch = adapted(depth=1)
    old = attached(model).plan
    chosen = trainable(model, what="all")
    optimizer = torch.optim.AdamW(chosen.values(), lr=1e-2)
    forward = compiled(model)
    for _ in range(2):
        output(forward(**batch, use_cache=False)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        expected = output(forward(**batch)).clone()
    plan = trained_plan(model)
    assert plan.digest() != old.digest() and all(adapter.error is None for adapter in plan.adapters if adapter.kind == "rank")
    assert plan.expected_budget() == old.expected_budget()
    factor = attached(model).tensor(0, "router")
    assert torch.equal(plan.adapters[0].router, factor) and not torch.equal(plan.adapters[0].router, old.adapters[0].router)
    plan.save(tmp_path / "plan")
    with torch.no_grad():
        factor.zero_()  # the plan holds copies
    again = rana_fx.load_plan(tmp_path / "plan")
    assert again.digest() == plan.digest()
    rana_fx.detach(model)
    rana_fx.attach(model, again)
    with torch.no_grad():
        torch.testing.assert_close(output(compiled(model)(**batch)), expected, rtol=0, atol=0)


def test_an_untrained_plan_keeps_its_digest_and_a_cast_one_fits():
    model, _ = adapted()
    old = attached(model).plan
    assert trained_plan(model).digest() == old.digest()
    model.bfloat16()
    plan = trained_plan(model)
    assert {record.dtype for record in plan.sites} == {"bfloat16"} and plan.adapters[0].router.dtype == torch.bfloat16
    assert plan.expected_budget("bytes") == pytest.approx(old.expected_budget("bytes"))
    rana_fx.attach(model, plan)


@pytest.mark.parametrize("recipe", ["paper", "cats"])
def test_thresholds_go_where_they_keep_what_was_planned(recipe):
    model, _ = adapted(recipe, depth=1, budget=0.8)
    batches = [ids() for _ in range(8)]
    plan = attached(model).plan
    with torch.no_grad():  # as after training: all values are larger
        model.model.embed_tokens.weight.mul_(1.5)
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(1.7)
            layer.post_attention_layernorm.weight.mul_(1.7)
    with measuring(model) as meter:
        for batch in batches:
            meter.run(batch)
    off = abs(meter.result().budget_flops - plan.expected_budget("flops"))
    result = rethreshold(model, batches)
    assert abs(result.budget_flops - plan.expected_budget("flops")) < min(0.02, off)
    assert any(not torch.equal(new.tau, old.tau) for new, old in zip(trained_plan(model).adapters, plan.adapters, strict=True))
    with measuring(model) as meter:  # a plan of the model keeps the same number
        rana_fx.attach(model, trained_plan(model))
    assert attached(model).plan.expected_budget() == plan.expected_budget()


def test_invalid_calls_raise():
    plain, _ = build("plain_llama", 1)
    with pytest.raises(NoPlan):
        trained_plan(plain)
    model, _ = adapted(depth=1)
    with pytest.raises(NoBatches):
        rethreshold(model, [])


def test_a_trained_plan_has_no_curve():
    model, _ = adapted()
    old = rana_fx.detach(model)
    point = CurvePoint(old.budget, 0.5, 0.5, None, None, None, 0, 0)
    rana_fx.attach(model, replace(old, curve=Curve((point,))))
    assert attached(model).plan.curve is not None and trained_plan(model).curve is None

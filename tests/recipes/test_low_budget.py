"""A budget that is too low for its model is remarked: by the plan's own expected loss, against a smaller dense model's."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import rana_fx
from rana_fx.recipes.rana.expected_loss import loss_of_smaller_model, mean_entropy, remark
from tests.support.architectures import build, ids


def test_the_entropy_is_the_mean_over_tokens_of_the_logits():
    model = SimpleNamespace(real=lambda values: values.reshape(-1, values.shape[-1]))
    uniform, certain = torch.zeros(1, 3, 8), torch.full((1, 1, 8), -1e9)
    certain[..., 0] = 0
    found = mean_entropy([{"logits": uniform}, {"logits": certain}], model)
    assert found == pytest.approx(3 * math.log(8) / 4, rel=1e-6)
    assert mean_entropy([(torch.zeros(2, 3),)], model) is None


def test_a_smaller_model_loses_by_the_scaling_law():
    # half of the weights: the loss is 2 ** 0.076 times as large
    assert loss_of_smaller_model(0.5, 3.0) == pytest.approx(3 * (2**0.076 - 1))
    assert loss_of_smaller_model(1.0, 3.0) == 0


@pytest.mark.parametrize("budget", [0.05, 0.3, 0.58])
def test_it_depends_on_the_plans_loss_at_any_budget(budget):
    limit = loss_of_smaller_model(budget, 3.0)
    assert remark(budget=budget, divergence=0.99 * limit, entropy=3.0) == ""
    text = remark(budget=budget, divergence=1.01 * limit, entropy=3.0)
    assert f"quality will suffer at a budget of {budget:g}" in text and f"{1.01 * limit:.2g} nats per token" in text
    assert "raise the budget" in text
    assert remark(budget=budget, divergence=1e9, entropy=None) == ""


def sharp():
    """A random model whose predictions are about as certain as a trained one's: without training it is certain of nothing."""
    torch.manual_seed(0)
    model, _ = build("plain_llama", 2)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model, [ids(24) for _ in range(8)]


def test_adapt_remarks_a_budget_that_is_too_low():
    model, batches = sharp()
    low = rana_fx.adapt(model, batches, budget=0.1, progress=False)
    assert any("quality will suffer at a budget of 0.1" in note for note in low.notes())
    assert "quality will suffer" in str(low)
    rana_fx.detach(model)
    high = rana_fx.adapt(model, batches, budget=0.95, progress=False)
    assert not any("quality will suffer" in note for note in high.notes())

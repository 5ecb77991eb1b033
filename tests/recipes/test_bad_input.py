"""Every invalid call of adapt raises its own error, with a remedy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import rana_fx
from rana_fx import errors
from tests.support.architectures import build, ids


@pytest.fixture
def model():
    return build("plain_llama", 1)[0]


def batches(count=4):
    torch.manual_seed(0)
    return [ids() for _ in range(count)]


@pytest.mark.parametrize("budget", [0, -1, 1.01, float("nan"), "half", True])
def test_budget_outside(model, budget):
    with pytest.raises(errors.BudgetOutOfRange, match=r"outside \(0, 1\]"):
        rana_fx.adapt(model, batches(), budget=budget, progress=False)


def test_budget_unreachable_says_the_lowest(model):
    with pytest.raises(errors.BudgetUnreachable, match="lowest reachable budget is") as caught:
        rana_fx.adapt(model, batches(), budget=0.05, recipe="paper", progress=False)
    lowest = caught.value.facts["lowest"]
    assert 0.05 < lowest < 0.5
    with pytest.raises(errors.BudgetUnreachable, match="CATS leaves"):
        rana_fx.adapt(model, batches(), budget=0.4, recipe="cats", progress=False)


def test_unknown_choices_name_the_valid_ones(model):
    with pytest.raises(errors.UnknownRecipe, match="dense, static, cats, teal, wina, exact, paper, rana"):
        rana_fx.adapt(model, batches(), recipe="papper", progress=False)
    with pytest.raises(errors.InvalidOption, match="expected a name .*, or a recipe such as"):
        rana_fx.adapt(model, batches(), recipe=["paper"], progress=False)
    with pytest.raises(errors.UnknownMetric, match="flops, bytes"):
        rana_fx.adapt(model, batches(), metric="seconds", progress=False)


def test_no_batch(model):
    with pytest.raises(errors.NoBatches, match="no batch was given"):
        rana_fx.adapt(model, [], progress=False)


def test_too_few_tokens_says_how_many(model):
    with pytest.raises(errors.TooFewTokens, match=r"q_proj: 24 calibration tokens.*At least 32 tokens"):
        rana_fx.adapt(model, batches(1), recipe="paper", progress=False)


def test_layers_quantised_out_of_sight_are_reported():
    """Weights packed by torch.ao, or integer buffers of another library: the graph has no Parameter of them."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.ones(16, 8, dtype=torch.int32))

        def forward(self, x):
            return x + (x @ self.qweight.to(x.dtype))[..., :8].repeat(1, 2) * 0

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
            self.odd, self.own = nn.Linear(16, 16), Packed()

        def forward(self, x):
            x = x + self.down(torch.relu(self.up(x)))
            return self.own(x + self.odd(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(Mixed(), {"odd": torch.ao.quantization.default_dynamic_qconfig})
        report = rana_fx.explain(model, torch.randn(4, 16))
    reasons = {row.site: row.detail for row in report.rows if row.action == "skipped"}
    assert {row.site for row in report.rows if row.action == "dense"} == {"up", "down"}
    assert reasons["odd"] == "quantised layer Linear"
    assert reasons["own"] == "quantised layer Packed (torch.int32)"


class Pooled(nn.Module):
    """Blocks over all tokens, and attention with one learned query per sequence."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
        self.pool_up, self.pool_down = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        pooled = x.mean(1)
        return pooled + self.pool_down(torch.relu(self.pool_up(pooled)))


@pytest.mark.parametrize("recipe", ["paper", "static"])
def test_a_layer_that_sees_few_rows_stays_dense(recipe):
    model = Pooled()
    batches = [torch.randn(2, 30, 16) for _ in range(4)]
    plan = rana_fx.adapt(model, batches, budget=0.9, recipe=recipe, progress=False)
    assert {site for adapter in plan.adapters for site in adapter.sites} == {"up", "down"}
    reasons = {skip.site: skip.reason for skip in plan.skips}
    assert reasons["pool_up"].startswith("sees 8 rows where other layers see 240: too few for 16 ranks")
    with pytest.raises(errors.TooFewTokens, match="up: 8 calibration tokens"):
        rana_fx.adapt(Pooled(), [torch.randn(2, 4, 16)], budget=0.9, recipe=recipe, progress=False)


def test_nan_in_weights(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight[3, 4] = float("nan")
    with pytest.raises(errors.NonFinite, match=r"down_proj: 1 NaN or Inf values in its weight"):
        rana_fx.adapt(model, batches(), progress=False)


def test_nan_in_activations(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("inf")
    with pytest.raises(errors.NonFinite, match=r"q_proj: \d+ NaN or Inf values in its input activations"):
        rana_fx.adapt(model, [{"input_ids": torch.full((2, 12), 5)}], progress=False)


def test_model_that_does_not_run(model):
    with pytest.raises(errors.TraceFailed, match="PlainLlama could not be traced .* batch 0"):
        rana_fx.adapt(model, [{"input_idz": torch.ones(1, 2, dtype=torch.long)}], progress=False)


def test_nan_in_a_bias():
    model = build("gpt2", 1)[0]
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[2] = float("nan")
    with pytest.raises(errors.NonFinite, match=r"c_fc: 1 NaN or Inf values in its bias"):
        rana_fx.adapt(model, batches(), progress=False)


def test_model_that_fails_inside_names_the_part(model):
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) @ x  # (12, 32) @ (12, 32)
    with pytest.raises(
        errors.TraceFailed, match=r"batch 0: test_bad_input.py:\d+, in <lambda>: `mlp.forward = .*batch2 tensor to be"
    ):
        rana_fx.adapt(model, batches(), progress=False)


def test_model_that_fails_outside_of_a_graph_names_the_module(model):
    @torch.compiler.disable
    def fail(x):
        raise ValueError("no such thing")

    model.model.layers[0].mlp.forward = fail
    with pytest.raises(errors.TraceFailed, match=r"batch 0: model.*: ValueError: no such thing"):
        rana_fx.adapt(model, batches(), progress=False)


def test_numpy_numbers_are_numbers(model):
    assert rana_fx.adapt(model, batches(), budget=np.float32(0.7), progress=False).budget == pytest.approx(0.7)


def test_adapting_twice(model):
    rana_fx.adapt(model, batches(), budget=0.7, progress=False)
    with pytest.raises(errors.AlreadyAdapted, match="already has a plan attached"):
        rana_fx.adapt(model, batches(), budget=0.7, progress=False)
    rana_fx.detach(model)
    rana_fx.adapt(model, batches(), budget=0.8, progress=False)


def test_training_mode_is_restored(model):
    model.train()
    rana_fx.adapt(model, batches(), budget=0.7, progress=False)
    assert model.training
    assert model.model.layers[0].mlp.training


def test_quantised_weights_are_skipped_with_a_reason():
    class Packed(nn.Parameter):
        pass

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
            self.odd = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            x = x + self.down(torch.relu(self.up(x)))
            return x + torch.matmul(x, self.odd.to(x.dtype))

    report = rana_fx.explain(Mixed(), torch.randn(4, 8))
    reasons = {row.site: row.detail for row in report.rows if row.action == "skipped"}
    assert "quantised weight" in reasons["odd"]


def test_infeasible_group_stays_dense_and_says_so():
    """If no rank is feasible, the group stays dense and its cost reduces the budget of the others."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.o = nn.Linear(6, 6), nn.Linear(6, 6)
            self.up, self.down = nn.Linear(6, 64), nn.Linear(64, 6)

        def forward(self, x):
            q = self.q(x)
            x = x + self.o(torch.softmax(q @ q.transpose(-1, -2), -1) @ q)
            return x + self.down(torch.relu(self.up(x)))

    model = Narrow()
    plan = rana_fx.adapt(model, [torch.randn(4, 50, 6)], budget=0.9, recipe="paper", progress=False)
    reasons = {skip.site: skip.reason for skip in plan.skips}
    adapted = {site for adapter in plan.adapters for site in adapter.sites}
    assert ("q" in adapted) != ("no feasible rank" in reasons.get("q", ""))
    assert plan.expected_budget() == pytest.approx(0.9, abs=0.03)

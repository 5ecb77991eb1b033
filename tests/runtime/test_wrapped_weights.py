"""Weights that are wrapper subclasses are skipped with a reason and never touched; everything else of the model adapts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import rana_fx
from rana_fx.errors import PlanMismatch, RanaWarning
from rana_fx.ordinary import is_ordinary
from rana_fx.passes.runner import run
from tests.support.adapted import adapted, relative
from tests.support.architectures import ARCHITECTURES, ids, make, output
from tests.support.wrapped import Int8, quantise_

REASON = "quantised or wrapped weight (Int8)"


@pytest.fixture
def quantised():
    """(a model of which one linear is quantised, a batch, its plan)."""
    model, batch = make(ARCHITECTURES["plain_llama"], 1)
    quantise_(model.model.layers[0].mlp.up_proj)
    plan = rana_fx.adapt(model, [batch, *(ids() for _ in range(4))], budget=0.8, recipe="teal", progress=False)
    return model, batch, plan


def test_the_others_adapt(quantised, graphs_as_rewritten):
    model, batch, plan = quantised
    site = "model.layers.0.mlp.up_proj"
    assert {skip.site: skip.reason for skip in plan.left}[site] == REASON
    sites = {name for adapter in plan.adapters for name in adapter.sites}
    assert site not in sites and {"model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"} <= sites
    assert {row.site: row.detail for row in rana_fx.explain(model, batch).rows}[site] == REASON
    with torch.no_grad():
        got = output(torch.compile(model, backend=rana_fx.backend)(**batch))
        twin = output(torch.compile(copy.deepcopy(model), backend=rana_fx.backend)(**batch))
        as_factors = output(torch.compile(copy.deepcopy(model), backend=rana_fx.backend, options={"prefill": "factors"})(**batch))
        dense = output(model(**batch))
        Int8.asked = 0
        rana_fx.detach(model)
        rana_fx.attach(model, plan)
        rana_fx.detach(model)
        assert Int8.asked == 0
        given = output(torch.compile(model, backend=rana_fx.backend, options={"plan": plan})(**batch))
    assert relative(got, dense) > 1e-3
    for other in (twin, as_factors, given):
        torch.testing.assert_close(other, got)
    assert "model.layers.0.mlp.up_proj.weight" in model.state_dict()


@pytest.mark.usefixtures("graphs_as_rewritten")
@pytest.mark.parametrize("how", ["attached", "as an option"])
def test_a_plan_from_before_quantisation_says_so(how):
    model, batch, plan = adapted()
    rana_fx.detach(model)
    quantise_(model.model.layers[0].mlp.up_proj)
    message = (
        r"layers.0.mlp.up_proj: got a quantised or wrapped weight \(Int8\), expected an ordinary float32 weight; the plan was"
    )
    if how == "attached":
        with pytest.raises(PlanMismatch, match=message):
            rana_fx.attach(model, plan)
    else:
        with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=message):
            torch.compile(model, backend=rana_fx.backend, options={"plan": plan})(**batch)


class Renamed(nn.Parameter):
    """A Parameter by another name."""


def test_a_subclass_without_overrides_is_ordinary():
    model, batch, plan = adapted()
    dense = output(model(**batch)).detach()
    rana_fx.detach(model)
    down = model.model.layers[0].mlp.down_proj
    down.weight = Renamed(down.weight.detach(), requires_grad=False)
    assert is_ordinary(down.weight) and not is_ordinary(nn.Parameter(Int8(torch.ones(2, 2, dtype=torch.int8), torch.ones(2))))
    rana_fx.attach(model, plan)
    seen = []

    def counted(gm, example_inputs):
        seen.append(run(gm, example_inputs).replaced)
        return gm.forward

    with torch.no_grad():
        got = output(torch.compile(model, backend=counted)(**batch))
    assert sum(sum(counts.values()) for counts in seen) == sum(len(adapter.sites) for adapter in plan.adapters)
    assert relative(got, dense) > 1e-3


class Packed(nn.Linear):
    """Its weight is integers in one column, and their scale an attribute of it, as of 4-bit layers."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().max() / 127
        numbers = (linear.weight.detach() / scale + 128).round().to(torch.uint8)
        self.weight = nn.Parameter(numbers.reshape(-1, 1), requires_grad=False)
        self.weight.scale = scale

    def forward(self, x):
        weight = (self.weight.to(x.dtype) - 128) * self.weight.scale
        return nn.functional.linear(x, weight.view(self.out_features, self.in_features))


def test_packed_integers_are_named():
    model, batch = make(ARCHITECTURES["plain_llama"], 1)
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Packed(mlp.up_proj)
    plan = rana_fx.adapt(model, [batch, *(ids() for _ in range(4))], budget=0.8, recipe="teal", progress=False)
    assert {skip.site: skip.reason for skip in plan.left}["model.layers.0.mlp.up_proj"] == "quantised layer Packed (torch.uint8)"


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_a_weight_packed_under_a_plan_is_reported():
    model, batch, _ = adapted()
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Packed(mlp.up_proj)
    reason = r"up_proj: the plan is not applied here: quantised weight \(torch.uint8\)"
    with pytest.warns(RanaWarning, match=reason), torch.no_grad():
        torch.compile(model, backend=rana_fx.backend)(**batch)

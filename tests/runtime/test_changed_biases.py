"""Adapters compute with a bias of their own: where the model's is another one, the linear runs dense, with a warning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx._backend import rewrite
from rana_fx.errors import RanaWarning


class Mlp(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24, bias=bias), nn.Linear(24, 8, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def planned(*, bias, recipe="static"):
    torch.manual_seed(0)
    model = Mlp(bias).eval()
    plan = rana_fx.adapt(model, [torch.randn(4, 16, 8) for _ in range(3)], budget=0.6, recipe=recipe, progress=False)
    assert {site for adapter in plan.adapters for site in adapter.sites} == {"up", "down"}
    return model, plan


def adapted_linears(model, **options):
    torch.compiler.reset()
    names = []

    def backend(gm, inputs):
        names.extend(linear.name for match in rewrite(gm, inputs, **options).matches.found for linear in match.linears)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(2, 5, 8))
    return names


def _written(model):
    with torch.no_grad():
        model.up.bias[-1] += 1


def _replaced(model):
    model.up.bias = nn.Parameter(model.up.bias.detach() + 1)


@pytest.mark.parametrize("change", [_written, _replaced])
def test_another_bias_runs_dense_with_a_warning(change):
    model, _ = planned(bias=True)
    assert adapted_linears(model) == ["up", "down"]
    change(model)
    with pytest.warns(RanaWarning, match="up: the plan is not applied here: its bias was added, replaced or written"):
        assert adapted_linears(model) == ["down"]


def test_a_checkpoint_with_another_bias_is_noticed_as_it_is_loaded():
    model, _ = planned(bias=True)
    state = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("rana_fx")}
    with pytest.warns(RanaWarning, match="up: the plan is not applied here: its bias was added, replaced or written"):
        model.load_state_dict(state | {"up.bias": state["up.bias"] + 1}, strict=False)
    model, _ = planned(bias=True)
    model.load_state_dict(state, strict=False, assign=True)
    assert adapted_linears(model) == ["up", "down"]


def test_a_bias_where_there_was_none():
    model, plan = planned(bias=False)
    given = copy.deepcopy(model)
    model.up.bias = nn.Parameter(torch.ones(24))
    with pytest.warns(RanaWarning, match="up: the plan is not applied here: it has a bias, and had none"):
        assert adapted_linears(model) == ["down"]
    rana_fx.detach(given)
    given.up.bias = nn.Parameter(torch.ones(24))
    assert adapted_linears(given, plan=plan) == ["down"]


def test_what_is_the_models_own_bias_may_change():
    model, _ = planned(bias=True, recipe="teal")
    _written(model)
    assert adapted_linears(model) == ["up", "down"]


def test_a_cast_and_a_copy_keep_the_bias():
    model, _ = planned(bias=True)
    assert adapted_linears(copy.deepcopy(model)) == ["up", "down"]
    model.double()
    torch.compiler.reset()
    with torch.no_grad():
        seen = []
        torch.compile(model, backend=lambda gm, inputs: (seen.append(rewrite(gm, inputs)), gm.forward)[1])(
            torch.randn(2, 5, 8, dtype=torch.float64)
        )
    assert not seen[0].matches.declined

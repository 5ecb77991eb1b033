"""Weights that are replaced or written under an attached plan: their linears run by the weight as it is, with a warning; what is
only moved, cast or loaded again with the same values stays adapted, without one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import rana_fx
from rana_fx._backend import rewrite, rewritten
from rana_fx.errors import RanaWarning
from rana_fx.runtime.attachment import attached
from rana_fx.runtime.changed_weights import Seen
from tests.support.adapted import adapted, relative
from tests.support.architectures import output

CHANGED = "up_proj: the plan is not applied here: its weight has other values than when the plan was attached.*attach it again"


def replaced(model, batch):
    """(output, names of adapted linears) of the model compiled anew."""
    torch.compiler.reset()
    names = []

    def backend(gm, example_inputs):
        names.extend(linear.name for match in rewrite(gm, example_inputs).matches.found for linear in match.linears)
        return gm.forward

    with torch.no_grad():
        return output(torch.compile(model, backend=backend)(**batch)), names


def up(model):
    return model.model.layers[0].mlp.up_proj


def _in_place(model):
    with torch.no_grad():
        up(model).weight.mul_(2)


def _unversioned(model):
    up(model).weight.data.add_(0.1)


def _data(model):
    up(model).weight.data = up(model).weight.data * 2


def _parameter(model):
    up(model).weight = nn.Parameter(up(model).weight.detach() * 2)


def _swapped(model):
    torch.utils.swap_tensors(up(model).weight, nn.Parameter(up(model).weight.detach() * 2))


def _module(model):
    model.model.layers[0].mlp.up_proj = nn.Linear(up(model).in_features, up(model).out_features, bias=False)


def _parametrized(model):
    parametrize.register_parametrization(up(model), "weight", Doubled())
    parametrize.remove_parametrizations(up(model), "weight")


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("change", [_in_place, _unversioned, _data, _parameter, _swapped, _module, _parametrized])
def test_another_weight_runs_dense_with_a_warning(change):
    model, batch, plan = adapted()
    change(model)
    with pytest.warns(RanaWarning, match=CHANGED):
        got, names = replaced(model, batch)
    everything = {site for adapter in plan.adapters for site in adapter.sites}
    assert set(names) == everything - {"model.layers.0.mlp.up_proj"}
    # what the plan says of all others, with this one linear dense
    twin, _, _ = adapted()
    expected_plan = copy.copy(plan)
    kept = tuple(adapter for adapter in plan.adapters if "model.layers.0.mlp.up_proj" not in adapter.sites)
    object.__setattr__(expected_plan, "adapters", kept)
    expected_plan.__dict__.pop("_digest", None)
    rana_fx.detach(twin)
    with torch.no_grad():
        up(twin).weight.copy_(up(model).weight)
    from rana_fx.runtime.attachment import attach_unchecked

    attach_unchecked(twin, expected_plan)
    torch.testing.assert_close(got, replaced(twin, batch)[0])


def _loaded(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def _assigned(model):
    state = {name: value.clone() for name, value in model.state_dict().items() if "rana_fx" not in name}
    model.load_state_dict(state, strict=False, assign=True)


def _moved(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _written(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.clone())


def _same_parameter(model):
    up(model).weight = nn.Parameter(up(model).weight.detach().clone())


def _overwritten(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def _untouched(model):
    with torch.no_grad():
        model.model.norm.weight.mul_(1)
        model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach().clone())


@pytest.mark.parametrize("change", [_loaded, _assigned, _moved, _written, _same_parameter, _overwritten, _untouched])
def test_the_same_weight_stays_adapted(change):
    model, batch, plan = adapted()
    expected, before = replaced(model, batch)
    change(model)
    got, names = replaced(model, batch)
    assert names == before
    torch.testing.assert_close(got, expected)


def test_a_cast_model_stays_adapted():
    model, batch, _ = adapted(recipe="teal")
    before = replaced(model, batch)[1]
    assert replaced(model.bfloat16(), batch)[1] == before
    assert replaced(model.float(), batch)[1] == before  # rounded on the way, masks and all


def test_a_weight_cast_alone_runs_dense():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = (nn.Linear(16, 16, bias=False) for _ in range(3))

        def forward(self, x):
            x = self.stem(x)
            x = x + self.a(x.to(self.a.weight.dtype)).to(x.dtype)
            return x + self.b(x)

    model = Model().requires_grad_(False)
    rana_fx.adapt(model, [torch.randn(200, 16)], budget=0.6, recipe="static", progress=False)
    model.a.bfloat16()
    x = torch.randn(3, 16)
    with pytest.warns(
        RanaWarning, match=r"a: .* its weight is torch.bfloat16, its factors are torch.float32; cast the whole model"
    ):
        got = torch.compile(model, backend=rewritten)(x)
    attachment = attached(model)
    index, adapter = attachment.adapter("b")
    h = model.stem(x)
    h = h + model.a(h.bfloat16()).float()
    torch.testing.assert_close(got, h + h @ adapter.router.t() @ adapter.weight)


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_another_checkpoint_is_noticed_as_it_is_loaded():
    """Compiled code runs dense from the next call on."""
    model, batch, _ = adapted()
    fast = torch.compile(model, backend=rana_fx.backend)
    with torch.no_grad():
        fast(**batch)
        state = {name: value + 0.1 for name, value in model.state_dict().items() if "rana_fx" not in name}
        with pytest.warns(RanaWarning, match="the plan is not applied here: its weight has other values"):
            model.load_state_dict(state, strict=False)
        torch.testing.assert_close(output(fast(**batch)), output(model(**batch)))


def test_what_is_trained_with_its_factors_stays_adapted():
    model, batch, _ = adapted()
    before = replaced(model, batch)[1]
    with torch.no_grad():
        for parameter in model.parameters():  # an average of models, say
            parameter.mul_(0.9).add_(parameter, alpha=0.1)
    assert replaced(model, batch)[1] == before


def test_a_copy_knows_its_own_weights():
    model, batch, _ = adapted()
    twin = copy.deepcopy(model)
    _in_place(twin)
    expected, names = replaced(model, batch)
    with pytest.warns(RanaWarning, match=CHANGED):
        got, fewer = replaced(twin, batch)
    assert len(fewer) == len(names) - 1 and relative(got, expected) > 1e-3


def test_a_parametrized_weight_is_reported_by_adapt():
    model, batch, _ = adapted()
    rana_fx.detach(model)
    parametrize.register_parametrization(up(model), "weight", Doubled())
    plan = rana_fx.adapt(model, [batch], budget=0.9, recipe="teal", progress=False)
    left = {skip.site: skip.reason for skip in plan.left}
    assert left["model.layers.0.mlp.up_proj.parametrizations.weight.original"] == "its weight is computed in the forward pass"


def test_a_weight_parametrized_under_a_plan_is_reported():
    model, batch, _ = adapted()
    _, before = replaced(model, batch)
    parametrize.register_parametrization(up(model), "weight", Doubled())
    with pytest.warns(RanaWarning, match="up_proj: the plan is not applied here: its weight is computed in the forward pass"):
        _, names = replaced(model, batch)
    assert set(before) - set(names) == {"model.layers.0.mlp.up_proj"}


def test_a_weight_that_became_a_tensor_is_reported():
    model, batch, _ = adapted()
    weight = up(model).weight.detach()
    del up(model).weight
    up(model).register_buffer("weight", weight.clone())
    with pytest.warns(RanaWarning, match="up_proj: the plan is not applied here: its weight is no longer a Parameter"):
        replaced(model, batch)


def test_factors_are_compared_for_their_own_linears_only(monkeypatch):
    model, batch, plan = adapted(depth=2)
    attachment, looks, of = attached(model), {}, Seen.of
    names = {id(tensor): name for name, tensor in (*attachment.factors.named_parameters(), *attachment.factors.named_buffers())}

    def counted(weight):
        if id(weight) in names:
            looks[names[id(weight)]] = looks.get(names[id(weight)], 0) + 1
        return of(weight)

    monkeypatch.setattr(Seen, "of", counted)
    replaced(model, batch)
    assert looks
    for name, count in looks.items():
        assert count <= len(plan.adapters[int(name[1:].partition("_")[0])].sites), name

"""Weights in shared or mapped memory, made in inference mode, absent, or tied."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx.errors import PlanMismatch, WeightAbsent
from rana_fx.evaluation.measure import measuring
from tests.support.adapted import adapted, relative
from tests.support.architectures import ARCHITECTURES, ids, make, output


def _shared(model, _):
    model.share_memory()


def _mapped(model, folder):
    torch.save(model.state_dict(), folder / "weights.pt")
    model.load_state_dict(torch.load(folder / "weights.pt", mmap=True), assign=True)
    for layer in model.model.layers:  # a file of its own, as large as the weight
        weight = layer.mlp.down_proj.weight
        path = folder / "down.bin"
        weight.detach().numpy().tofile(path)
        mapped = torch.from_file(str(path), shared=False, size=weight.numel(), dtype=weight.dtype)
        layer.mlp.down_proj.weight = nn.Parameter(mapped.view(weight.shape), requires_grad=False)


@pytest.mark.usefixtures("graphs_as_rewritten")
@pytest.mark.parametrize("place", [_shared, _mapped])
def test_shared_memory_stays_shared(place, tmp_path):
    model, batch, plan = adapted()
    rana_fx.detach(model)
    place(model, tmp_path)
    before = {name: (weight.data_ptr(), weight.stride()) for name, weight in model.named_parameters()}
    rana_fx.attach(model, plan)
    for name, facts in before.items():
        weight = model.get_parameter(name)
        assert (weight.data_ptr(), weight.stride()) == facts, name
    (row,) = (row for row in rana_fx.explain(model, batch).rows if "down" in row.site)
    assert "masked kernel not used (its memory is shared with other processes or is a mapped file" in row.detail
    with measuring(model) as meter:
        expected = output(meter.run(batch))
    with torch.no_grad():
        assert relative(output(torch.compile(model, backend=rana_fx.backend)(**batch)), expected) < 1e-5
    rana_fx.detach(model)
    assert all(weight.data_ptr() == before[name][0] for name, weight in model.named_parameters())


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_a_model_made_in_inference_mode_has_the_plan_of_any_other():
    plans, outputs = [], []
    for mode in (True, False):
        torch.manual_seed(0)
        with torch.inference_mode(mode):
            model, batch = make(ARCHITECTURES["plain_llama"], 1)
        batches = [batch, *(ids() for _ in range(4))]
        before = dict(model.named_parameters())
        plans.append(rana_fx.adapt(model, batches, budget=0.7, progress=False))
        assert all(model.get_parameter(name) is weight for name, weight in before.items())
        assert all(weight.is_inference() == mode for weight in before.values())
        with torch.no_grad():
            outputs.append(output(torch.compile(model, backend=rana_fx.backend)(**batch)))
        rana_fx.detach(model)
        assert all(weight.is_inference() == mode for weight in before.values())
    assert plans[0].digest() == plans[1].digest() and not plans[0].notes()
    torch.testing.assert_close(*outputs)


def test_absent_weights_are_refused():
    model, batch, plan = adapted()
    rana_fx.detach(model)
    model.model.layers[0].mlp.up_proj.to("meta")
    site = "model.layers.0.mlp.up_proj"
    with pytest.raises(WeightAbsent, match=rf"its weight {site}.weight is on the meta device, .* is offloaded until"):
        rana_fx.adapt(model, [batch], progress=False)
    with pytest.raises(PlanMismatch, match=rf"{site}: got a weight without data \(on the meta device\), expected an ordinary"):
        rana_fx.attach(model, plan)


def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model, batch, _ = adapted()
    rana_fx.detach(model)
    accelerate.cpu_offload(model, "cpu")
    with pytest.raises(WeightAbsent, match="Expected all weights in memory; load the model without offloading"):
        rana_fx.adapt(model, [batch], progress=False)


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_hooks_that_move_inputs_alone_are_no_obstacle():
    accelerate = pytest.importorskip("accelerate")
    model, batch, plan = adapted()
    with measuring(model) as meter:
        expected = output(meter.run(batch))
    rana_fx.detach(model)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    again = rana_fx.adapt(model, [batch], budget=0.9, recipe="teal", progress=False)
    assert {site.name for site in again.sites} == {site.name for site in plan.sites}
    rana_fx.attach(model, plan)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        assert relative(output(torch.compile(model, backend=rana_fx.backend)(**batch)), expected) < 1e-5


class Tied(nn.Module):
    """Two linears of one Parameter, under two names, and one of another."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.b.weight = self.a.weight

    def forward(self, x):
        x = self.stem(x)
        x = x + self.a(x)
        x = x + self.c(x)
        return x + self.b(x)


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_a_weight_of_two_modules_is_one_linear_until_it_is_untied():
    model = Tied().requires_grad_(False)
    plan = rana_fx.adapt(model, [torch.randn(300, 16)], budget=0.6, recipe="static", progress=False)
    assert [site for adapter in plan.adapters for site in adapter.sites] == ["a", "c"]
    assert {record.name: record.uses for record in plan.sites}["a"] == 2
    adapters = {adapter.name: adapter for adapter in plan.adapters}

    def low_rank(name, x):
        return x @ adapters[name].router.t() @ adapters[name].weight

    def expected(x, last):
        x = model.stem(x)
        x = x + low_rank("a", x)
        x = x + low_rank("c", x)
        return x + last(x)

    x = torch.randn(3, 16)
    fast = torch.compile(model, backend=rana_fx.backend)
    torch.testing.assert_close(fast(x), expected(x, lambda h: low_rank("a", h)))
    model.b.weight = nn.Parameter(model.b.weight * 2, requires_grad=False)
    with pytest.warns(rana_fx.errors.RanaWarning, match="a: the plan is not applied here: its weight has other values"):
        got = fast(x)
    torch.testing.assert_close(got, expected(x, model.b))

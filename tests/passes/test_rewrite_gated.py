"""The pass for gated adapters: graphs that read only kept rows of up, unchanged values, and graphs that are not rewritten."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rana_fx
from rana_fx.apply import gate_mask
from rana_fx.evaluation.measure import measuring
from rana_fx.kernels.ops import masked_gemv, masked_rows
from rana_fx.passes.runner import run
from rana_fx.runtime.attachment import attached
from rana_fx.training import add_lora, lora_config
from tests.support.architectures import output
from tests.support.trained import EPS, adapted, gradients, relative

WIDTH, FFN = 16, 40


def plain(self, x):
    return F.silu(self.gate(x)) * self.up(x)


def other_order(self, x):
    return self.up(x) * F.silu(self.gate(x))


def by_method(self, x):
    return F.silu(self.gate(x)).mul(self.up(x))


def addmm(self, x):
    rows = x.view(-1, WIDTH)
    up = torch.addmm(self.bias, rows, self.up.weight.t())
    return F.silu(self.gate(x)) * up.view(*x.shape[:-1], FFN)


def mm(self, x):
    rows = x.reshape(-1, WIDTH)
    return F.silu(torch.mm(rows, self.gate.weight.t())).unsqueeze(0) * torch.mm(rows, self.up.weight.t()).view(1, -1, FFN)


def matmul(self, x):
    return F.silu(self.gate(x)) * torch.matmul(x, self.up.weight.mT).contiguous()


def stored_by_inputs(self, x):
    return F.silu(self.gate(x)) * torch.addmm(self.bias, x.view(-1, WIDTH), self.conv).view(*x.shape[:-1], FFN)


def two_factors(self, x):
    return F.silu(self.gate(x)) * (self.up(x) * 0.5)


def another_reader(self, x):
    up = self.up(x)
    return F.silu(self.gate(x)) * up, up.mean()


def in_place(self, x):
    return F.silu(self.gate(x)).mul_(self.up(x))


def input_written(self, x):
    x = x + 1
    up = self.up(x)
    gate = self.gate(x)
    x.mul_(0.5)
    return F.silu(gate) * up, x.mean()


def one_gate_for_all(self, x):
    return F.silu(self.gate(x[:, :1])) * self.up(x)


def more_dimensions(self, x):
    return F.silu(self.gate(x)).unsqueeze(0) * self.up(x)


def tokens_swapped(self, x):
    return F.silu(self.gate(x)) * self.up(x.transpose(0, 1)).transpose(0, 1)


SKIPS = {f.__name__: f for f in (plain, other_order, by_method, addmm, mm, matmul, stored_by_inputs, more_dimensions)}
LEFT = {f.__name__: f for f in (two_factors, another_reader, in_place, input_written, one_gate_for_all, tokens_swapped)}


class Mlp(nn.Module):
    """A gated MLP whose hidden rows are computed in one of the forms above."""

    def __init__(self, form, *, bias=False):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, FFN, bias=False), nn.Linear(WIDTH, FFN, bias=bias)
        self.down = nn.Linear(FFN, WIDTH)
        if form is stored_by_inputs:
            self.conv = nn.Parameter(torch.randn(WIDTH, FFN) / 4)
        self.bias = nn.Parameter(torch.randn(FFN))
        self.form = form

    def forward(self, x):
        hidden = self.form(self, x)
        hidden, more = hidden if isinstance(hidden, tuple) else (hidden, 0.0)
        return self.down(hidden.reshape(*x.shape[:-1], FFN)) + more


def batches(count=3, tokens=24):
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(2, tokens // 2, WIDTH, generator=generator)} for _ in range(count)]


def planned(form, **kwargs):
    """The MLP with a plan of recipe ``cats``, made for the plain form of the same weights where its own form is no MLP block."""
    model = Mlp(form, **kwargs)
    plan = rana_fx.adapt(model, batches(), budget=0.7, recipe="cats", progress=False)
    assert [adapter.kind for adapter in plan.adapters] == ["gated"]
    return model


def rewritten(model, batch):
    """(output, names of our operations and of linears in the rewritten graphs, linears replaced by the pass)."""
    seen, counts = [], []

    def look(gm, example_inputs):
        counts.append(run(gm, example_inputs).replaced["rewrite_gated"])
        seen.extend(gm.graph.nodes)
        return gm.forward

    torch.compiler.reset()
    got = output(torch.compile(model, backend=look)(**batch))
    return got, [node.target for node in seen], sum(counts)


def expected(model, x):
    """Output of the form in fp64 with its gate masked."""
    twin = copy.deepcopy(model).double()
    (tau,) = (value.double() for name, value in attached(model).factors.named_buffers() if name.endswith("tau"))
    silu = F.silu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "silu", lambda gate: torch.where(silu(gate).square() >= tau, silu(gate), 0.0))
        return twin(x.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", SKIPS)
def test_rows_of_up_are_skipped(name, bias):
    model, (batch, *_) = planned(SKIPS[name], bias=bias), batches()
    with torch.no_grad():
        got, targets, replaced = rewritten(model, batch)
        right = expected(model, batch["x"])
    assert replaced == 1
    assert (targets.count(masked_rows), targets.count(masked_gemv), targets.count(gate_mask)) == (1, 1, 1)
    # only the gate is a dense matmul
    assert sum(getattr(target, "__name__", target) in ("linear", "addmm", "mm", "matmul") for target in targets) == 1
    assert relative(got, right) < 100 * EPS
    with torch.no_grad():
        assert relative(model(**batch), right) > 1e-3


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_as_it_was(name):
    model, (batch, *_) = planned(plain), batches()
    model.form = LEFT[name]
    with torch.no_grad():
        got, targets, replaced = rewritten(model, batch)
        right = expected(model, batch["x"])
    assert (targets.count(masked_rows), targets.count(masked_gemv), replaced) == (0, 1, 1)
    assert targets.count(F.linear) == 2
    assert relative(got, right) < 100 * EPS


@pytest.mark.parametrize("depth", [1, 3])
def test_counts_per_layer(depth):
    model, batch = adapted("cats", depth=depth)
    with torch.no_grad():
        _, targets, replaced = rewritten(model, batch)
    assert replaced == targets.count(masked_rows) == targets.count(masked_gemv) == depth
    # q, k, v, o and the gate of every layer, and the head
    assert targets.count(F.linear) == 5 * depth + 1


def test_measured_as_before():
    """The measured counts equal the kept elements in the rewritten graph."""
    model, batch = adapted("cats", depth=1)
    with measuring(model) as meter:
        meter.run(batch)
    (adapter,) = attached(model).plan.adapters
    assert meter.result().density[adapter.name] == pytest.approx(adapter.density, abs=0.1)


def test_up_that_has_an_adapter_stays_its_own():
    model = planned(plain)
    plan = rana_fx.detach(model)
    teal = rana_fx.adapt(copy.deepcopy(model), batches(), budget=0.7, recipe="teal", progress=False)
    (up,) = (adapter for adapter in teal.adapters if adapter.name == "up")
    rana_fx.attach(model, replace(plan, adapters=(*plan.adapters, up)))
    with torch.no_grad():
        _, targets, replaced = rewritten(model, batches()[0])
    assert replaced == 1
    assert (targets.count(masked_rows), targets.count(masked_gemv)) == (0, 2)


def test_where_gradients_flow_up_is_dense_and_gradients_are_right():
    model, (batch, *_) = planned(plain, bias=True), batches()
    _, targets, _ = rewritten(model, batch)
    assert targets.count(masked_rows) == 0 and targets.count(F.linear) == 2
    double, x = copy.deepcopy(model).double(), batch["x"].double()
    seen = torch.compile(double, backend=lambda gm, given: run(gm, given) and gm.forward)(x)
    seen.square().mean().backward()
    got = {name: p.grad.clone() for name, p in double.named_parameters() if p.grad is not None}
    twin = copy.deepcopy(model)
    twin.zero_grad()
    silu, (tau,) = F.silu, (value for name, value in attached(model).factors.named_buffers() if name.endswith("tau"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "silu", lambda gate: torch.where(silu(gate).square() >= tau, silu(gate), 0.0))
        twin = twin.double()
        twin(x).square().mean().backward()
    for name, grad in got.items():
        assert relative(grad, dict(twin.named_parameters())[name].grad) < 1e-6, name


def test_frozen_weights_skip_with_gradients_enabled():
    model, (batch, *_) = planned(plain), batches()
    model.requires_grad_(False)
    assert rewritten(model, batch)[1].count(masked_rows) == 1


def test_autocast_multiplies_in_its_own_dtype():
    model, (batch, *_) = planned(plain, bias=True), batches()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, targets, _ = rewritten(model, batch)
    assert targets.count(masked_rows) == 1 and got.dtype == torch.bfloat16
    with torch.no_grad():
        right = expected(model, batch["x"])
    # a gate within rounding of the threshold may fall on either side
    assert relative(got, right) < 0.1


def test_lora_beside_up_is_gated_as_well():
    model, batch = adapted("cats", depth=1)
    add_lora(model, lora_config(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    loss, _ = gradients(model, torch.compile(model, backend=lambda gm, given: run(gm, given) and gm.forward), batch)
    with torch.no_grad():
        got, targets, _ = rewritten(model, batch)
    assert targets.count(masked_rows) == 1
    assert float(got.square().mean()) == pytest.approx(loss, rel=1e-5)


def test_a_graph_without_writes_is_not_searched_for_them(monkeypatch):
    """The search passes over the whole graph, for every block."""
    model, batch = adapted("cats", depth=2)
    module = importlib.import_module("rana_fx.passes.rewrite_gated")  # the package has the pass under this name
    monkeypatch.setattr(module, "Writes", lambda: pytest.fail("a search"))
    with torch.no_grad():
        assert rewritten(model, batch)[2] == 2

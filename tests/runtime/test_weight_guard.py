"""A function of a weight, compiled once, recompiles for another weight of the same shape, which has other factors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import Source

import rana_fx
from rana_fx._backend import rewritten
from rana_fx.errors import InvalidOption


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        return x + self.second(x)


class Part(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


FILTERS = {
    "none": torch.compiler.skip_all_guards_unsafe,
    "no modules": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
    "tensors": lambda guards: [guard.guard_type == "TENSOR_MATCH" for guard in guards],
    "no identity": lambda guards: [guard.guard_type != "ID_MATCH" for guard in guards],
}


@pytest.fixture
def planned():
    model = Residual().requires_grad_(False)
    return model, rana_fx.adapt(model, [torch.randn(200, 16)], budget=0.6, recipe="static", progress=False)


@pytest.mark.parametrize("given", ["attached", "option"])
@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_of_guards_keeps_the_identity_of_weights(planned, graphs_as_rewritten, name, given):
    model, plan = planned
    options = {"guard_filter_fn": FILTERS[name]}
    if given == "option":
        rana_fx.detach(model)
        options["plan"] = plan
    x = torch.randn(3, 16)
    for adapter, layer in zip(plan.adapters, (model.first, model.second), strict=True):
        part = Part(layer)
        part.compile(backend=rana_fx.backend, options=dict(options))  # PyTorch takes the filter out
        torch.testing.assert_close(part(x), x @ adapter.router.t() @ adapter.weight)


def test_a_cache_that_drops_guards_on_identity_is_refused(planned):
    with (
        torch._dynamo.config.patch(caching_precompile=True),
        pytest.raises(BackendCompilerFailed, match="caching_precompile=True is not valid: expected False") as caught,
    ):
        torch.compile(planned[0], backend=rewritten)(torch.randn(3, 16))
    assert isinstance(caught.value.inner_exception, InvalidOption)


def test_each_weight_runs_by_its_own_adapter(planned):
    model, plan = planned
    assert len(plan.adapters) == 2
    compiled = torch.compile(lambda x, weight: nn.functional.linear(x, weight), backend=rewritten)
    x = torch.randn(3, 16)
    for adapter, weight in zip(plan.adapters, (model.first.weight, model.second.weight), strict=True):
        torch.testing.assert_close(compiled(x, weight), x @ adapter.router.t() @ adapter.weight)


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_plan_for_a_part_outdates_the_code_of_the_whole(planned, graphs_as_rewritten, filtered, name):
    """Also where the weight that is guarded alone under a filter is none of the part."""
    model, _ = planned
    twin = Part(copy.deepcopy(getattr(model, name)))
    rana_fx.detach(twin)
    other = rana_fx.adapt(twin, [torch.randn(200, 16)], budget=0.3, recipe="static", progress=False)
    options = {"guard_filter_fn": FILTERS["no modules"]} if filtered else {}
    x = torch.randn(3, 16)
    compiled = torch.compile(model, backend=rana_fx.backend, options=options)
    first = compiled(x)
    rana_fx.attach(Part(getattr(model, name)), other)
    count = len(graphs_as_rewritten)
    got = compiled(x)
    assert len(graphs_as_rewritten) == count + 1
    torch.compiler.reset()
    torch.testing.assert_close(got, torch.compile(model, backend=rana_fx.backend)(x))
    assert not torch.allclose(got, first)


def test_under_a_filter_one_weight_of_a_module_is_guarded(planned, monkeypatch):
    model, _ = planned
    seen = []
    make = Source.make_guard

    def made(source, kind):
        seen.append(str(source.name() if callable(source.name) else source.name))
        return make(source, kind)

    monkeypatch.setattr(Source, "make_guard", made)
    counts = []
    for options in ({}, {"guard_filter_fn": FILTERS["no modules"]}):
        torch.compiler.reset()
        seen.clear()
        torch.compile(model, backend=rewritten, options=options)(torch.randn(3, 16))
        counts.append(sum(text.endswith("._rana_fx") for text in seen))
    assert counts == [3, 1]

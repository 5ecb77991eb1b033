"""A function of a weight, compiled once, recompiles for another weight of the same shape, which has other factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

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

"""Where a plan cannot be applied: a warning for each cause, an error under ``strict``, a line in ``explain``."""

from __future__ import annotations

import copy
import importlib
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

import rana_fx
from rana_fx import RanaWarning
from rana_fx.errors import FactorsCalled, InvalidOption, NotApplied
from rana_fx.kernels.ops import masked_gemv, router
from tests.support.adapted import relative
from tests.support.gated_blocks import FFN, WIDTH, Mlp, X, compiled, planned_model
from tests.support.oracle import masked

pytestmark = pytest.mark.usefixtures("graphs_as_rewritten")

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def model():
    return planned_model()


def normed(h):
    return F.rms_norm(h, (FFN,))


def test_one_warning_for_all_layers_with_one_cause(model):
    for block in model.blocks:
        block.between = normed
    with pytest.warns(
        RanaWarning, match=r"blocks.0.down \(and 1 more\): the plan is not applied here: .* it runs dense\."
    ) as seen:
        got = compiled(model)(X)
    assert len(seen) == 1
    assert "options={'strict': True} makes this an error" in str(seen[0].message)
    torch.testing.assert_close(got, model(X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compiler.reset()
        compiled(model)(X)  # said before


def test_strict_is_an_error(model):
    model.blocks[1].between = normed
    with pytest.raises(BackendCompilerFailed, match=r"blocks\.1\.down: the plan is not applied here") as caught:
        compiled(model, strict=True)(X)
    assert isinstance(caught.value.inner_exception, NotApplied)
    assert caught.value.inner_exception.facts["site"] == "blocks.1.down"
    model.blocks[1].between = lambda h: h
    torch.compiler.reset()
    assert compiled(model, strict=True)(X).shape == (2, 3, 5)


def test_strict_is_true_or_false(model):
    with pytest.raises(BackendCompilerFailed, match="option strict='yes' is not valid: expected True or False") as caught:
        compiled(model, strict="yes")(X)
    assert isinstance(caught.value.inner_exception, InvalidOption)


@pytest.mark.parametrize("prefill", ["dense", "cheapest"])
def test_what_was_asked_for_is_no_warning(model, prefill):
    x = torch.randn(40, WIDTH)
    with torch.no_grad():
        got = compiled(model, prefill=prefill, strict=True)(x)
    assert prefill != "dense" or torch.equal(got, model(x))


def test_parts_without_a_plan_of_a_model_with_one(model):
    """A graph break in front of the head: a graph whose linear nobody adapted."""
    whole = compiled(model)(X)
    forward = model.head.forward

    def head(x):
        torch._dynamo.graph_break()
        return forward(x)

    torch.compiler.reset()
    model.head.forward = head
    torch.testing.assert_close(compiled(model, strict=True)(X), whole)


def test_a_plan_that_knows_no_weight_of_a_graph(model):
    plan, other = rana_fx.detach(model), nn.Linear(WIDTH, WIDTH)
    with pytest.warns(RanaWarning, match="the plan knows none of the weights in this graph: it runs dense"):
        got = compiled(other, plan=plan)(X)
    torch.testing.assert_close(got, other(X))
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match="the plan knows none"):
        compiled(other, plan=plan, strict=True)(X)


def test_explain_lists_what_would_not_be_applied(model):
    assert rana_fx.explain(model, (X,)).notes == ()
    model.blocks[1].between = normed
    report = rana_fx.explain(model, (X,))  # and warns of nothing
    assert len(report.notes) == 1 and report.notes[0].startswith("blocks.1.down: the plan is not applied here: its input is not")
    assert f"note: {report.notes[0]}" in " ".join(str(report).split())


def test_explain_lists_what_a_batch_does_not_reach(model):
    model.blocks[1].forward = lambda x: x
    assert rana_fx.explain(model, (X,)).notes == ("blocks.1.down: the plan is not applied here: no graph of this batch has it",)


class Low(nn.Module):
    """``down(relu(up(x)))`` beside a residual; ``shape``: what up reads x as."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x):
        x = self.stem(x)
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture
def low():
    torch.manual_seed(0)
    model = Low().requires_grad_(False)
    plan = rana_fx.adapt(model, [torch.randn(200, WIDTH)], budget=0.6, recipe="static", progress=False)
    assert len(plan.adapters) == 2
    return model, plan


def static(plan):
    """For hooks: what each linear of a static plan makes of its input, in fp64."""
    return {a.sites[0]: (lambda x, a=a: x.double() @ a.router.double().t() @ a.weight.double()) for a in plan.adapters}


def by_hand(model, plan, x):
    twin = copy.deepcopy(model).double()
    rana_fx.detach(twin)
    functions = static(plan)
    with masked(twin, functions):
        return twin(x.double())


def test_operations_that_refuse_a_tensor_leave_it_dense(low, monkeypatch):
    model, plan = low
    rewriting = importlib.import_module("rana_fx.passes.rewrite_adapter")
    apply = rewriting.apply

    def refuse(adapter, tensors, x, targets, **kwargs):
        outs = apply(adapter, tensors, x, targets, **kwargs)
        if adapter.sites == ("up",):
            torch._check(False, lambda: "no tensors of this kind\nand more")
        return outs

    monkeypatch.setattr(rewriting, "apply", refuse)
    with pytest.warns(RanaWarning, match=r"up: .*does not take what it reads here \(no tensors of this kind\): it runs dense"):
        got = compiled(model)(X)
    monkeypatch.undo()
    only_down = replace(plan, adapters=tuple(a for a in plan.adapters if a.sites == ("down",)))
    assert relative(got, by_hand(model, only_down, X)) < 100 * EPS
    assert relative(got, by_hand(model, plan, X)) > 1e-3


def test_a_model_may_call_our_operations_itself(low):
    model, plan = low
    b, w = torch.randn(8, WIDTH), torch.randn(8, WIDTH)

    def function(x):
        return model(x) + masked_gemv(router(x, b), torch.zeros(8), w)

    got = torch.compile(function, backend=rana_fx.backend)(X)
    assert relative(got - X @ b.t() @ w, by_hand(model, plan, X)) < 1e-4


def test_a_region_that_is_not_entered_is_said(low):
    model, plan = low

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            h = torch.relu(model.up(x))
            return torch.cond(x.sum() > 0, lambda h: model.down(h), lambda h: model.down(h) * 2, (h,))

    with pytest.warns(RanaWarning, match="down: .* inside cond, whose graphs are not rewritten"):
        got = torch.compile(Conditional(), backend=rana_fx.backend)(X)
    up = static(plan)["up"](X).float() + model.up.bias
    right = model.down(torch.relu(up)) * (1 if X.sum() > 0 else 2)
    assert relative(got, right) < 100 * EPS


# ---- weights that no graph shows as they are


def test_a_transposed_use_alone_is_dense(model):
    """As in the backward pass of a linear in code of its own: an adapter stands for x @ W.T, and not for g @ W."""
    weight, g = model.blocks[0].up.weight, torch.randn(3, FFN, generator=torch.Generator().manual_seed(2))
    rana_fx.detach(model)
    rana_fx.adapt(model, [torch.randn(64, WIDTH) for _ in range(3)], budget=0.7, recipe="teal", progress=False)
    with pytest.warns(RanaWarning, match=r"blocks\.0\.up: .*multiplied the other way round"):
        got = torch.compile(lambda g: g @ weight, backend=rana_fx.backend)(g)
    assert torch.equal(got, g @ weight)


def test_a_sequential_model():
    """``nn.Sequential`` calls all of its parts in turn, the factors as well."""
    torch.manual_seed(0)
    model = nn.Sequential(Mlp(), Mlp()).requires_grad_(False)
    dense = model(X)
    plan = rana_fx.adapt(model, [torch.randn(64, WIDTH) for _ in range(3)], budget=0.7, recipe="static", progress=False)
    got = compiled(model)(X)
    assert torch.equal(model(X), dense) and relative(got, dense) > 1e-3
    rana_fx.detach(model)
    by_name = nn.ModuleDict({"0": model[0], "1": model[1]})
    by_name.forward = lambda x: by_name["1"](by_name["0"](x))
    rana_fx.attach(by_name, plan)
    torch.testing.assert_close(got, compiled(by_name)(X))


def test_a_loop_over_all_parts_is_refused(model):
    model.forward = lambda x: [part(x) for part in model.children()]
    with pytest.raises(FactorsCalled, match=r"Model: .*the model calls all of its parts in turn \(self\.children\(\)\)"):
        model.rana_fx(X)

"""An adapted model stays adapted however often it is compiled, and what was compiled for an earlier attachment does not count."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx import RanaWarning
from rana_fx._backend import rewritten
from tests.support.trained import relative

EPS = torch.finfo(torch.float32).eps


class Model(nn.Module):
    """A linear that a plan adapts, behind a stem; ``variant`` is a constant to Dynamo: each value is compiled by itself."""

    def __init__(self):
        super().__init__()
        self.stem, self.linear = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, variant=""):
        x = self.stem(x)
        return x + self.linear(x) * len(variant)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    rana_fx.adapt(model, [(torch.randn(200, 16), "a")], budget=0.6, recipe="static", progress=False)
    return model


@pytest.fixture
def as_users_have_it():
    """The limit is no error, as it is in these tests otherwise."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False, recompile_limit=3):
        yield


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def by_hand(model, plan, variant):
    (adapter,) = plan.adapters
    x = model.stem(X).double()
    y = x @ adapter.router.double().t() @ adapter.weight.double() + adapter.bias.double()
    return x + y * len(variant)


def variants(number):
    return ["a" * (count + 1) for count in range(number)]


def entries():
    return torch._C._dynamo.eval_frame._debug_get_cache_entry_list(Model.forward.__code__)


@pytest.mark.usefixtures("as_users_have_it")
def test_more_variants_than_the_limit_are_adapted_and_said(model):
    plan = rana_fx.detach(model)
    rana_fx.attach(model, plan)
    fast = torch.compile(model, backend=rewritten)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RanaWarning)
        for variant in variants(3):
            fast(X, variant)
    with pytest.warns(
        RanaWarning, match=r"Model\.forward .* for the 4th time, which is more than .*recompile_limit \(3\)"
    ) as seen:
        for variant in variants(9)[3:]:
            assert (
                relative(fast(X, variant), by_hand(model, plan, variant))
                < 100 * EPS
                < relative(model(X, variant), by_hand(model, plan, variant))
            )
    assert len(seen) == 1 and len(entries()) == 9
    assert relative(fast(X, "aa"), by_hand(model, plan, "aa")) < 100 * EPS  # an early one


def test_where_the_limit_is_an_error_it_stays_one(model):
    fast = torch.compile(model, backend=rewritten)
    with torch._dynamo.config.patch(recompile_limit=2):
        for variant in variants(2):
            fast(X, variant)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            fast(X, "aaa")


@pytest.mark.usefixtures("as_users_have_it")
def test_the_last_variant_says_what_to_raise(model):
    plan = rana_fx.detach(model)
    rana_fx.attach(model, plan)
    fast = torch.compile(model, backend=rewritten)
    with torch._dynamo.config.patch(accumulated_recompile_limit=3), pytest.warns(RanaWarning) as seen:
        for variant in variants(3):
            assert relative(fast(X, variant), by_hand(model, plan, variant)) < 100 * EPS
            assert len(seen) == (variant == "aaa")
    assert "This is the last" in str(seen[0].message) and "torch._dynamo.config.accumulated_recompile_limit (3)" in str(
        seen[0].message
    )


@pytest.mark.usefixtures("as_users_have_it")
def test_attaching_again_leaves_nothing_behind(model):
    plan = rana_fx.detach(model)
    fast = torch.compile(model, backend=rewritten)
    gone = []
    for _ in range(6):
        rana_fx.attach(model, plan)
        gone.append(weakref.ref(model.rana_fx))
        assert relative(fast(X, "a"), by_hand(model, plan, "a")) < 100 * EPS
        assert len(entries()) == 1
    rana_fx.detach(model)
    assert entries() == []
    gc.collect()
    assert [reference() for reference in gone] == [None] * 6  # factors are not kept by code that nobody calls


@pytest.mark.usefixtures("as_users_have_it")
def test_another_model_of_the_class_keeps_its_code(model):
    torch.manual_seed(1)
    other = Model().requires_grad_(False)
    plan = rana_fx.adapt(other, [(torch.randn(200, 16), "a")], budget=0.6, recipe="static", progress=False)
    calls = []

    def counting(gm, example_inputs):
        calls.append(gm)
        return rewritten(gm, example_inputs)

    fast, mine = torch.compile(other, backend=counting), rana_fx.detach(model)
    expected = fast(X, "a")
    for _ in range(4):
        rana_fx.attach(model, mine)
        torch.compile(model, backend=rewritten)(X, "a")
    assert torch.equal(fast(X, "a"), expected) and len(calls) == 1
    assert relative(expected, by_hand(other, plan, "a")) < 100 * EPS

"""What is around a call of ``adapt``, or odd about its batches: autocast, transforms, seeds, no tokens, NaN, foreign weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rana_fx
from rana_fx._backend import rewritten
from rana_fx.errors import InvalidOption, NonFinite


class Mlp(nn.Module):
    def __init__(self, product=F.linear):
        super().__init__()
        self.up, self.down, self.product = nn.Linear(16, 32), nn.Linear(32, 16), product

    def forward(self, x):
        return x + self.down(F.silu(self.product(x, self.up.weight)))


def model_of(product=F.linear):
    torch.manual_seed(0)
    return Mlp(product).eval()


def batches(count=10):
    return [torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def adapted(product=F.linear, *, recipe="teal", given=None, **options):
    model = model_of(product)
    return model, rana_fx.adapt(model, given or batches(), budget=0.7, recipe=recipe, progress=False, **options)


@pytest.mark.parametrize("recipe", ["paper", "static", "teal", "rana"])
def test_recipes_compute_without_autocast(recipe):
    given, outputs = batches(), []
    _, expected = adapted(recipe=recipe)
    with torch.autocast("cpu", torch.bfloat16):
        model = model_of()
        model.register_forward_hook(lambda _, __, output: outputs.append(output.dtype))
        plan = rana_fx.adapt(model, given, budget=0.7, recipe=recipe, progress=False)
        assert torch.is_autocast_enabled("cpu")
    assert [adapter.sites for adapter in plan.adapters] == [adapter.sites for adapter in expected.adapters]
    for ours, theirs in zip(plan.adapters, expected.adapters, strict=True):
        assert ours.tau.dtype == theirs.tau.dtype
        if recipe in ("static", "teal"):  # its input is the same: the first linear reads the batch itself
            torch.testing.assert_close(ours.tau, theirs.tau, rtol=0.05, atol=0.05)


def nested(x, w):
    return torch.vmap(torch.vmap(lambda row: F.linear(row, w)))(x)


TRANSFORMS = {
    "vmap": lambda x, w: torch.vmap(lambda rows: F.linear(rows, w))(x),
    "vmap over another dimension": lambda x, w: torch.vmap(lambda rows: F.linear(rows, w), in_dims=1, out_dims=1)(x),
    "vmap of vmap": nested,
    "jvp": lambda x, w: torch.func.jvp(lambda y: F.linear(y, w), (x,), (torch.ones_like(x),))[0],
}


@pytest.mark.parametrize("recipe", ["teal", "rana"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_runs_inside_of_a_transform_is_calibrated(name, recipe):
    if name == "jvp" and recipe == "rana":
        pytest.skip("its simulation takes gradients, which duals of forward mode do not have")
    model, plan = adapted(TRANSFORMS[name], recipe=recipe)
    _, plain = adapted(recipe=recipe)
    assert [adapter.sites for adapter in plan.adapters] == [adapter.sites for adapter in plain.adapters]
    for ours, theirs in zip(plan.adapters, plain.adapters, strict=True):
        # another order of the same rows, in sums that end a search
        torch.testing.assert_close(ours.tau, theirs.tau, rtol=0.05, atol=1e-3)
    torch.compiler.reset()
    x = batches(1)[0]
    with torch.no_grad():
        got = torch.compile(model, backend=rewritten)(x)
        model.product = F.linear
        torch.compiler.reset()
        torch.testing.assert_close(got, torch.compile(model, backend=rewritten)(x))


@pytest.mark.parametrize("seed", [1.5, "a", None, True, 2**63])
def test_seeds_that_are_none(seed):
    with pytest.raises(InvalidOption, match=r"option seed=.* is not valid: expected an integer of 64 bits"):
        adapted(seed=seed)


def test_a_batch_without_tokens_does_not_judge():
    given = batches()
    given[7] = torch.zeros(0, 8, 16)
    _, plan = adapted(recipe="rana", given=given)
    assert plan.expected_budget("flops") == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize("place", [0, 7, 9])
def test_a_batch_that_is_not_finite_is_refused_wherever_it_is(place):
    given = batches()
    given[place][1, 2, 3] = float("nan")
    with pytest.raises(NonFinite, match="up: 16 NaN or Inf values in its input activations|up: 1 NaN or Inf values"):
        adapted(recipe="rana", given=given)


class WithPlainList(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.rest = Mlp(), [Mlp()]

    def forward(self, x):
        return self.rest[0](self.first(x))


def test_weights_that_no_module_registers_are_skipped():
    torch.manual_seed(0)
    model = WithPlainList().eval()
    plan = rana_fx.adapt(model, batches(), budget=0.7, recipe="teal", progress=False)
    assert {site for adapter in plan.adapters for site in adapter.sites} == {"first.up", "first.down"}
    assert [skip.reason.partition(":")[0] for skip in plan.left].count("its weight is no Parameter of the model") == 2


class TiedWithTwoBiases(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Mlp(), Mlp()
        self.second.up.weight = self.first.up.weight

    def forward(self, x):
        first, second = self.first, self.second
        x = x + first.down(F.silu(first.up(x)))
        return x + second.down(F.silu(second.up(x)))


def test_one_weight_with_two_biases_is_skipped():
    torch.manual_seed(0)
    model = TiedWithTwoBiases().eval()
    plan = rana_fx.adapt(model, batches(), budget=0.8, recipe="static", progress=False)
    assert {site for adapter in plan.adapters for site in adapter.sites} == {"first.down", "second.down"}
    reasons = {skip.site: skip.reason for skip in plan.left}
    assert reasons["first.up"] == "its weight is used with different biases, and one adapter cannot serve both"
    model.second.up.bias = model.first.up.bias
    rana_fx.detach(model)
    plan = rana_fx.adapt(model, batches(), budget=0.8, recipe="static", progress=False)
    assert {site for adapter in plan.adapters for site in adapter.sites} == {"first.up", "first.down", "second.down"}

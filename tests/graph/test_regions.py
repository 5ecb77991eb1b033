"""Linears in graphs that an operator calls: inlined and adapted where the region runs once, reported where it does not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rana_fx
from rana_fx import RanaWarning
from rana_fx._backend import rewrite
from rana_fx.calibration.calibrate import calibrate


class Block(nn.Module):
    """An MLP in whose forward pass ``product`` computes gate and up."""

    def __init__(self, product=F.linear):
        super().__init__()
        self.gate, self.up = nn.Linear(8, 24, bias=False), nn.Linear(8, 24, bias=False)
        self.down, self.product = nn.Linear(24, 8, bias=False), product

    def forward(self, x):
        return x + self.down(F.silu(self.product(x, self.gate.weight)) * self.product(x, self.up.weight))


class Derivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, w):
        ctx.save_for_backward(a, w)
        return a @ w.t()

    @staticmethod
    def backward(ctx, g):
        a, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).t() @ a.flatten(0, -2)


class Transposed(Derivative):
    """Dynamo computes ``w.T`` outside of the forward pass, which then gets both ``w`` and ``w.T``."""

    @staticmethod
    def forward(ctx, a, w):
        ctx.save_for_backward(a, w)
        return a @ w.T


class TransposedAlone(torch.autograd.Function):
    """The same, in the newer form, and the backward pass saves ``w.T`` alone."""

    @staticmethod
    def forward(a, w):
        return a @ w.mT

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004
        ctx.save_for_backward(inputs[0], inputs[1].mT)

    @staticmethod
    def backward(ctx, g):
        a, w = ctx.saved_tensors
        return g @ w.mT, g.flatten(0, -2).t() @ a.flatten(0, -2)


class TransposedAndReversed(Transposed):
    @staticmethod
    def backward(ctx, g):
        a, w = ctx.saved_tensors
        return g @ w, -g.flatten(0, -2).t() @ a.flatten(0, -2)


class Frozen(Derivative):
    @staticmethod
    def backward(ctx, g):
        return g @ ctx.saved_tensors[1], None


class Clipped(Derivative):
    @staticmethod
    def backward(ctx, g):
        a, w = ctx.saved_tensors
        return (g @ w).clamp(-10, 10), g.flatten(0, -2).t() @ a.flatten(0, -2)


class Reversed(Derivative):
    @staticmethod
    def backward(ctx, g):
        a, w = ctx.saved_tensors
        return -g @ w, g.flatten(0, -2).t() @ a.flatten(0, -2)


class Random(Derivative):
    @staticmethod
    def forward(ctx, a, w):
        ctx.save_for_backward(a, w)
        return F.dropout(a @ w.t(), 0.5)


class Counted(torch.autograd.Function):
    """Two results, one of them not differentiable, and an input that is no tensor."""

    @staticmethod
    def forward(ctx, a, w, scale):
        ctx.save_for_backward(a, w)
        ctx.scale = scale
        y = (a @ w.t()) * scale
        signs = (y > 0).sum(-1)
        ctx.mark_non_differentiable(signs)
        return y, signs

    @staticmethod
    def backward(ctx, g, _):
        a, w = ctx.saved_tensors
        g = g * ctx.scale
        return g @ w, g.flatten(0, -2).t() @ a.flatten(0, -2), None


def counted(a, w):
    y, signs = Counted.apply(a, w, 0.5)
    return y * 2 + 0 * signs.unsqueeze(-1)


def planned(product=F.linear):
    torch.manual_seed(0)
    model = Block(product).eval()
    plan = rana_fx.adapt(model, [torch.randn(2, 16, 8) for _ in range(4)], budget=0.7, recipe="static", progress=False)
    assert {site for adapter in plan.adapters for site in adapter.sites} == {"gate", "up", "down"}
    return model


def trained(model, results, **settings):
    """(output, gradients of everything trainable) of a model compiled with gradients, as its graph is rewritten."""

    def backend(gm, inputs):
        results.append(rewrite(gm, inputs))
        return gm.forward

    torch.compiler.reset()
    model.zero_grad()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = torch.compile(model, backend=backend, **settings)(x)
    out.square().sum().backward()
    return out.detach(), {"x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(one, other):
    assert one[1].keys() == other[1].keys()
    for got, expected in zip((one[0], *one[1].values()), (other[0], *(other[1][name] for name in one[1])), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "product",
    [Derivative.apply, counted, Transposed.apply, TransposedAlone.apply],
    ids=["one result", "two results", "transposed", "transposed alone"],
)
def test_a_function_is_trained_as_it_is_served(product):
    results, model = [], planned(product)
    plain = copy.deepcopy(model)
    plain.product = F.linear
    got = trained(model, results)
    assert not results[0].matches.declined and results[0].replaced["rewrite_adapter"] == 3
    assert any("rana_fx" in name for name in got[1])
    same(got, trained(plain, results))
    with torch.no_grad():
        torch.compiler.reset()
        served = torch.compile(model, backend=rana_fx._backend.rewritten)(
            torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
        )
    torch.testing.assert_close(served, got[0])


def test_a_weight_that_gets_no_gradient_gets_none():
    results, model = [], Block(Frozen.apply)
    rana_fx.adapt(model, [torch.randn(2, 16, 8) for _ in range(4)], budget=0.9, recipe="teal", progress=False)
    plain = copy.deepcopy(model)
    plain.product = lambda x, w: F.linear(x, w.detach())
    got = trained(model, results)
    assert not results[0].matches.declined and "gate.weight" not in got[1] and "down.weight" in got[1]
    same(got, trained(plain, results))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (Clipped, "not the derivative"),
        (Reversed, "not the derivative"),
        (TransposedAndReversed, "not the derivative"),
        (Random, "not the same each time"),
    ],
)
def test_another_backward_pass_stays_and_its_linears_are_reported(function, reason):
    model = planned()
    model.product, results = function.apply, []
    state = torch.random.get_rng_state()
    with pytest.warns(RanaWarning, match="gate .and 1 more.: the plan is not applied here: inside autograd_function_apply"):
        _, gradients = trained(model, results)
    (found,) = results
    assert torch.equal(torch.random.get_rng_state(), state) or function is Random
    assert [declined.where for declined in found.matches.declined] == ["gate", "up"]
    assert any(reason in declined.reason for _, declined in found.declined)
    assert found.replaced["rewrite_adapter"] == 1 and "gate.weight" in gradients


def test_a_function_without_linears_stays():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            return a * 2

        @staticmethod
        def backward(ctx, g):
            return g * 3

    model, results = planned(lambda x, w: Double.apply(F.linear(x, w))), []
    out, gradients = trained(model, results)
    assert results[0].replaced["rewrite_adapter"] == 3
    plain = copy.deepcopy(model)
    plain.product = lambda x, w: 2 * F.linear(x, w)
    other, expected = trained(plain, results)
    torch.testing.assert_close(out, other)
    assert (gradients["x"] - expected["x"]).norm() > 0.1 * expected["x"].norm()


NESTED = torch.compiler.nested_compile_region(lambda x, w: F.linear(x, w))
ONCE = {
    "checkpoint": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False),
    "checkpoint, reentrant": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=True),
    "checkpoint around a Function": lambda x, w: checkpoint(Derivative.apply, x, w, use_reentrant=False),
    "nested_compile_region": lambda x, w: NESTED(x, w),
    "nested_compile_region in a checkpoint": lambda x, w: checkpoint(NESTED, x, w, use_reentrant=False),
}


@pytest.mark.parametrize("name", ONCE)
def test_regions_that_run_once_are_adapted(name):
    results, model = [], planned(ONCE[name])
    plain = copy.deepcopy(model)
    plain.product = F.linear
    got = trained(model, results)
    assert not results[0].matches.declined and results[0].replaced["rewrite_adapter"] == 3
    same(got, trained(plain, results))


def looped(x, w):
    def step(count, y):
        return count + 1, F.linear(y, w)[..., :8].contiguous()

    return torch._higher_order_ops.while_loop(lambda count, _: count < 2, step, (torch.tensor(0), x))[1]


def scanned(x, w):
    from torch._higher_order_ops.scan import scan

    return scan(lambda carry, row: (carry + F.linear(row, w)[..., :8], F.linear(row, w)), x[0], x)[1]


def mapped(x, w):
    from torch._higher_order_ops.map import map

    return map(lambda row, w: F.linear(row, w), x, w)


MANY = {
    "cond": lambda x, w: torch.cond(x.sum() > 0, lambda a: F.linear(a, w), lambda a: F.linear(a, -w), (x,)),
    "while_loop": looped,
    "scan": scanned,
    "map_impl": mapped,
}


@pytest.mark.parametrize("name", MANY)
def test_regions_that_run_at_will_are_reported(name):
    class Model(Block):
        def __init__(self):
            super().__init__()
            self.inside, self.unread = nn.Linear(8, 24, bias=False), nn.Linear(8, 24, bias=False)

        def forward(self, x):
            return super().forward(x) + MANY[name](x, self.inside.weight).mean() + self.unread.weight.sum()

    layout = calibrate(Model(), [torch.randn(2, 3, 8)], progress=False).layout
    assert set(layout.sites) == {"gate", "up", "down"}
    assert {skip.site: skip.reason for skip in layout.skips} == {"inside": f"inside {name}, whose graphs are not rewritten"}

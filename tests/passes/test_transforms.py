"""Transforms of torch.func inside a compiled function: the plan is applied, by operations that every transform knows.

The reference is the plan's formulas in fp64, transformed in eager mode.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import rana_fx
from rana_fx._backend import rewritten
from rana_fx.graph.transforms import is_wrapped, plain, transformed
from rana_fx.kernels.ops import masked_gemv, masked_rows, router
from rana_fx.passes.decompose_transformed import decompose_transformed
from rana_fx.passes.runner import run

EPS = torch.finfo(torch.float32).eps
WIDTH, FFN = 16, 40


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@functools.cache
def adapted(recipe):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mlp().eval()
        plan = rana_fx.adapt(model, [torch.randn(8, 20, WIDTH) for _ in range(8)], budget=0.6, recipe=recipe, progress=False)
    return model, plan


def reference(recipe):
    """The adapted model as a function in fp64."""
    model, plan = adapted(recipe)

    def linear(name, x):
        own, made = model.get_submodule(name), plan.adapter_of(name)
        if made is None or made.kind == "gated":
            return F.linear(x, own.weight.double(), own.bias.double())
        assert made.kind in ("rank", "neuron") and made.router_tau is None and made.exact_tau is None
        v = x if made.router is None else F.linear(x, made.router.double())
        v = v if made.shift is None else v - made.shift.double()
        v = torch.where(v.square() >= made.tau.double(), v, 0.0)
        bias = own.bias if made.bias is None else made.bias
        return v @ (own.weight.double().t() if made.weight is None else made.weight.double()) + bias.double()

    def forward(x):
        a = F.silu(linear("gate", x))
        cut = plan.adapter_of("down")
        if cut is not None and cut.kind == "gated":
            a = torch.where(a.square() >= cut.tau.double(), a, 0.0)
        return x + linear("down", a * linear("up", x))

    return forward


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS = {
    "grad": lambda f, x: grad(lambda z: f(z).square().sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(x))[0],
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f, x: jacrev(f)(x[0, 0]),
    "jacfwd": lambda f, x: jacfwd(f)(x[0, 0]),
    "hessian": lambda f, x: hessian(lambda z: f(z).square().sum())(x[0, 0]),
    "vmap": lambda f, x: vmap(f, in_dims=1, out_dims=1)(x),
    "gradients by sample": lambda f, x: vmap(grad(lambda z: f(z).square().sum()))(x),
    "dual numbers": dual,
}


def close(got, right):
    # sums of at most 40 products, twice over, and their second derivatives
    assert (got.double() - right).abs().max() <= 1000 * EPS * right.abs().max()


@pytest.mark.parametrize("recipe", ["paper", "cats"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_plan_is_applied_under_a_transform(name, recipe):
    model, _ = adapted(recipe)
    x = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    transform, left = TRANSFORMS[name], []

    def look(gm, example_inputs):
        forward = rewritten(gm, example_inputs)
        left.extend(node for node in gm.graph.nodes if node.target in (masked_gemv, masked_rows, router))
        return forward

    torch._dynamo.reset()
    got = torch.compile(lambda x: transform(model, x), backend=look)(x)
    close(got, transform(reference(recipe), x.double()))
    assert not left
    assert (got - transform(model, x)).abs().max() > 0.01 * got.abs().max()  # the dense model's is another


@pytest.mark.parametrize("names", [("grad", "jvp"), ("vmap",)], ids=" and ".join)
def test_inductor_compiles_what_a_transform_makes_of_it(names):
    model, _ = adapted("paper")
    x, transforms = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(1)), [TRANSFORMS[name] for name in names]
    torch._dynamo.reset()
    with torch.set_grad_enabled(names != ("vmap",)):
        found = torch.compile(lambda x: [transform(model, x) for transform in transforms], backend=rana_fx.backend)(x)
    for got, transform in zip(found, transforms, strict=True):
        close(got.detach(), transform(reference("paper"), x.double()))


def test_outside_of_the_transform_rows_are_skipped_as_ever():
    model, _ = adapted("paper")
    seen = []

    def look(gm, example_inputs):
        run(gm, example_inputs)
        inside = transformed(gm.graph)
        seen.extend((node in inside, node.target) for node in gm.graph.nodes if node.target in (masked_gemv, router))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: vmap(model)(x) + model(x), backend=look)(torch.ones(3, 4, WIDTH))
    assert [inside for inside, _ in seen] == [False] * len(seen) and sum(target is masked_gemv for _, target in seen) == 3


def test_weights_that_a_transform_differentiates_are_declined():
    """The gradient by a replaced weight is zero; the dense linear has one, and it is said."""
    model, _ = adapted("paper")
    parameters, x, declined = dict(model.named_parameters()), torch.ones(3, WIDTH), []

    def look(gm, example_inputs):
        declined.extend(run(gm, example_inputs).declined)
        return gm.forward

    def gradient(parameters, x):
        return grad(lambda given: functional_call(model, given, (x,)).sum())(parameters)["gate.weight"]

    torch._dynamo.reset()
    got = torch.compile(gradient, backend=look)(parameters, x)
    torch.testing.assert_close(got, gradient(parameters, x))
    found = {(name, place.where) for name, place in declined if "torch.func" in place.reason}
    assert found == {(decompose_transformed.__name__, name) for name in ("gate", "up", "down")}


def test_a_plain_value_stands_for_a_wrapped_one():
    seen = []

    def look(x):
        seen.append(x)
        return x

    vmap(grad(lambda x: look(x).sum()), in_dims=1)(torch.ones(2, 5, 4, dtype=torch.float64))
    (made, number) = plain((seen[0], 3))
    assert is_wrapped(seen[0]) and not is_wrapped(made) and number == 3
    assert made.shape == (2, 4) and made.dtype == torch.float64 and made.requires_grad
    assert plain(made) is made

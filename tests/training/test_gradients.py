"""Gradients of an adapted model: which parameters have one, and comparison with a reference model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx._backend import rewritten
from rana_fx.errors import NoPlan, NothingToTrain, UnknownChoice
from rana_fx.runtime.attachment import attached, invalidate_guards
from rana_fx.training import add_lora, lora_config, trainable
from tests.support.architectures import build, ids
from tests.support.gates import per_neuron
from tests.support.trained import EPS, adapted, compiled, gradients, relative


class Site(nn.Module):
    """One linear of an adapter by the paper's formula, independent of graph rewriting."""

    def __init__(self, adapter, factors, index, span, linear):
        super().__init__()
        self.span, self.masked = span, adapter.weight is not None
        self.linear = linear
        self.factors, self.index = [factors], index

    def forward(self, x):
        factor = lambda key: getattr(self.factors[0], f"a{self.index}_{key}", None)  # noqa: E731
        v = x if factor("router") is None else x @ factor("router").t()
        v = v * (v.detach().float().square() >= factor("tau")).to(v.dtype)
        if not self.masked:
            return v @ self.linear.weight.t() + (0 if self.linear.bias is None else self.linear.bias)
        y = v @ factor("weight") + (0 if factor("bias") is None else factor("bias"))
        return y[..., self.span[0] : self.span[1]]


def reference(model):
    """A copy in fp64 that computes the plan by ordinary modules; its parameters have the names of the adapted model's."""
    twin = copy.deepcopy(model).double()
    found = attached(twin)
    sizes = {record.name: record.out_features for record in found.plan.sites}
    for index, adapter in enumerate(found.plan.adapters):
        start = 0
        for site in adapter.sites:
            name = site.removesuffix(".weight")
            span = (start, start + sizes[site])
            twin.set_submodule(name, Site(adapter, found.factors, index, span, twin.get_submodule(name)))
            start += sizes[site]
    return twin


@pytest.mark.parametrize("recipe", ["paper", "wina"])
def test_gradients_equal_those_of_the_written_out_model(recipe):
    model, batch = adapted(recipe, depth=1)
    trainable(model, what="all")
    twin = reference(model)
    expected_loss, expected = gradients(twin, twin, batch)
    expected = {name.replace(".linear.", "."): grad for name, grad in expected.items()}
    # in fp64 masks are those of the reference, and only the order of sums differs
    double = copy.deepcopy(model).double()
    loss, got = gradients(double, compiled(double), batch)
    assert got.keys() == expected.keys() and any(name.startswith("rana_fx.") for name in got) == (recipe == "paper")
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, grad in got.items():
        assert relative(grad, expected[name]) < 1e-9, name
    # in fp32 a z^2 within rounding of its threshold changes a mask: most gradients agree, not all
    _, single = gradients(model, compiled(model), batch)
    worst = sorted(relative(single[name], expected[name]) for name in single)
    assert worst[len(worst) // 2] < 1e5 * EPS


class Small(nn.Module):
    """One MLP with rank and neuron adapters, so that few kernels are compiled."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.slow
def test_gradients_through_inductor():
    """Gradients of factors, weights and LoRA with dropout, in one graph."""
    model, batch = Small(), {"x": torch.randn(2, 4, 16)}
    rana_fx.adapt(model, [batch, *({"x": torch.randn(8, 16, 16)} for _ in range(4))], budget=0.7, recipe="paper", progress=False)
    add_lora(model, lora_config(rank=4, dropout=0.2))
    added = attached(model).factors.lowrank
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    invalidate_guards(model)
    found = []
    # the random numbers of eager mode, so that the same inputs are dropped
    with torch._inductor.config.patch(fallback_random=True):
        for how in (rewritten, "rana"):
            torch.manual_seed(1)
            found.append(gradients(model, compiled(model, how), batch)[1])
    expected, got = found
    assert got.keys() == expected.keys() and sum("lora_" in name for name in got) == 2 * len(list(added.additions()))
    for name, grad in got.items():
        assert relative(grad, expected[name]) < 1e4 * EPS, name


def test_what_is_trained():
    model, batch = adapted(depth=1)
    factors = trainable(model)
    assert {name for name in factors if not name.startswith("rana_fx.")} == {"model.layers.0.mlp.down_proj.weight"}
    assert {name.rpartition("_")[2] for name in factors if name.startswith("rana_fx.")} == {"router", "weight"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(factors)
    _, got = gradients(model, compiled(model), batch)
    assert set(got) == set(factors)
    everything = trainable(model, what="all")
    assert set(factors) < set(everything)
    # weights that factors replace are neither read nor trained
    assert not any("q_proj" in name or "gate_proj" in name for name in everything)
    _, got = gradients(model, compiled(model), batch)
    assert set(got) == set(everything)


def test_biases_of_cuts_are_trained():
    model, batch, plan = per_neuron(depth=1, dtype=torch.float64)
    (name,) = [name for name in trainable(model) if name.startswith("rana_fx.")]
    forward = compiled(model)
    bias, got = model.get_parameter(name), gradients(model, forward, batch)[1][name]
    assert bias.shape == plan.adapters[0].bias.shape
    losses, step = [], 1e-2 * got / got.norm()
    for sign in (1, -2):
        with torch.no_grad():
            bias += sign * step
        losses.append(gradients(model, forward, batch)[0])
    # a central difference is off by the square of the step, and norms round to fp32: 1e-7 over the step
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(got.norm()), rel=1e-3)


def test_compiled_code_notices():
    model, batch = adapted(depth=1)
    trainable(model)
    forward = compiled(model)
    _, got = gradients(model, forward, batch)
    assert "rana_fx.a0_router" in got
    only_dense = next(name for name in trainable(model, what="all") if name.endswith("norm.weight"))
    _, got = gradients(model, forward, batch)
    assert {"rana_fx.a0_router", only_dense} <= set(got)
    trainable(model)
    assert only_dense not in gradients(model, forward, batch)[1]


def test_autocast_trains_fp32_factors():
    model, batch = adapted(recipe="static", depth=1)
    _, expected = gradients(model, compiled(model), batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, got = gradients(model, compiled(model), batch)
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert grad.dtype == torch.float32 and relative(grad, expected[name]) < 0.1, name


def test_quantised_factors_are_not_trained():
    model, batch = build("plain_llama", 1)
    rana_fx.adapt(model, [batch, *(ids() for _ in range(4))], budget=0.9, recipe="dense", progress=False)
    with pytest.raises(NothingToTrain, match='what="all"'):
        trainable(model)
    assert trainable(model, what="all")


def test_invalid_calls_raise():
    plain, _ = build("plain_llama", 1)
    with pytest.raises(NoPlan):
        trainable(plain)
    model, _ = adapted(depth=1)
    with pytest.raises(UnknownChoice, match="factors, all"):
        trainable(model, what="router")

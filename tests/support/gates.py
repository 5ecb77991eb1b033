"""Tiny models whose MLPs have gated adapters with a threshold per neuron, and a reference for them."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import torch

import rana_fx
from tests.support.architectures import WIDTH, build, ids, output


def per_neuron(name="plain_biased", *, depth=2, dtype=torch.float32):
    """(a model of its own with dense attention and gated adapters in all MLPs, batch, plan): thresholds from zero to infinity,
    biases."""
    model, batch, plan = _per_neuron(name, depth, dtype)
    model = copy.deepcopy(model)
    rana_fx.attach(model, plan)
    return model, batch, plan


@functools.cache
def _per_neuron(name, depth, dtype):
    with torch.random.fork_rng():
        return _made(name, depth, dtype)


def _made(name, depth, dtype):
    model, batch = build(name, depth)
    model = model.to(dtype)
    plan = rana_fx.adapt(model, [batch, *(ids() for _ in range(4))], budget=0.8, recipe="cats", progress=False)
    adapters = []
    for adapter in plan.adapters:
        tau = adapter.tau * torch.linspace(0.2, 3, adapter.ranks)
        tau[2], tau[5] = torch.inf, 0
        adapters.append(replace(adapter, tau=tau, bias=torch.randn(WIDTH, dtype=dtype)))
    rana_fx.detach(model)
    return model, batch, replace(plan, adapters=tuple(adapters))


def by_hand(model, plan, batch):
    """Reference: the output of the model with every adapted MLP, and kept neurons by adapter."""
    rana_fx.detach(model)
    seen = {}
    handles = []
    for adapter in plan.adapters:
        mlp = model.get_submodule(adapter.name.rpartition(".")[0])

        def forward(mlp, args, _, adapter=adapter):
            active = mlp.act_fn(mlp.gate_proj(args[0]))
            mask = active.square() >= adapter.tau
            seen[adapter.name] = seen.get(adapter.name, 0) + float(mask.sum())
            hidden = torch.where(mask, active, 0.0) * mlp.up_proj(args[0])
            return torch.nn.functional.linear(hidden, mlp.down_proj.weight, adapter.bias)

        handles.append(mlp.register_forward_hook(forward))
    with torch.no_grad():
        result = output(model(**batch))
    for handle in handles:
        handle.remove()
    rana_fx.attach(model, plan)
    return result, {name: count / batch["input_ids"].numel() for name, count in seen.items()}

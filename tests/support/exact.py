"""Models whose up projections have rank adapters with exact outputs, and a reference for them."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

import rana_fx
from rana_fx.adapter import Adapter
from rana_fx.calibration.batches import mask_of, padding_masks, real_rows
from tests.support.adapted import layouts
from tests.support.architectures import output

WIDTH, FFN = 16, 40


def linear(x, weight, bias):
    return F.linear(x, weight, bias)


def addmm(x, weight, bias):
    return torch.addmm(bias, x.reshape(-1, WIDTH), weight.t()).view(*x.shape[:-1], FFN)


def stored_by_inputs(x, weight, bias):
    return torch.addmm(bias, x.reshape(-1, WIDTH), weight).view(*x.shape[:-1], FFN)


def matmul(x, weight, _):
    return torch.matmul(x, weight.mT)


def einsum(x, weight, _):
    return torch.einsum("bti,oi->bto", x, weight)


FORMS = {form.__name__: form for form in (linear, addmm, stored_by_inputs, matmul, einsum)}


class Up(nn.Module):
    """The up projection, in one of the forms above."""

    def __init__(self, form):
        super().__init__()
        weight = torch.randn(FFN, WIDTH) / 3
        self.weight = nn.Parameter(weight.t().contiguous() if form is stored_by_inputs else weight)
        self.bias = nn.Parameter(torch.randn(FFN) / 2)
        self.form = form

    def forward(self, x):
        return self.form(x, self.weight, self.bias)


class Mlp(nn.Module):
    """An MLP with a residual, so that its output is as large as its input."""

    def __init__(self, form=linear, activation=F.gelu):
        super().__init__()
        self.up, self.down = Up(form), nn.Linear(FFN, WIDTH)
        self.activation = activation

    def forward(self, x):
        return x + self.down(self.activation(self.up(x)))


def batch_of(tokens=12, dtype=torch.float32, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(1, tokens, WIDTH, generator=generator).to(dtype)}


def adapter_for(record, site, *, ranks, tau=None):
    """A rank adapter of the largest singular values with a bias; thresholds on outputs from never to always exact."""
    matrix = site.matrix().double()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    bias = torch.zeros(site.out_features) if site.bias is None else site.bias.detach()
    bias = bias + 0.1 * torch.randn(site.out_features)
    if tau is None:
        tau = matrix.norm(dim=1) * torch.linspace(-0.5, 1.5, site.out_features)
        tau[2], tau[5] = torch.inf, -torch.inf
    made = Adapter(
        name=record.name,
        kind="rank",
        sites=(record.name,),
        ranks=ranks,
        kept=ranks / 2,
        tau=((0.4 * s[:ranks]) ** 2).float(),
        router=s[:ranks, None] * vh[:ranks],
        weight=u[:, :ranks].t(),
        bias=bias,
        exact_tau=tau.float(),
        exact_kept=site.out_features / 4,
        dense_flops=record.cost("flops"),
        dense_bytes=record.cost("bytes"),
    )
    return made.costed().to(site.weight.dtype)


def plan_for(model, batch, names=("up",), *, ranks=6, tau=None):
    """A plan that adapts the linears whose names end so, and leaves all others dense."""
    with layouts() as found:
        plan = rana_fx.adapt(model, [batch], budget=0.9, recipe="dense", progress=False)
    rana_fx.detach(model)
    sites = found[0].sites
    with torch.no_grad():
        adapters = [
            adapter_for(record, sites[record.name], ranks=ranks, tau=tau)
            for record in plan.sites
            if record.name.endswith(tuple(names))
        ]
    return replace(plan, adapters=tuple(adapters), skips=())


def mlp(form=linear, activation=F.gelu, *, dtype=torch.float32, tau=None, ranks=6):
    """(an MLP with its plan attached, the plan)."""
    torch.manual_seed(0)
    model = Mlp(form, activation).to(dtype)
    plan = plan_for(model, batch_of(dtype=dtype), ranks=ranks, tau=tau)
    rana_fx.attach(model, plan)
    return model, plan


def without(plan):
    """The same plan without exact outputs."""
    return replace(plan, adapters=tuple(replace(adapter, exact_tau=None, exact_kept=None) for adapter in plan.adapters))


def written_out(x, dense, adapter, get=None):
    """(the adapter's output for x, its mask of exact outputs). ``get``: its live tensors by name; default its own."""
    get = get or (lambda key: getattr(adapter, key))
    z = x @ get("router").t()
    v = torch.where(z.detach().float().square() >= adapter.tau, z, 0.0)
    y = v @ get("weight") + get("bias")
    exact = y.detach() >= adapter.exact_tau
    return torch.where(exact, dense, y), exact


def by_hand(model, plan, batch):
    """Reference: the output of the eager model with every adapter, and exact outputs per token by adapter."""
    twin = copy.deepcopy(model)
    rana_fx.detach(twin)
    masks, seen = padding_masks(batch), {}
    for adapter in plan.adapters:

        def forward(_, args, dense, adapter=adapter):
            result, exact = written_out(args[0], dense, adapter)
            rows = real_rows(exact, mask_of(exact, masks))
            seen[adapter.name] = float(rows.sum()) / len(rows)
            return result

        twin.get_submodule(adapter.name).register_forward_hook(forward)
    with torch.no_grad():
        return output(twin(**batch)), seen

"""Plans that keep every rank and input, in every storage of factors and weights.

In: a model and a batch. Out: a plan whose adapters cover all linears of the blocks, and the dequantised matrices.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import torch

import rana_fx
from rana_fx.adapter import Adapter
from rana_fx.calibration.calibrate import calibrate
from rana_fx.formats import pack, unpack
from tests.support.adapted import EVERY, layouts
from tests.support.architectures import make

# kind of mask, bits of the router (or None), bits of the weight
STORAGES = {
    "rank, router 8": ("rank", 8, 32),
    "rank, router 4, factors 8": ("rank", 4, 8),
    "rank, factors 4": ("rank", 32, 4),
    "hybrid": ("hybrid", 32, 32),
    "hybrid, router 8": ("hybrid", 8, 32),
    "hybrid, router 4, factors 4": ("hybrid", 4, 4),
    "neuron, own weight": ("neuron", None, 32),
    "neuron, 4": ("neuron", None, 4),
    "stored, 8": ("stored", None, 8),
    "stored, 4": ("stored", None, 4),
}


def stored(matrix, bits):
    """(values, scale) in that many bits; 32: unchanged. An odd number of columns cannot be packed to 4 bits."""
    matrix = matrix.contiguous()
    return (matrix, None) if bits >= 16 else pack(matrix, 8 if matrix.shape[1] % 2 else bits)


def sites_of(model, batch):
    return calibrate(model, [batch], progress=False).layout.sites


def rebuilt(adapter, sites, storage, *, shift=0.0):
    """The adapter with full ranks and thresholds of zero, in the given storage. ``shift``: of every component of v."""
    what, router_bits, bits = STORAGES[storage]
    matrix = torch.cat([sites[name].matrix() for name in adapter.sites]).double()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    fields = dict.fromkeys(("router", "router_scale", "router_tau", "router_kept", "shift"))
    if router_bits is None:
        rows, kind = matrix.shape[1], what
        weight = matrix.t()
    else:
        rows, kind = len(s), "rank"
        weight, router = u.t(), s[:, None] * vh
        if what == "hybrid":
            fields["router_tau"], fields["router_kept"] = torch.zeros(matrix.shape[1]), float(matrix.shape[1])
            router = router.t()
        fields["router"], fields["router_scale"] = stored(router.float(), router_bits)
    weight, scale = stored(weight.float(), bits)
    bias = adapter.bias
    if bias is None and router_bits is None:
        parts = [sites[name] for name in adapter.sites]
        given = [torch.zeros(site.out_features) if site.bias is None else site.bias.detach() for site in parts]
        bias = torch.cat(given) if any(site.bias is not None for site in parts) else None
    if shift:
        fields["shift"] = torch.full((rows,), shift)
        left_out = fields["shift"] @ unpack(weight, scale)
        bias = left_out if bias is None else bias + left_out
    found = replace(
        adapter, kind=kind, ranks=rows, kept=float(rows), tau=torch.zeros(rows), weight=weight, weight_scale=scale, bias=bias,
        flops=0.0, bytes=0.0, **fields,
    )  # fmt: skip
    return found.costed()


def stored_matrix(adapter: Adapter, dtype=torch.float64):
    """(out, in): the matrix of the adapter when it keeps everything."""
    weight = unpack(adapter.weight, adapter.weight_scale, dtype).t()
    if adapter.router is None:
        return weight
    router = unpack(adapter.router, adapter.router_scale, dtype)
    return weight @ (router if adapter.router_tau is None else router.t())


@functools.cache
def _dense(name, depth):
    with torch.random.fork_rng(), layouts() as found:
        model, batch = make(EVERY[name], depth)
        batches = [batch, *(EVERY[name].inputs() for _ in range(4))]
        plan = rana_fx.adapt(model, batches, budget=0.9, recipe="static", progress=False)
    rana_fx.detach(model)
    (layout,) = found
    return model, batch, plan, layout.sites


def dense_sites(name, depth):
    """The linears of the model that ``stored_plan`` copies."""
    return _dense(name, depth)[3]


def stored_plan(name, depth, storage, *, shift=0.0):
    """(a model of its own without a plan, batch, plan)."""
    return stored_layers(name, [storage] * depth, shift=shift)


def stored_layers(name, storages, *, shift=0.0):
    """``stored_plan`` with a storage for each layer."""
    model, batch, plan, sites = _dense(name, len(storages))
    each = [storages[_layer(adapter)] if len(storages) > 1 else storages[0] for adapter in plan.adapters]
    with torch.no_grad():
        adapters = tuple(
            rebuilt(adapter, sites, storage, shift=shift) for adapter, storage in zip(plan.adapters, each, strict=True)
        )
    return copy.deepcopy(model), batch, replace(plan, adapters=adapters)


def _layer(adapter):
    """The first number in the name of its first linear."""
    return next(int(part) for part in adapter.sites[0].split(".") if part.isdigit())

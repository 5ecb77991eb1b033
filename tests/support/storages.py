"""Plans that keep every rank and input, in every storage of factors and weights.

In: a model and a batch. Out: a plan whose adapters cover all linears of the blocks, and the dequantised matrices.
"""

from __future__ import annotations

import copy
import functools
import itertools
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
    return stored_in_turn(name, depth, [storage], shift=shift)


def stored_in_turn(name, depth, storages, *, shift=0.0):
    """``stored_plan`` whose adapters, in the plan's order, take these storages in turn."""
    model, batch, plan, sites = _dense(name, depth)
    with torch.no_grad():
        adapters = tuple(
            rebuilt(adapter, sites, storage, shift=shift)
            for adapter, storage in zip(plan.adapters, itertools.cycle(storages), strict=False)
        )
    return copy.deepcopy(model), batch, replace(plan, adapters=adapters)


def kept_product(adapter):
    """((out, in), (out,)) in fp64: matrix and bias of an adapter with a weight, whose thresholds are zero or infinite."""
    weight = unpack(adapter.weight, adapter.weight_scale, torch.float64) * (adapter.tau == 0).unsqueeze(1)
    if adapter.router is None:
        matrix = weight.t()
    else:
        router = unpack(adapter.router, adapter.router_scale, torch.float64)
        if adapter.router_tau is not None:
            router = (router * (adapter.router_tau == 0).unsqueeze(1)).t()
        matrix = weight.t() @ router
    bias = torch.zeros(weight.shape[1], dtype=torch.float64) if adapter.bias is None else adapter.bias.double()
    return matrix, bias if adapter.shift is None else bias - adapter.shift.double() @ weight


def twin_of(name, depth, plan):
    """What ``plan`` computes for the model of ``stored_plan``: a dense model in fp64 with the products of ``kept_product``, whose
    matrices are rounded to fp32. Biases are written where the plan has them, into linears that are modules."""
    model, _, _, sites = _dense(name, depth)
    own, biases = copy.deepcopy(model.state_dict()), {}
    with torch.no_grad():
        for adapter in plan.adapters:
            sizes = [sites[site].out_features for site in adapter.sites]
            parts = [value.split(sizes) for value in kept_product(adapter)]
            for site, matrix, bias in zip(adapter.sites, *parts, strict=True):
                sites[site].view.copy_(matrix)
                biases |= {} if adapter.bias is None else {site: bias}
        twin = copy.deepcopy(model).double()
        model.load_state_dict(own)
    for site, bias in biases.items():
        twin.get_submodule(site).bias = torch.nn.Parameter(bias)
    return twin

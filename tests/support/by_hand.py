"""What an adapted model computes, in eager mode: a reference that traces nothing and shares no code with the rewrite.

For models whose linears are modules, and plans in the model's dtype without shifts, masked routers or exact outputs (tests of
those: storages.py, exact.py). The oracle of recipes is oracle.py.
"""

from __future__ import annotations

import contextlib

import torch
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rana_fx.calibration.batches import call
from rana_fx.runtime.attachment import attached
from tests.support.architectures import output


def product(adapter, module, x, columns):
    """The adapter's output for one of its linears, whose outputs are these columns of the stack."""
    v = x if adapter.router is None else F.linear(x, adapter.router)
    if adapter.kind != "gated":
        v = torch.where(v.square() >= adapter.tau, v, 0.0)
    if adapter.weight is not None:
        weight = adapter.weight[:, columns]
    else:
        weight = module.weight if isinstance(module, Conv1D) else module.weight.t()
    bias = module.bias if adapter.weight is None and adapter.bias is None else adapter.bias
    if bias is not module.bias:
        bias = None if bias is None else bias[columns]
    return v @ weight + (0.0 if bias is None else bias)


@contextlib.contextmanager
def by_hand(model, activation=F.silu):
    """Inside, the model computes by its attached plan. ``activation``: of the gates of gated adapters."""
    plan, handles, masks = attached(model).plan, [], {}
    sizes = {record.name: record.out_features for record in plan.sites}

    def replace(adapter, columns):
        def hook(module, args, _):
            x = torch.where(masks[adapter.name], args[0], 0.0) if adapter.kind == "gated" else args[0]
            return product(adapter, module, x, columns)

        return hook

    def keep(adapter):
        def hook(_, args, gate):
            masks[adapter.name] = activation(gate).square() >= adapter.tau

        return hook

    for adapter in plan.adapters:
        assert adapter.router_tau is adapter.shift is adapter.exact_tau is adapter.router_scale is adapter.weight_scale is None
        start = 0
        for site in adapter.sites:
            stop = start + sizes[site]
            handles.append(model.get_submodule(site).register_forward_hook(replace(adapter, slice(start, stop))))
            start = stop
        if adapter.kind == "gated":
            handles.append(model.get_submodule(adapter.gate).register_forward_hook(keep(adapter)))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def outputs_by_hand(model, *batches, activation=F.silu):
    """The output of the adapted model for each batch."""
    with by_hand(model, activation):
        return [output(call(model, batch)) for batch in batches]

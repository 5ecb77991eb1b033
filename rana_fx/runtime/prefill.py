"""How calls with many tokens, such as a prompt, are computed: the modes, and the time and memory of each.

    mode         more than 16 tokens at once                        memory of a linear (out, in) at rank r
    "masked"     adapted like any other, as matrix products         in * out + r * (in + out) numbers
    "dense"      the original linears, from the number of tokens    the same
                 on at which the adapter is no longer expected to
                 save time: of 9 on a CPU, on a GPU also of one
                 where the kernels' cost model says so
    "cheapest"   the original linears where r * (in + out) is       the same
                 more than in * out, adapted elsewhere
    "factors"    as "masked"                                        r * (in + out); the dense weight is freed, irreversibly

A product of many tokens reads every row, so that a mask saves nothing there and only the rank does. Adapters that multiply by the
model's own weight (neuron, gated) cost what the dense linear costs, take no memory, and keep their weight in every mode. So does
the weight that exact outputs are computed from, which make an adapter take more FLOPs than dense whatever its rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rana_fx.adapter import Adapter
from rana_fx.choices import PREFILLS
from rana_fx.graph.operands import base_name
from rana_fx.kernels.registry import tokens_skipped
from rana_fx.plan import Plan
from rana_fx.runtime.adapter_time import tokens_faster
from rana_fx.runtime.replaced_weights import replaced_weights

MODES = PREFILLS


@dataclass(frozen=True)
class Memory:
    """Bytes of the linears of a plan. replaced: of the weights that are not read where factors replace them."""

    dense: int
    factors: int
    replaced: int

    def total(self, mode: str) -> int:
        """Bytes in memory after compilation with a mode."""
        return self.dense + self.factors - (self.replaced if mode == "factors" else 0)


def memory_of(plan: Plan) -> Memory:
    """Bytes from the plan's sizes. (A weight that shares memory with another tensor, which a plan does not record, stays.)"""
    sizes = {
        record.name: record.out_features * record.in_features * getattr(torch, record.dtype).itemsize for record in plan.sites
    }
    factors = sum(value.numel() * value.element_size() for adapter in plan.adapters for value in adapter.tensors().values())
    freed = replaced_weights(plan)
    replaced = sum(size for site, size in sizes.items() if base_name(site) in freed)
    return Memory(sum(sizes.values()), factors, replaced)


def costs_more(plan: Plan, adapter: Adapter) -> bool:
    """Whether the adapter without masks takes more multiply-adds than the linears it replaces."""
    if adapter.router is None:
        return False
    if adapter.exact_tau is not None:
        return True  # among many tokens every output is exact for some: it reads the whole weight and the factors
    sites = [record for record in plan.sites if record.name in adapter.sites]
    inputs, outputs = sites[0].in_features, sum(record.out_features for record in sites)
    return adapter.ranks * (inputs + outputs) > inputs * outputs


def tokens_masked(plan: Plan, adapter: Adapter, weight: nn.Parameter) -> int:
    """The largest number of tokens per call for which masks are expected to save time. ``weight``: of a linear of the adapter."""
    outputs = sum(record.out_features for record in plan.sites if record.name in adapter.sites)
    stored = weight if adapter.weight is None else adapter.weight
    return tokens_skipped(adapter.ranks, outputs, adapter.density, stored.dtype, weight.device)


def tokens_adapted(plan: Plan, adapter: Adapter, weight: nn.Parameter) -> int:
    """The largest number of tokens per call for which the adapter is expected to be faster than its linears, router included."""
    most = tokens_masked(plan, adapter, weight)
    names = (*adapter.sites, *adapter.also)
    return tokens_faster(adapter, {site.name: site for site in plan.sites if site.name in names}, weight.device, most)

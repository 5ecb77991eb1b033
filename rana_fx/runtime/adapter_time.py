"""Expected time of adapters and of dense linears in compiled decoding on a GPU, by the kernels' cost model (kernels/cost.py).

In: an adapter, the sizes of the linears it replaces, a device. Out: microseconds a call, or None where nothing was measured (a
CPU). Launches are those of a CUDA graph (mode "reduce-overhead"), one for each operation of the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rana_fx.adapter import Adapter
from rana_fx.formats import Matrix
from rana_fx.kernels import cost
from rana_fx.kernels.problem import DTYPES, Problem, bits_of
from rana_fx.kernels.registry import REFERENCE, Implementation, choose
from rana_fx.plan import SiteRecord


def adapter_us(
    adapter: Adapter, sites: Mapping[str, SiteRecord], device: torch.device, *, tokens: int = 1, normed: bool = False
) -> float | None:
    """Microseconds of the operations that an adapter is rewritten to.

    Args:
        sites: the linears that it replaces, and ``adapter.also``, by name; more may be given.
        normed: the norm in front is computed by the first launch.
    """
    times = [_us(problem) for problem in problems(adapter, sites, device, tokens, normed)]
    return None if None in times else sites[adapter.sites[0]].uses * sum(time for time in times if time is not None)


def linear_us(site: SiteRecord, device: torch.device) -> float | None:
    """Microseconds of a dense linear for a few tokens."""
    if device.type != "cuda":
        return None
    bits = 8 * getattr(torch, site.dtype).itemsize
    return site.uses * cost.dense_us(site.in_features, site.out_features, cost.nearest(device), bits=bits)


def dense_us(adapter: Adapter, sites: Mapping[str, SiteRecord], device: torch.device) -> float | None:
    """Microseconds of the dense linears that an adapter replaces, ``adapter.also`` included: one launch each."""
    times = [linear_us(sites[name], device) for name in (*adapter.sites, *adapter.also)]
    return None if None in times else sum(time for time in times if time is not None)


def tokens_faster(adapter: Adapter, sites: Mapping[str, SiteRecord], device: torch.device, most: int) -> int:
    """Up to how many tokens of a call, at most ``most``, the whole adapter is expected to be faster than the linears it replaces:
    0 where it is not for one token; ``most`` where nothing was measured.
    """
    dense = dense_us(adapter, sites, device)
    for tokens in range(1, most + 1):
        us = adapter_us(adapter, sites, device, tokens=tokens)
        if us is not None and dense is not None and us >= dense:
            return tokens - 1
    return most


def takes_norm(adapter: Adapter, sites: Mapping[str, SiteRecord], device: torch.device) -> bool:
    """Whether its first launch, of one token, computes the norm in front of it where nothing else reads that norm."""
    if adapter.also or adapter.router_tau is not None or adapter.exact_tau is not None:
        return False
    problem = problems(adapter, sites, device, 1, True)[0]
    return adapter.router is not None or (device.type == "cuda" and _chosen(problem).name != REFERENCE)


def problems(adapter: Adapter, sites: Mapping[str, SiteRecord], device: torch.device, tokens: int, normed: bool) -> list[Problem]:
    """The calls of an adapter's operations, in order: its router, rows of other linears, its masked matmul, exact outputs."""
    first = sites[adapter.sites[0]]
    dtype = getattr(torch, first.dtype)
    dtype = dtype if dtype in DTYPES else torch.float32
    inputs, outputs = first.in_features, sum(sites[name].out_features for name in adapter.sites)

    def problem(op: str, rows: int, columns: int, matrix: Matrix | None, density: float) -> Problem:
        stored = dtype if matrix is None or matrix.values.dtype.is_floating_point else matrix.values.dtype
        return Problem(op, device, dtype, tokens, tokens, rows, columns, stored, bits_of(stored), density=density)

    weight, router = adapter.matrix("weight"), adapter.matrix("router")
    found = []
    if router is not None and adapter.router_tau is None:
        found.append(problem("normed_router" if normed else "router", adapter.ranks, inputs, router, 1.0))
    elif router is not None:
        found.append(problem("masked_gemv", inputs, adapter.ranks, router, adapter.router_density))
    for name in adapter.also:
        found.append(problem("masked_rows", sites[name].out_features, sites[name].in_features, None, adapter.density))
    op = "masked_gemv_normed" if normed and router is None else "masked_gemv"
    found.append(problem(op, adapter.ranks, outputs, weight, adapter.density))
    if adapter.exact_tau is not None:
        found.append(problem("masked_rows", outputs, inputs, None, adapter.exact_density))
    return found


def _us(problem: Problem) -> float | None:
    """Expected time of a call."""
    return _chosen(problem).cost(problem) if problem.device.type == "cuda" else None


def _chosen(problem: Problem) -> Implementation:
    """The implementation under CUDA graphs."""
    from torch._inductor import config

    with config.patch({"triton.cudagraphs": True}):
        return choose(problem)

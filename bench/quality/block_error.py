"""One MLP block with adapters in place of its linears: how far its output moves, and what that costs.

In: the block's sites and sampled inputs, and adapters of any kind: stacked or not, behind masked routers, in any storage.
Out: relative error of the block's output and its cost over the dense one in the problem's metric, both over the rows given.
Plain PyTorch, by the adapters' definition (rana_fx/adapter.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from rana_fx.adapter import Adapter
from rana_fx.calibration.layout import MlpBlock
from rana_fx.formats import unpack
from rana_fx.kernels.reference import masked_gemv
from rana_fx.recipes.mlp_rows import hidden_rows
from rana_fx.recipes.problem import Problem

_ROWS = 1024  # at a time


class Cast:
    """Adapters of one block. ``kept``, ``router_kept``, ``exact_kept``: sums over the rows seen, by adapter."""

    def __init__(self, problem: Problem, block: MlpBlock, adapters: Sequence[Adapter]) -> None:
        self._problem, self._block = problem, block
        device = problem.matrix((block.down,)).device
        self.adapters = [adapter.on(device) for adapter in adapters]
        self._of = {site: adapter for adapter in self.adapters for site in adapter.sites}
        outside = self._of.keys() - set(block.sites)
        assert not outside, f"not of the block: {outside}"
        self.kept: dict[str, float] = {}
        self.router_kept: dict[str, float] = {}
        self.exact_kept: dict[str, float] = {}

    def output(self, x_TI: Tensor) -> Tensor:
        """Of the block, biases included."""
        block = self._block
        ups = self._linears(block.ups, x_TI)
        hidden = block.pointwise(*ups).float()
        last = self._of.get(block.down)
        if last is None or last.kind != "gated":
            return self._linears((block.down,), hidden)[0]
        assert block.activation is not None
        mask = block.activation(ups[block.gate]).float().square() >= last.tau
        self._count(self.kept, last, mask)
        bias = self._problem.bias((block.down,)) if last.bias is None else last.bias.float()
        return linear(hidden * mask, self._problem.matrix((block.down,)), bias)

    def _linears(self, names: Sequence[str], x_TI: Tensor) -> list[Tensor]:
        """Outputs of sites that read one input; an adapter of several acts once."""
        done: dict[str, Tensor] = {}
        for name in names:
            adapter = self._of.get(name)
            if adapter is None:
                done[name] = linear(x_TI, self._problem.matrix((name,)), self._problem.bias((name,)))
            elif name not in done:
                widths = [self._problem.layout.sites[site].out_features for site in adapter.sites]
                done |= zip(adapter.sites, self._act(adapter, x_TI).split(widths, dim=1), strict=True)
        return [done[name] for name in names]

    def _act(self, adapter: Adapter, x_TI: Tensor) -> Tensor:
        own = adapter.weight is None
        v, bias = x_TI, adapter.bias
        if own and bias is None:
            bias = self._problem.bias(adapter.sites)
        if adapter.router is not None:
            router = unpack(adapter.router, adapter.router_scale)
            if adapter.router_tau is None:
                v = linear(v, router)
            else:
                self._count(self.router_kept, adapter, v.square() >= adapter.router_tau)
                v = masked_gemv(v, adapter.router_tau, router, None)
        if adapter.shift is not None:
            v = v - adapter.shift
        self._count(self.kept, adapter, v.square() >= adapter.tau)
        weight = self._problem.matrix(adapter.sites).t() if own else unpack(adapter.weight, adapter.weight_scale)
        y = masked_gemv(v, adapter.tau, weight, None if bias is None else bias.float())
        if adapter.exact_tau is None:
            return y
        large = y >= adapter.exact_tau
        self._count(self.exact_kept, adapter, large)
        return torch.where(large, linear(x_TI, self._problem.matrix(adapter.sites), self._problem.bias(adapter.sites)), y)

    @staticmethod
    def _count(sums: dict[str, float], adapter: Adapter, mask: Tensor) -> None:
        sums[adapter.name] = sums.get(adapter.name, 0.0) + float(mask.sum())


def score(problem: Problem, block: MlpBlock, adapters: Sequence[Adapter]) -> tuple[float, float]:
    """(||y^ - y||^2 / ||y||^2, cost over dense) on the problem's rows; y without the bias of down."""
    rows, weight, bias = problem.rows(block.ups[0]), problem.matrix((block.down,)), problem.bias((block.down,))
    cast = Cast(problem, block, adapters)
    energy = error = 0.0
    for x_TI in rows.float().split(_ROWS):
        y_TO = linear(hidden_rows(problem, block, x_TI), weight)
        energy += float(y_TO.square().sum(dtype=torch.float64))
        moved = cast.output(x_TI) - (y_TO if bias is None else y_TO + bias)
        error += float(moved.square().sum(dtype=torch.float64))
    total = cost = problem.size(block.sites)
    for adapter in cast.adapters:
        counted = (cast.kept, cast.router_kept, cast.exact_kept)
        means = [sums[adapter.name] / len(rows) if adapter.name in sums else None for sums in counted]
        cost += adapter.cost(problem.metric, *means) - (adapter.dense_flops if problem.metric == "flops" else adapter.dense_bytes)
    return error / max(energy, 1e-30), cost / total

"""Output error and cost of one MLP block whose linears are replaced by adapters.

In: the block's sites, sampled inputs, and adapters of any kind and storage. Out: relative squared error of the block's output and
its cost as a fraction of dense in the problem's metric, both over the given rows. Computed in fp32 from the definition of
adapters (rana_fx/apply.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from rana_fx.adapter import Adapter
from rana_fx.apply import NONZERO, Target, apply, nonzero_tau, spans
from rana_fx.calibration.layout import MlpBlock
from rana_fx.cost import Kept
from rana_fx.kernels.reference import kept
from rana_fx.recipes.mlp_rows import hidden_rows
from rana_fx.recipes.problem import Problem

_ROWS = 1024  # at a time


class AdaptedBlock:
    """An MLP block with adapters.

    ``sums``: number of kept elements over all rows so far, by part of an adapter (names of rana_fx.apply) and adapter name.
    """

    def __init__(self, problem: Problem, block: MlpBlock, adapters: Sequence[Adapter]) -> None:
        self._problem, self._block = problem, block
        device = problem.matrix((block.down,)).device
        self.adapters = [adapter.on(device).to(torch.float32) for adapter in adapters]
        self._of = {site: adapter for adapter in self.adapters for site in adapter.sites}
        outside = self._of.keys() - set(block.sites)
        assert not outside, f"sites outside of the block: {outside}"
        self.sums: dict[str, dict[str, float]] = {"tau": {}, "router_tau": {}, "exact_tau": {}}

    def output(self, x_TI: Tensor) -> Tensor:
        """(T, in) -> (T, out): the block's output, biases included."""
        block = self._block
        ups = self._linears(block.ups, x_TI)
        gate, last = None, self._of.get(block.down)
        if last is not None and last.kind == "gated":
            assert block.activation is not None
            gate = kept(block.activation(ups[block.gate]), last.tau)
        return self._linears((block.down,), block.pointwise(*ups).float(), gate)[0]

    def _linears(self, names: Sequence[str], x_TI: Tensor, gate: Tensor | None = None) -> list[Tensor]:
        """Outputs of sites that read one input; an adapter of several sites is applied once."""
        done: dict[str, Tensor] = {}
        for name in names:
            adapter = self._of.get(name)
            if adapter is None:
                done[name] = linear(x_TI, self._problem.matrix((name,)), self._problem.bias((name,)))
            elif name not in done:
                done |= zip(adapter.sites, self._adapted(adapter, x_TI, gate), strict=True)
        return [done[name] for name in names]

    def _adapted(self, adapter: Adapter, x_TI: Tensor, gate: Tensor | None) -> list[Tensor]:
        problem = self._problem
        seen: set[str] = set()

        def count(part: str, output: Tensor, mask: Callable[[], Tensor] | None) -> None:  # noqa: ARG001
            if mask is not None and part not in seen:  # linears that read one tensor share one mask
                seen.add(part)
                sums = self.sums[part]
                sums[adapter.name] = sums.get(adapter.name, 0.0) + float(mask().sum())

        columns = spans(adapter, {name: problem.layout.sites[name].out_features for name in adapter.sites})
        targets = [
            Target(name, columns[name], problem.matrix((name,)), problem.bias((name,)), torch.float32) for name in adapter.sites
        ]
        tensors = adapter.tensors()
        if adapter.kind == "gated":
            tensors[NONZERO] = nonzero_tau(adapter, x_TI.device)
        return apply(adapter, tensors, x_TI, targets, gate=gate, every_row=True, observe=count)


def score(problem: Problem, block: MlpBlock, adapters: Sequence[Adapter]) -> tuple[float, float]:
    """(||y^ - y||^2 / ||y||^2, cost over dense) on the problem's rows; y without the bias of down."""
    rows, weight, bias = problem.rows(block.ups[0]), problem.matrix((block.down,)), problem.bias((block.down,))
    adapted = AdaptedBlock(problem, block, adapters)
    energy = error = 0.0
    for x_TI in rows.float().split(_ROWS):
        y_TO = linear(hidden_rows(problem, block, x_TI), weight)
        energy += float(y_TO.square().sum(dtype=torch.float64))
        moved = adapted.output(x_TI) - (y_TO if bias is None else y_TO + bias)
        error += float(moved.square().sum(dtype=torch.float64))
    total = cost = problem.size(block.sites)
    counted = (adapted.sums[part] for part in ("tau", "router_tau", "exact_tau"))
    means = Kept.by_name(*({name: count / len(rows) for name, count in sums.items()} for sums in counted))
    for adapter in adapters:  # the given adapters, in their storage: adapted.adapters are cast to fp32
        cost += (adapter.cost(means.get(adapter.name, Kept())) - adapter.dense_cost)[problem.metric]
    return error / max(energy, 1e-30), cost / total

"""recipe="exact": skip the rows that exact zeros multiply, at no loss.

Behind ReLU, squared ReLU or a threshold (OPT, T5, Nemotron, Gemma 3n) much of what a linear reads is exactly zero, and a dense
model multiplies it all the same. Any linear of the budget counts, whatever makes its zeros; the calibration text only measures
how many there are.

    neuron   a linear by itself: rows of inputs that are not zero
    gated    an MLP whose gate decides, act(gate) = 0: rows of up and of down, where that costs less than zeros of each by itself

On any text the output is that of the dense model, summed in another order. "Zero" is what rana's operations take for it, a number
whose square is below ``NONZERO_TAU`` (2^-126) in fp32: in fp16 exactly the zeros; in bf16, fp32 and fp64 numbers below 2^-63
(1.1e-19), too. So output o differs from the dense one by less than 2^-63 sum_j |W_oj|, beside rounding: where the output is
larger than 2^-39 sum_j |W_oj|, that is less than half a unit in the last place of fp32. In a gated adapter the same holds of
act(gate), and the bound is 2^-63 sum_j (1 + |up_j|) |W_oj|.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.apply import NONZERO_TAU
from rana_fx.calibration.layout import Layout, MlpBlock
from rana_fx.calibration.samples import Keep
from rana_fx.errors import InvalidOption, NothingToSkip
from rana_fx.graph.linears import Skip
from rana_fx.recipes.builders import gated_adapter, neuron_adapter
from rana_fx.recipes.problem import Problem

_KEEP = Keep(2048, host=True)  # rows: a share of zeros needs fewer than a basis
_CHUNK = 512  # tokens at a time
_ROLES = 5  # that an error names


@dataclass(frozen=True)
class Exact:
    """Masks that drop zeros alone. What they leave is what the plan costs: there is no budget to distribute.

    Args:
        least: share of zeros from which on an input is masked. Default: a tenth. On an H200 the fixed time of a masked GEMV is
            1.7 us longer than a dense one's (kernels/cost.py): in that time it reads 8 % of a down projection of Llama-2-7B.

    Raises:
        InvalidOption: ``least`` is no number in [0, 1).
    """

    least: float = 0.1

    name: ClassVar[str] = "exact"
    needs_holdout: ClassVar[bool] = False
    takes_budget: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.least, bool) or not isinstance(self.least, (int, float)) or not 0 <= self.least < 1:
            raise InvalidOption(name="least", got=self.least, expected="a share of zeros in [0, 1), such as 0.1")

    def wants(self, layout: Layout) -> dict[tuple[str, ...], Keep]:
        return {layout.sites_of_group(site.name): _KEEP for site in layout.sites.values() if site.counted}

    def solve(self, problem: Problem) -> list[Adapter]:
        """Raises TooFewTokens, NothingToSkip."""
        zeros = _zeros_of_inputs(problem)
        adapters: list[Adapter] = []
        masked: set[str] = set()
        for block in problem.steps.each(problem.layout.blocks):
            # a weight that several blocks share is masked once
            made = None if masked.intersection(block.sites) else self._gated(problem, block, zeros)
            if made is not None:
                adapters.append(made)
                masked |= {*made.sites, *made.also}
        for name, share in zeros.items():
            if name in masked:
                continue
            if self._pays(share):
                ones = torch.ones(problem.layout.sites[name].in_features, device="cpu")
                adapters.append(neuron_adapter(problem, name, NONZERO_TAU, ones, 1 - share))
            else:
                problem.skips.append(Skip(name, self._reason(share)))
        if not adapters:
            raise NothingToSkip(recipe=self.name, count=len(zeros), found=_by_role(problem.layout, zeros), least=self.least)
        problem.note("only exact zeros are skipped, whatever the budget")
        return adapters

    def _gated(self, problem: Problem, block: MlpBlock, zeros: Mapping[str, float]) -> Adapter | None:
        """The adapter of up and down by the zeros of the activated gate; None where there is no gate, or that costs no less."""
        if block.activation is None or not all(name in zeros for name in block.sites):
            return None
        up, down = (problem.layout.sites[name] for name in (block.ups[1 - block.gate], block.down))
        if up.out_features != down.in_features or up.uses != down.uses:
            return None
        share = _share_of_zeros(_activated_gate(problem, block))
        apart = sum(problem.size((site.name,)) * self._cost(zeros[site.name]) for site in (up, down))
        if not self._pays(share) or problem.size((up.name, down.name)) * self._cost(share) >= apart:
            return None
        tau = torch.full((1,), NONZERO_TAU, device="cpu")
        return gated_adapter(problem, block, tau, (1 - share) * down.in_features)

    def _pays(self, share: float) -> bool:
        """Whether an input with that share of zeros is masked. One that is zero throughout says nothing on other text."""
        return self.least <= share < 1 and share > 0

    def _cost(self, share: float) -> float:
        """Over dense, of a linear whose input has that share of zeros."""
        return 1 - share if self._pays(share) else 1.0

    def _reason(self, share: float) -> str:
        if share == 0:
            return "no exact zeros in its input"
        if share == 1:
            return "its input is zero throughout the calibration text: it stays dense"
        return f"{share:.1%} of its input is exactly zero: too little to save time"


def _zeros_of_inputs(problem: Problem) -> dict[str, float]:
    """Share of exact zeros in the input of every linear of the budget that was sampled; one measurement for those of a group."""
    names = [name for name in problem.counted() if problem.calibrated((name,), 1)]
    groups = {problem.layout.sites_of_group(name): name for name in names}
    found = {group: _share_of_zeros(problem.rows(name)) for group, name in groups.items()}
    return {name: found[problem.layout.sites_of_group(name)] for name in names}


def _activated_gate(problem: Problem, block: MlpBlock) -> Tensor:
    """act(gate) on the sampled rows, (tokens, neurons), from gates rounded to the model's dtype as in the model."""
    assert block.activation is not None
    gate = (block.ups[block.gate],)
    weight, bias = problem.matrix(gate), problem.bias(gate)
    rows = problem.rows(gate[0])
    linear = torch.nn.functional.linear
    parts = (linear(part.to(weight.device).float(), weight, bias).to(rows.dtype) for part in rows.split(_CHUNK))
    return torch.cat([block.activation(part) for part in parts])


def _share_of_zeros(values_TI: Tensor) -> float:
    """Of all values, those that a threshold of ``NONZERO_TAU`` drops."""
    kept = sum(int((part.float().square() >= NONZERO_TAU).sum()) for part in values_TI.split(_CHUNK))
    return 1 - kept / values_TI.numel()


def _by_role(layout: Layout, zeros: Mapping[str, float]) -> str:
    """The linear with the largest share of zeros of each role, largest first, as text."""
    names: Collection[str] = sorted(zeros, key=lambda name: zeros[name])
    most = {layout.sites[name].role: name for name in names}  # the last of a role is its largest
    ranked = sorted(most.items(), key=lambda item: -zeros[item[1]])
    return ", ".join(f"{role} {zeros[name]:.1%} ({name})" for role, name in ranked[:_ROLES])

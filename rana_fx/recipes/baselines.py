"""Baselines: simple recipes at the same budget.

dense    nothing is adapted
static   SVD of the output at a fixed rank, every linear (attention inputs stacked as in the paper's recipe)
teal     keep input j where |x_j| >= t, every linear (TEAL, arXiv 2408.14690; uniform sparsity)
wina     keep input j where |x_j| |W_:,j| >= t, every linear (WINA)
cats     keep neuron j where |act(gate x)_j| >= t: skip rows of up and columns of down (CATS, COLM 2024)
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.calibration.layout import Layout, MlpBlock
from rana_fx.calibration.score_histogram import Profile
from rana_fx.graph.linears import Skip
from rana_fx.recipes.basis import Basis, RankThreshold, output_basis, second_moment
from rana_fx.recipes.builders import gated_adapter, neuron_adapter, rank_adapter
from rana_fx.recipes.importance import importance_profile, neuron_threshold
from rana_fx.recipes.mlp_rows import hidden_rows
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.registry import split_budget


def _groups(layout: Layout, names: list[str]) -> set[tuple[str, ...]]:
    return {layout.sites_of_group(name) for name in names}


class Dense:
    """No adapter at all: the reference row of every table."""

    name = "dense"
    needs_holdout = False

    def wants(self, layout: Layout) -> set[tuple[str, ...]]:  # noqa: ARG002
        return set()

    def solve(self, problem: Problem) -> list[Adapter]:
        problem.skips += [Skip(name, "recipe dense") for name in problem.counted()]
        return []


class Static:
    """Fixed rank r = fraction * out * in / (out + in) in the output basis."""

    name = "static"
    needs_holdout = False
    adapts_every_layer = True

    def wants(self, layout: Layout) -> set[tuple[str, ...]]:
        return _groups(layout, [site.name for site in layout.sites.values() if site.counted])

    def solve(self, problem: Problem) -> list[Adapter]:
        stacks = problem.layout.stacks()
        stacked = {name for stack in stacks for name in stack}
        units = [*stacks, *((name,) for name in problem.counted() if name not in stacked)]
        if problem.budget >= 1:
            return []
        adapters = []
        for names in problem.steps.each(units):
            sites = [problem.layout.sites[name] for name in names]
            out, width = sum(site.out_features for site in sites), sites[0].in_features
            rank = int(problem.budget * out * width / (out + width))
            if rank < 1:
                # one rank already exceeds the layer's share: too narrow to matter in the budget
                problem.skips += [Skip(name, f"{out}x{width} is too narrow for a rank at this budget") for name in names]
                continue
            if not problem.calibrated(names, min(out, width)):
                continue
            basis, moment, total = problem.once(("static", names), partial(_output_basis, problem, names))
            kept = torch.einsum("oi,ij,oj->", basis.b_DI[:rank].double(), moment, basis.b_DI[:rank].double())
            chosen = RankThreshold(rank, float(rank), 0.0, float(kept / total) if total > 0 else 1.0)
            adapters.append(rank_adapter(problem, names, basis, chosen, static=True))
        return adapters


class Thresholds:
    """Input thresholds on every linear, at one density: ``teal`` by |x|, ``wina`` by |x| times the column's norm."""

    needs_holdout = False
    adapts_every_layer = True

    def __init__(self, name: str, *, weighted: bool) -> None:
        self.name = name
        self._weighted = weighted

    def wants(self, layout: Layout) -> set[tuple[str, ...]]:
        return _groups(layout, [site.name for site in layout.sites.values() if site.counted])

    def solve(self, problem: Problem) -> list[Adapter]:
        if problem.budget >= 1:
            return []
        adapters = []
        for name in problem.steps.each(problem.counted()):
            if not problem.calibrated((name,), 1):
                continue
            norms = self._norms(problem, name)
            profile = problem.once((self.name, name), partial(importance_profile, problem.rows(name), norms))
            adapters.append(neuron_adapter(problem, name, neuron_threshold(profile, problem.budget), norms, problem.budget))
        return adapters

    def _norms(self, problem: Problem, name: str) -> Tensor:
        if self._weighted:
            norms: Tensor = torch.linalg.vector_norm(problem.matrix((name,)), dim=0)
            return norms
        site = problem.layout.sites[name]
        return torch.ones(site.in_features, device=site.weight.device)


class Cats:
    """Contextual thresholds on the activated gate; attention and the gate itself stay dense."""

    name = "cats"
    needs_holdout = False

    def wants(self, layout: Layout) -> set[tuple[str, ...]]:
        return _groups(layout, [block.ups[0] for block in layout.blocks])

    def solve(self, problem: Problem) -> list[Adapter]:
        if problem.budget >= 1:
            return []
        blocks = [block for block in problem.layout.blocks if problem.calibrated(block.sites, 1)]
        adaptable = tuple(name for block in blocks for name in _masked_sites(block))
        fraction = split_budget(problem, adaptable, why="CATS leaves attention and the gate of every MLP dense").fraction
        problem.skips += [Skip(name, "dense in CATS") for name in problem.counted() if name not in adaptable]
        return [_threshold_block(problem, block, min(1.0, fraction)) for block in problem.steps.each(blocks)]


def _masked_sites(block: MlpBlock) -> tuple[str, ...]:
    """Down, and the up projection when a gate of its own decides which of its rows are needed."""
    if block.activation is None:
        return (block.down,)
    return (block.down, block.ups[1 - block.gate])


def _output_basis(problem: Problem, names: tuple[str, ...]) -> tuple[Basis, Tensor, Tensor]:
    """(basis of the output of stacked linears, second moment of their input, energy of the output)."""
    weight, moment = problem.matrix(names), second_moment(problem.rows(names[0]))
    total = torch.einsum("oi,ij,oj->", weight.double(), moment, weight.double())
    return output_basis(weight, moment), moment, total


def _threshold_block(problem: Problem, block: MlpBlock, fraction: float) -> Adapter:
    profile = problem.once(("cats", block.down), partial(_neuron_profile, problem, block))
    threshold = neuron_threshold(profile, fraction)
    down = problem.layout.sites[block.down]
    ones = torch.ones(down.in_features, device=down.weight.device)
    if block.activation is None:
        return neuron_adapter(problem, block.down, threshold, ones, fraction)
    return gated_adapter(
        problem, block, torch.tensor([threshold], dtype=torch.float32, device="cpu"), fraction * down.in_features
    )


def _neuron_profile(problem: Problem, block: MlpBlock) -> Profile:
    """Of the activated gate, or of down's input where no gate of its own is activated."""
    rows = problem.rows(block.ups[0])
    if block.activation is None:
        values = torch.cat([hidden_rows(problem, block, chunk) for chunk in rows.split(2048)])
    else:
        gate = (block.ups[block.gate],)
        weight, bias = problem.matrix(gate), problem.bias(gate)
        linear = torch.nn.functional.linear
        values = torch.cat([block.activation(linear(chunk.float(), weight, bias)).float() for chunk in rows.split(2048)])
    return importance_profile(values, values.new_ones(values.shape[1]))

"""recipe="paper": RaNA as published (Algorithms 1 and 2), for any architecture.

    qkv (stacked, or one fused linear)   rank adapter, (rank, threshold) by the line search on coverage
    up, gate                             rank adapters likewise; down: neuron adapter
    the MLP's budget                     split over its linears by a grid search on the MLP's output error
    everything else                      dense; the adapted layers have what the budget leaves, by one fraction

The paper's grid gives a linear 3/18 ... 9/18 of its MLP's budget, half to one and a half times an equal share; here
the shares are multiples 3/6 ... 9/6 of the share by size, which is the same grid for three equal linears and also
covers an up without a gate, or gate and up fused into one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.calibration.layout import Layout, MlpBlock
from rana_fx.calibration.score_histogram import Profile
from rana_fx.graph.linears import Skip
from rana_fx.recipes.basis import Basis, RankThreshold, output_basis, second_moment
from rana_fx.recipes.builders import neuron_adapter, rank_adapter
from rana_fx.recipes.importance import importance_profile, neuron_threshold
from rana_fx.recipes.mlp_rows import hidden_rows
from rana_fx.recipes.paper.line_search import Energies, candidate_ranks, energies, feasible_kept, line_search
from rana_fx.recipes.paper.split_search import SplitCandidate, successive_elimination
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.registry import split_budget

_MULTIPLES = tuple(step / 6 for step in range(3, 10))
_UNADAPTED = {
    "attention_out": "attention output projections stay dense in the paper's recipe",
    "head": "outside the blocks: dense in the paper's recipe",
    "stem": "outside the blocks: dense in the paper's recipe",
    "other": "neither an attention input nor part of an MLP block; dense in the paper's recipe",
}


class Paper:
    """The published recipe."""

    name = "paper"
    needs_holdout = False

    def wants(self, layout: Layout) -> set[tuple[str, ...]]:
        """Inputs of attention stacks and of MLP blocks."""
        firsts = [stack[0] for stack in layout.stacks()] + [block.ups[0] for block in layout.blocks]
        return {layout.sites_of_group(name) for name in firsts}

    def solve(self, problem: Problem) -> list[Adapter]:
        layout = problem.layout
        for site in layout.sites.values():
            if site.counted and site.role in _UNADAPTED:
                problem.skips.append(Skip(site.name, _UNADAPTED[site.role]))
        every: list[tuple[str, ...] | MlpBlock] = [*layout.stacks(), *layout.blocks]
        units = [unit for unit in every if _calibrated(problem, unit)]
        fraction, units = _feasible(problem, units)
        moments: dict[int, Tensor] = {}
        adapters: list[Adapter] = []
        for unit in problem.steps.each(units):
            names = unit.ups if isinstance(unit, MlpBlock) else unit
            rows = problem.rows(names[0])
            stacks = [(up,) for up in unit.ups] if isinstance(unit, MlpBlock) else [unit]
            bases = problem.once(("paper", *stacks), partial(_bases, problem, stacks, moments))
            if isinstance(unit, MlpBlock):
                adapters += _adapt_mlp(problem, unit, rows, bases, fraction)
            else:
                adapters.append(_adapt_stack(problem, unit, bases[0], fraction))
        return adapters


def _bases(problem: Problem, stacks: Sequence[tuple[str, ...]], moments: dict[int, Tensor]) -> list[tuple[Basis, Energies]]:
    """Of stacks that read one tensor. ``moments``: by group; only the latest is kept."""
    rows, group = problem.rows(stacks[0][0]), problem.layout.sites[stacks[0][0]].group
    if group not in moments:
        moments.clear()
        moments[group] = second_moment(rows)
    found = [output_basis(problem.matrix(names), moments[group]) for names in stacks]
    return [(basis, energies(basis.b_DI, rows)) for basis in found]


def _calibrated(problem: Problem, unit: tuple[str, ...] | MlpBlock) -> bool:
    names, first = (unit.sites, unit.ups[0]) if isinstance(unit, MlpBlock) else (unit, unit[0])
    return problem.calibrated(names, problem.layout.sites[first].in_features)


def _feasible(problem: Problem, units: list[tuple[str, ...] | MlpBlock]) -> tuple[float, list[tuple[str, ...] | MlpBlock]]:
    """The common fraction, and the units that have a feasible rank at it; the others stay dense, at their dense cost."""
    while True:
        names = tuple(name for unit in units for name in (unit.sites if isinstance(unit, MlpBlock) else unit))
        fraction = split_budget(problem, names).fraction
        if fraction >= 1:
            problem.skips += [Skip(name, "the budget leaves it dense") for name in names]
            return fraction, []
        feasible = [unit for unit in units if _is_feasible(problem, unit, fraction)]
        if len(feasible) == len(units):
            return fraction, units
        for unit in units:
            if unit not in feasible:
                members = unit.sites if isinstance(unit, MlpBlock) else unit
                reason = f"no feasible rank at {fraction:.3f} of its dense cost: it stays dense"
                problem.skips += [Skip(name, reason) for name in members]
        units = feasible


def _is_feasible(problem: Problem, unit: tuple[str, ...] | MlpBlock, fraction: float) -> bool:
    if isinstance(unit, MlpBlock):
        return any(
            all(_rank_exists(problem, (up,), fraction * share) for up, share in zip(unit.ups, split, strict=False))
            for split in splits([problem.size((name,)) for name in unit.sites])
            if fraction * split[-1] <= 1
        )
    return _rank_exists(problem, unit, fraction)


def _rank_exists(problem: Problem, names: tuple[str, ...], fraction: float) -> bool:
    width = problem.layout.sites[names[0]].in_features
    out = sum(problem.layout.sites[name].out_features for name in names)
    tokens = max(1, len(problem.rows(names[0])))
    return any(feasible_kept(rank, out, width, fraction, tokens) is not None for rank in candidate_ranks(min(width, out)))


def splits(sizes: list[float]) -> list[tuple[float, ...]]:
    """Multiples of the common fraction, per linear, whose total cost is the MLP's: all on the grid but the largest."""
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    found = []
    for chosen in itertools.product(_MULTIPLES, repeat=len(sizes) - 1):
        others = iter(chosen)
        split = [0.0 if index == largest else next(others) for index in range(len(sizes))]
        others_cost = sum(size * share for size, share in zip(sizes, split, strict=True))
        split[largest] = (sum(sizes) - others_cost) / sizes[largest]
        if _MULTIPLES[0] - 1e-9 <= split[largest] <= _MULTIPLES[-1] + 1e-9:
            found.append(tuple(round(share, 12) for share in split))
    return found


def _adapt_stack(problem: Problem, names: tuple[str, ...], measured: tuple[Basis, Energies], fraction: float) -> Adapter:
    basis, energy = measured
    sites = [problem.layout.sites[name] for name in names]
    (found,) = line_search(energy, sum(site.out_features for site in sites), sites[0].in_features, [fraction])
    assert found is not None
    return rank_adapter(problem, names, basis, found)


def _adapt_mlp(
    problem: Problem, block: MlpBlock, rows_TI: Tensor, found: list[tuple[Basis, Energies]], fraction: float
) -> list[Adapter]:
    bases, measured = [basis for basis, _ in found], [energy for _, energy in found]
    norms = torch.linalg.vector_norm(problem.matrix((block.down,)), dim=0)
    hidden = torch.cat([hidden_rows(problem, block, chunk) for chunk in rows_TI.split(2048)])
    candidates = _candidates(problem, block, measured, importance_profile(hidden, norms), fraction)
    best, error = successive_elimination(problem, block, bases, norms, candidates, rows_TI, hidden)
    adapters = [rank_adapter(problem, (up,), basis, chosen) for up, basis, chosen in zip(block.ups, bases, best.ups, strict=True)]
    down = neuron_adapter(problem, block.down, best.threshold, norms, best.split[-1] * fraction)
    return [*adapters, _with_error(down, error)]


def _with_error(adapter: Adapter, error: float) -> Adapter:
    """The MLP's relative output error is reported with its last linear."""
    return replace(adapter, error=error)


def _candidates(
    problem: Problem, block: MlpBlock, measured: list[Energies], profile: Profile, fraction: float
) -> list[SplitCandidate]:
    sites = [problem.layout.sites[name] for name in block.sites]
    # beyond all neurons down has no use for its share
    tried = [split for split in splits([problem.size((name,)) for name in block.sites]) if split[-1] * fraction <= 1]
    found: list[dict[float, RankThreshold | None]] = []
    for index, energy in enumerate(measured):
        shares = list(dict.fromkeys(split[index] for split in tried))
        shape = sites[index].out_features, sites[index].in_features
        choices = line_search(energy, *shape, [share * fraction for share in shares])
        found.append(dict(zip(shares, choices, strict=True)))
    candidates = []
    for split in tried:
        chosen = [by_share[share] for by_share, share in zip(found, split, strict=False)]
        feasible = tuple(ranks for ranks in chosen if ranks is not None)
        if len(feasible) == len(chosen):
            candidates.append(SplitCandidate(split, feasible, neuron_threshold(profile, split[-1] * fraction)))
    return candidates

"""Lambda fitted on the adapted model: the allocation that meets the budget there and moves the model's output least.

In: a prepared problem: decisions and an instrumented model. Out: adapters. Adapted layers read other activations than dense
ones, so lambda is fitted again until the adapted model itself, simulated on held-out batches, meets the target. Two allocations
are tried so: one lambda for the whole model, and one fraction of its dense cost for every unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rana_fx.adapter import Adapter
from rana_fx.cost import Kept
from rana_fx.errors import BudgetUnreachable
from rana_fx.graph.linears import Skip
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.allocate import Allocation, allocate, cost_of, loss_of
from rana_fx.recipes.rana.builders import for_plan
from rana_fx.recipes.rana.decision import Choice, Decision, Points
from rana_fx.recipes.rana.expected_loss import mean_entropy, remark
from rana_fx.recipes.rana.operating_point import JOINT_KINDS, OperatingPoint
from rana_fx.recipes.rana.options import Options
from rana_fx.recipes.rana.prepare import Prepared
from rana_fx.recipes.rana.units import Unit
from rana_fx.recipes.registry import unreachable
from rana_fx.recipes.simulate import Outcome, simulate
from rana_fx.recipes.stages import Stages

_ROUNDS = 4
_MOST_ROUNDS = 10  # where the model still costs more than the target
_FITS = {"multiplier": 3, "fraction": 1}  # of an allocation, at most: each takes about ``_ROUNDS`` simulations
_CLOSE = 0.002  # of the dense cost: the target is met
_LARGEST_CORRECTION = 4.0
_TOLERATED = 0.01  # of the dense cost, and a tenth of the target: the most that the target may be exceeded by


@dataclass(frozen=True, eq=False)
class Simulated:
    """Operating points, the adapted model's outcome on held-out batches, and its measured cost per token."""

    points: Points
    outcome: Outcome
    cost: float


def refine(problem: Problem, prepared: Prepared, options: Options, *, keep: bool = False) -> Stages:
    """The adapters, in stages "allocate" and "build".

    Args:
        keep: candidates are needed again, for other budgets; otherwise they are released one by one as their adapters are made.

    Raises:
        BudgetUnreachable: the adapted model costs more than the target at any lambda.
    """
    return _Refinement(problem, prepared, options, keep=keep).run()


class _Refinement:
    def __init__(self, problem: Problem, prepared: Prepared, options: Options, *, keep: bool) -> None:
        self._problem, self._model, self._decisions = problem, prepared.model, prepared.decisions
        self._keep = keep
        self._allocations = options.allocations
        assert problem.holdout is not None
        self._held_out = problem.holdout.held
        self._dense = prepared.dense
        adaptable = sum(decision.dense_cost for decision in self._decisions)
        self._split = problem.limit.split(problem.size(problem.counted()), adaptable)
        self._target = self._split.target
        tolerated = min(_TOLERATED * self._split.total, 0.1 * self._target)
        self._cost_cap = self._target + tolerated if options.refine_lambda else math.inf
        self._rounds = _ROUNDS if options.refine_lambda else 1

    def run(self) -> Stages:
        if self._target <= 0:
            raise self._nothing_left()
        yield "allocate"
        steps = self._problem.steps
        steps.expect(self._rounds * sum(_FITS[name] for name in self._allocations))
        best = self._best()
        self._note_large_loss(best)
        yield "build"
        adapters = []
        decision_of = {unit: decision for decision in self._decisions for unit in decision.units}
        if not self._keep:
            self._decisions.clear()
        order = {name: index for index, name in enumerate(self._problem.layout.sites)}
        for unit, point in steps.each(sorted(best.points.items(), key=lambda item: order[item[0][0]])):
            decision = decision_of.pop(unit)
            made = decision.adapters(self._problem, unit, point)
            adapters += [for_plan(self._problem, as_simulated(adapter, best.outcome)) for adapter in made]
            if not made:
                self._problem.skips += _left_dense(unit, decision, point)
            if not self._keep:
                decision.candidates.pop(unit)
        return adapters

    def _best(self) -> Simulated:
        """Of the allocations tried. Raises BudgetUnreachable."""
        tried, correction = [], 1.0
        for name in self._allocations:
            if name == "multiplier":
                found, correction = self._one_multiplier()
                tried.append(found)
            else:
                tried.append(self._one_fraction(correction))
        best = min(tried, key=self._rank)
        if best.cost > self._cost_cap:
            lowest = self._split.budget_of(min(found.cost for found in tried))
            raise unreachable(self._problem, lowest, "masks keep no less than that in the adapted model")
        return best

    def _rank(self, found: Simulated) -> tuple[bool, float]:
        """Infeasible allocations rank last."""
        return found.cost > self._cost_cap, found.outcome.divergence

    def _one_multiplier(self) -> tuple[Simulated, float]:
        """(the best of: joint candidates as predicted, none, joint candidates with their loss corrected; that correction)."""
        tried, correction = [self._fit(allocate(self._decisions, self._target))], 1.0
        if any(point.kind in JOINT_KINDS for point in tried[0].points.values()):
            tried.append(self._fit(allocate(self._decisions, self._target, joint=False)))
            correction = max(1.0, joint_correction(*tried))
            if correction > 1:
                tried.append(self._fit(allocate(self._decisions, self._target, correction=correction)))
        return min(tried, key=self._rank), correction

    def _one_fraction(self, correction: float) -> Simulated:
        """Every unit at the same fraction of its dense cost, by a multiplier of its own; an MLP jointly where that loses less."""
        fraction = self._split.fraction
        scale: dict[Unit, float] = {}
        chosen: dict[Unit, Choice] = {}
        for unit, candidates in ((u, c) for decision in self._decisions for u, c in decision.candidates.items()):
            alone = allocate([Decision({unit: candidates})], fraction * candidates.dense_cost)
            scale[unit], chosen[unit] = alone.multiplier, alone.chosen[unit]
        for decision in self._decisions:
            if decision.joint is None:
                continue
            target = fraction * decision.dense_cost
            joint = Allocation(1.0, decision.joint_choices(), correction=correction).at_cost([decision], target)
            together = joint.points([decision])
            apart = Allocation(1.0, chosen, scale).points([decision])
            # the gate alone may cost more than the target
            if cost_of(together) <= 1.01 * target and loss_of(together) < loss_of(apart):
                chosen |= joint.chosen
                scale |= dict.fromkeys(decision.units, joint.multiplier)
        return self._fit(Allocation(1.0, chosen, scale, correction))

    def _fit(self, allocation: Allocation) -> Simulated:
        """The same candidates at the lambda at which the adapted model meets the target, as near as a few simulations find it."""
        best, aim = None, self._target
        for attempts in range(_MOST_ROUNDS):
            if attempts:
                allocation = allocation.at_cost(self._decisions, aim, near=allocation.multiplier)
            found = self._simulate(allocation.points(self._decisions))
            # with few rounds left the nearest counts: infeasible ones rank last
            if best is None or self._distance(found) < self._distance(best):
                best = found
            near = abs(found.cost - self._target) < min(_CLOSE * self._split.total, 0.02 * self._target)
            if near or (attempts + 1 >= self._rounds and best.cost <= self._cost_cap):
                break
            # the predicted cost at which the measured cost would be the target
            aim = cost_of(found.points) * self._target / max(found.cost, 1e-3 * self._target)
        assert best is not None
        return best

    def _distance(self, found: Simulated) -> tuple[bool, float]:
        return found.cost > self._cost_cap, abs(found.cost - self._target)

    def _simulate(self, points: Points) -> Simulated:
        adapters = {
            unit: decision.adapters(self._problem, unit, points[unit]) for decision in self._decisions for unit in decision.units
        }
        flat = [adapter for made in adapters.values() for adapter in made]
        outcome = simulate(self._model, self._problem.layout, flat, self._held_out, self._dense)
        self._problem.steps.advance()
        return Simulated(points, outcome, self._measured_cost(points, adapters, outcome))

    def _measured_cost(self, points: Points, adapters: Mapping[Unit, list[Adapter]], outcome: Outcome) -> float:
        cost = 0.0
        for unit, made in adapters.items():
            if not made:
                cost += points[unit].cost  # without an adapter its cost is as predicted
            for adapter in made:
                cost += adapter.cost(outcome.kept.get(adapter.name, Kept()))[self._problem.metric]
        return cost

    def _note_large_loss(self, found: Simulated) -> None:
        """A remark where the adapted model loses more than a smaller dense model of the same cost would (expected_loss.py)."""
        text = remark(
            budget=self._problem.asked or self._problem.budget,
            divergence=found.outcome.divergence,
            entropy=mean_entropy(self._dense, self._model),
        )
        if text:
            self._problem.note(text)

    def _nothing_left(self) -> BudgetUnreachable:
        counted, share = self._problem.counted(), self._split.fixed_cost / self._split.total
        skips = [skip for skip in self._problem.skips if isinstance(skip, Skip) and skip.site in counted]
        reasons = [f": {skip.site}: {skip.reason}" for skip in skips[:1]]
        return unreachable(self._problem, share, "".join([f"{share:.1%} of the cost is in layers that stay dense", *reasons]))


def as_simulated(adapter: Adapter, outcome: Outcome) -> Adapter:
    """With the ranks, inputs and exact outputs that it kept in the adapted model."""
    kept = outcome.kept.get(adapter.name)
    return adapter if kept is None else adapter.with_kept(kept)  # None: a layer that no held-out batch reached


def joint_correction(together: Simulated, apart: Simulated) -> float:
    """Measured over predicted loss of the joint candidates in ``together``, at most 4.

    All other candidates are taken to lose as many times their predictions as they do in ``apart``, which has no joint ones.
    What a joint candidate drops is more alike from token to token than what a mask of inputs drops, and adds up
    (docs/explanation/recipes.md).
    """
    joint = loss_of({unit: point for unit, point in together.points.items() if point.kind in JOINT_KINDS})
    others = loss_of(together.points) - joint
    predicted = loss_of(apart.points)
    if joint <= 0 or apart.outcome.divergence <= 0:
        return 1.0
    return min(_LARGEST_CORRECTION, (together.outcome.divergence * predicted / apart.outcome.divergence - others) / joint)


def _left_dense(unit: Unit, decision: Decision, point: OperatingPoint) -> list[Skip]:
    """With the reason: of a joint candidate's units only the gate may be dense."""
    # reasons are part of a plan's digest: another wording would be another plan
    if point.kind not in JOINT_KINDS:
        return [Skip(name, "the budget is better spent elsewhere: it stays dense") for name in unit]
    assert decision.joint is not None
    mlp = decision.joint.mlp
    return [Skip(name, f"it tells which neurons {mlp.down} needs: it stays dense") for name in unit if name == mlp.gate]

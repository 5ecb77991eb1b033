"""Lagrangian rate allocation of a budget over decisions: one multiplier lambda for all units (reverse water-filling).

In: decisions and a target cost. Out: an ``Allocation``: a candidate for each unit, and the lambda at which all operating points
together cost the target; at it every decision has the least loss + lambda x cost. Cost falls as lambda rises, so bisection finds
it. Where candidates jump, as between formats, the last step is taken decision by decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rana_fx.recipes.rana.decision import Choice, Decision, Points
from rana_fx.recipes.rana.operating_point import OperatingPoint
from rana_fx.recipes.rana.units import Unit

_STEP = 0.1  # of the logarithm, between the multipliers that candidates are chosen at
_LOWEST, _HIGHEST = -60.0, 10.0  # logarithms of the multiplier
_PRECISION = 5e-3


@dataclass(frozen=True)
class Allocation:
    """A candidate for each unit.

    Attributes:
        multiplier: lambda, common to all units. scale: a unit's own multiplier over the common one; default 1.
        correction: of joint candidates, see ``MlpCandidate.point``.
    """

    multiplier: float
    chosen: Mapping[Unit, Choice]
    scale: Mapping[Unit, float] = field(default_factory=dict)
    correction: float = 1.0

    def points(self, decisions: Sequence[Decision]) -> Points:
        """The operating point of each unit."""
        return self._points_at(decisions, self.multiplier)

    def at_cost(self, decisions: Sequence[Decision], cost: float, *, near: float | None = None) -> Allocation:
        """The same candidates at the multiplier at which they cost ``cost`` together. ``near``: a multiplier close to it."""

        def total(logarithm: float) -> float:
            return cost_of(self._points_at(decisions, math.exp(logarithm)))

        low, high = (_LOWEST, _HIGHEST) if near is None else (math.log(near) - 2, math.log(near) + 2)
        if near is not None and (total(low) < cost or total(high) > cost):
            low, high = _LOWEST, _HIGHEST
        while high - low > _PRECISION:
            middle = (low + high) / 2
            low, high = (middle, high) if total(middle) > cost else (low, middle)
        return replace(self, multiplier=math.exp(high))

    def _points_at(self, decisions: Sequence[Decision], multiplier: float) -> Points:
        return {
            unit: decision.point(unit, self.chosen[unit], multiplier * self.scale.get(unit, 1.0), self.correction)
            for decision in decisions
            for unit in decision.units
        }


def allocate(decisions: Sequence[Decision], cost: float, *, joint: bool = True, correction: float = 1.0) -> Allocation:
    """The allocation that costs ``cost`` with the least loss.

    Args:
        joint: False: no MLP takes its joint candidate. correction: of joint candidates, see ``MlpCandidate.point``.
    """

    def best(logarithm: float) -> Points:
        points: Points = {}
        for decision in decisions:
            points |= decision.best(math.exp(logarithm), joint=joint, correction=correction)
        return points

    masks = {unit: Choice("neuron") for decision in decisions for unit in decision.units}
    start = math.log(Allocation(1.0, masks).at_cost(decisions, cost).multiplier)
    low, high = start - 1.0, start + 1.0
    larger, smaller = best(low), best(high)
    while cost_of(larger) < cost and low > _LOWEST:
        low, high, smaller = low - 4.0, low, larger
        larger = best(low)
    while cost_of(smaller) > cost and high < _HIGHEST:
        low, high, larger = high, high + 4.0, smaller
        smaller = best(high)
    while high - low > _STEP:
        middle = (low + high) / 2
        found = best(middle)
        if cost_of(found) > cost:
            low, larger = middle, found
        else:
            high, smaller = middle, found
    # with few units the corners of the hull are coarse: masks alone may bridge them better than candidates
    tried = [_between(decisions, larger, smaller, cost), *(_choices(points) for points in (larger, smaller))]
    return _least_loss(decisions, [Allocation(math.exp(high), chosen, correction=correction) for chosen in tried], cost)


def cost_of(points: Mapping[Unit, OperatingPoint]) -> float:
    """Of all units together."""
    return sum(point.cost for point in points.values())


def loss_of(points: Mapping[Unit, OperatingPoint]) -> float:
    """Of all units together."""
    return sum(point.loss for point in points.values())


def _least_loss(decisions: Sequence[Decision], tried: Sequence[Allocation], cost: float) -> Allocation:
    """Each at the multiplier at which it costs ``cost``: the one with the least loss, infeasible ones last."""
    best, least = tried[0], (True, math.inf)
    for allocation in tried:
        fitted = allocation.at_cost(decisions, cost, near=allocation.multiplier)
        points = fitted.points(decisions)
        found = (cost_of(points) > 1.01 * cost, loss_of(points))
        if found < least:
            best, least = fitted, found
    return best


def _between(decisions: Sequence[Decision], larger: Points, smaller: Points, cost: float) -> dict[Unit, Choice]:
    """Candidates jump at corners of the hull: those of the lower multiplier by loss saved per cost, while the target allows."""
    total, chosen = cost_of(smaller), _choices(smaller)
    jumps = []
    for units in (units for decision in decisions for units in decision.moves(larger, smaller)):
        more = sum(larger[unit].cost - smaller[unit].cost for unit in units)
        if more > 0 and any(chosen[unit] != Choice.of(larger[unit]) for unit in units):
            jumps.append((sum(larger[unit].loss - smaller[unit].loss for unit in units) / more, more, units))
    for _, more, units in sorted(jumps, key=lambda jump: jump[0]):
        if total + more <= cost:
            total += more
            chosen |= {unit: Choice.of(larger[unit]) for unit in units}
    return chosen


def _choices(points: Points) -> dict[Unit, Choice]:
    return {unit: Choice.of(point) for unit, point in points.items()}

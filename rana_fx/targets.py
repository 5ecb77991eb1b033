"""The cheapest plan that keeps a promise on held-out text: a search over budgets, each measured.

In: a function that makes and measures the plan of one budget. Out: the cheapest measured plan whose bound, the upper end of the
95 % interval, keeps the target, and all points that were measured.

The search brackets the target between two budgets and interpolates the logarithm of the bound, which falls nearly linearly with
the budget; it ends when the bracket is ``STEP`` wide. That more budget loses less decides which budget is tried next. The result
is the cheapest of the plans that were measured; where a dearer one of these loses more than a cheaper one, it has a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from rana_fx.curve import Curve, CurvePoint, Promise
from rana_fx.errors import BudgetUnreachable, TargetUnreachable
from rana_fx.plan import Plan
from rana_fx.skips import Note

START = 0.58
LOWEST, HIGHEST = 0.05, 0.95  # with more there is nothing to gain
STEP = 0.01  # of the dense cost
MOST = 14  # budgets
_SLOPE = -8.0  # of the logarithm of a bound by the budget, while only one is known
_FAR = 0.15  # the farthest that is extrapolated
_NOTED = 0.02  # of the target: a rise of a bound with the cost that is no rounding
_SMALLEST = 1e-3  # of the target: bounds below it, or not positive, count as so much

Measure = Callable[[float], tuple[Plan, CurvePoint]]


def search(promise: Promise, measure: Measure, *, recipe: str, metric: str) -> Plan:
    """The cheapest plan, with its curve; with a note where the cheapest that there is keeps the promise.

    Raises:
        TargetUnreachable, BudgetUnreachable.
    """
    found = _Search(promise, metric)
    while (budget := found.next()) is not None:
        try:
            found.add(*measure(budget))
        except BudgetUnreachable as error:
            found.too_low(budget, error)
    return found.result(recipe)


@dataclass(frozen=True)
class _Tried:
    budget: float
    point: CurvePoint
    high: float  # the bound
    kept: bool
    cost: float


class _Search:
    def __init__(self, promise: Promise, metric: str) -> None:
        self._promise, self._metric = promise, metric
        self._tried: list[_Tried] = []
        self._floor = LOWEST
        self._unreachable: list[BudgetUnreachable] = []
        self._best: tuple[Plan, _Tried] | None = None

    def add(self, plan: Plan, point: CurvePoint) -> None:
        """Only the cheapest plan is kept in memory."""
        interval = self._promise.of(point)
        assert interval is not None
        cost: float = getattr(point, self._metric)
        tried = _Tried(point.budget, point, interval.high, self._promise.kept(point), cost)
        self._tried.append(tried)
        if tried.kept and (self._best is None or (cost, tried.budget) < (self._best[1].cost, self._best[1].budget)):
            self._best = plan, tried

    def too_low(self, budget: float, error: BudgetUnreachable) -> None:
        """No plan costs so little."""
        self._unreachable.append(error)
        lowest = float(str(error.facts["lowest"]))
        self._floor = max(self._floor, budget + STEP, lowest)

    def next(self) -> float | None:
        """The budget to try; None: the search is over."""
        if len(self._tried) + len(self._unreachable) >= MOST or self._floor > HIGHEST:
            return None
        if not self._tried:
            return max(START, self._floor)
        kept, fails = ([tried for tried in self._tried if tried.kept == wanted] for wanted in (True, False))
        if not kept:
            last = max(fails, key=lambda tried: tried.budget)
            if last.budget >= HIGHEST:
                return None
            return self._beyond(last, min(last.budget + _FAR, HIGHEST), upwards=True)
        best = min(kept, key=lambda tried: tried.budget)
        below = [tried for tried in fails if tried.budget < best.budget]
        if not below:
            if best.budget <= self._floor + 1e-9:
                return None
            return self._beyond(best, max(best.budget - 2 * _FAR, self._floor), upwards=False)
        left = max(below, key=lambda tried: tried.budget)
        return None if best.budget - left.budget <= STEP + 1e-9 else self._between(left, best)

    def _beyond(self, last: _Tried, farthest: float, *, upwards: bool) -> float:
        """Outside of all budgets tried: where a line through the last two, or of the usual slope, meets the target."""
        others = [tried for tried in self._tried if tried is not last and abs(tried.budget - last.budget) > STEP / 2]
        slope = _SLOPE
        if others:
            other = min(others, key=lambda tried: abs(tried.budget - last.budget))
            slope = min(_SLOPE / 4, (self._log(last) - self._log(other)) / (last.budget - other.budget))
        aim = last.budget - self._log(last) / slope
        nearest = last.budget + (2 * STEP if upwards else -2 * STEP)
        return min(max(aim + STEP / 2, nearest), farthest) if upwards else max(min(aim - STEP / 2, nearest), farthest)

    def _between(self, left: _Tried, right: _Tried) -> float:
        """Just on the side of the crossing where the bracket shrinks more; its middle, where interpolation does not converge."""
        width = right.budget - left.budget
        share = self._log(left) / max(1e-9, self._log(left) - self._log(right))
        aim = left.budget + min(1.0, max(0.0, share)) * width
        inside = sum(left.budget < tried.budget < right.budget for tried in self._tried)
        if inside or len(self._tried) + len(self._unreachable) >= MOST - 5:
            return (left.budget + right.budget) / 2
        near_left, near_right = aim - left.budget < STEP, right.budget - aim < STEP
        aim += -0.6 * STEP if near_right and not near_left else 0.4 * STEP
        return min(max(aim, left.budget + STEP / 2), right.budget - STEP / 2)

    def _log(self, tried: _Tried) -> float:
        """Of the bound over the target: above zero where it is missed."""
        return math.log(max(tried.high / self._promise.limit, _SMALLEST))

    def result(self, recipe: str) -> Plan:
        """Raises TargetUnreachable; BudgetUnreachable where the recipe reaches no budget that saves anything."""
        if not self._tried:
            raise self._unreachable[-1]
        name, limit = self._promise.name, self._promise.limit
        if self._best is None:
            best = min(self._tried, key=lambda tried: tried.high)
            interval = self._promise.of(best.point)
            assert interval is not None
            raise TargetUnreachable(
                name=name, limit=limit, recipe=recipe, count=len(self._tried), budget=best.budget, best=best.high,
                mean=interval.mean, documents=best.point.documents,
            )  # fmt: skip
        plan, best = self._best
        notes = []
        if all(tried.kept for tried in self._tried if tried.budget <= best.budget) and best.budget <= self._floor + STEP:
            notes.append(f"{name}={limit:g} is already kept by the cheapest plan that there is")
        ordered = sorted(self._tried, key=lambda tried: tried.cost)
        if any(right.high > left.high + _NOTED * limit for left, right in zip(ordered, ordered[1:], strict=False)):
            notes.append(
                f"{name} rises between two budgets (plan.curve): a plan that was not measured may be cheaper and keep it"
            )
        points = tuple(sorted((tried.point for tried in self._tried), key=lambda point: point.budget))
        return replace(plan, curve=Curve(points, self._promise), skips=(*plan.skips, *(Note("", text) for text in notes)))

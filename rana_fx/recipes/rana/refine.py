"""Choices that cost the budget in the adapted model and move its output least.

In: a menu per unit, and a stage. Out: adapters. Adapted layers see other activations than dense ones, so the price is set again
until the adapted model itself, on held-out batches, spends what was asked. Two allocations are tried so: one price for the
whole model, and one fraction for every unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rana_fx.adapter import Adapter
from rana_fx.calibration.probe import Stage
from rana_fx.calibration.sensitivity import compared
from rana_fx.errors import BudgetUnreachable
from rana_fx.graph.linears import Skip
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.allocate import Choice, allocate, points_at, price_for
from rana_fx.recipes.rana.builders import build, settled
from rana_fx.recipes.rana.candidates import Menu
from rana_fx.recipes.rana.mlp_candidate import cuts_of
from rana_fx.recipes.rana.operating_point import CUTS, Point, Unit
from rana_fx.recipes.simulate import Outcome, simulate

ALLOCATIONS = ("price", "fraction")  # one for the whole model, one for every unit

_ROUNDS = 4
_MOST_ROUNDS = 10  # where the model still spends more than asked
_CLOSE = 0.002  # of the dense cost: near enough to what was asked
_MOST_SURCHARGE = 4.0
_TOLERATED = 0.01  # of it, and a tenth of what was asked: more than asked by so much is not taken


@dataclass(frozen=True, eq=False)
class _Found:
    """Points at the price at which the adapted model spends what was asked, what they do, and what they spend."""

    points: dict[Unit, Point]
    outcome: Outcome
    spent: float


def search(
    problem: Problem,
    stage: Stage,
    menus: dict[Unit, Menu],
    *,
    allocations: Sequence[str] = ALLOCATIONS,
    settles: bool = True,
) -> list[Adapter]:
    """The adapters. Menus are dropped one by one as these are made.

    Args:
        allocations: those that are tried.
        settles: the price is set again until the adapted model costs what was asked; False: it costs what it costs.

    Raises:
        BudgetUnreachable.
    """
    return _Search(problem, stage, menus, allocations, settles=settles).run()


class _Search:
    def __init__(
        self, problem: Problem, stage: Stage, menus: dict[Unit, Menu], allocations: Sequence[str], *, settles: bool
    ) -> None:
        self._problem, self._stage, self._menus = problem, stage, menus
        self._allocations = allocations
        assert problem.rehearsal is not None
        self._held = problem.rehearsal.held
        self._dense = [compared(stage.run(batch)) for batch in self._held]
        self._total = problem.size(problem.counted())
        self._left = self._total - sum(menu.dense_cost for menu in menus.values())
        self._asked = problem.budget * self._total - self._left
        self._most = self._asked + min(_TOLERATED * self._total, 0.1 * self._asked) if settles else math.inf
        self._rounds = _ROUNDS if settles else 1

    def run(self) -> list[Adapter]:
        if self._asked <= 0:
            counted = self._problem.counted()
            reasons = [f": {skip.site}: {skip.reason}" for skip in self._problem.skips if skip.site in counted][:1]
            share = self._left / self._total
            raise self._unreachable(share, "".join([f"{share:.1%} of the cost is in layers that stay dense", *reasons]))
        with self._problem.within("allocate"):
            best = self._best()
        adapters = []
        with self._problem.within("build"):
            for unit, point in best.points.items():
                menu = self._menus.pop(unit)
                made = build(self._problem, unit, menu, point)
                adapters += [settled(self._problem, _as_found(adapter, best.outcome)) for adapter in made]
                if not made:
                    self._problem.skips += _left_dense(unit, menu, point)
        return adapters

    def _best(self) -> _Found:
        """Raises BudgetUnreachable."""
        settle = {"price": self._by_price, "fraction": self._by_fraction}
        tried = [settle[name]() for name in self._allocations]
        # what costs more than asked is no answer
        best = min(tried, key=self._rank)
        if best.spent > self._most:
            least = min(found.spent for found in tried)
            raise self._unreachable((least + self._left) / self._total, "masks keep no less than that in the adapted model")
        return best

    def _rank(self, found: _Found) -> tuple[bool, float]:
        return found.spent > self._most, found.outcome.divergence

    def _by_price(self) -> _Found:
        """With cuts, without, and where these lose more than expected, with as many as that leaves worthwhile."""
        tried = [self._settle(*allocate(self._menus, self._asked), None)]
        if any(point.kind in CUTS for point in tried[0].points.values()):
            tried.append(self._settle(*allocate(self._menus, self._asked, cut=False), None))
            surcharge = _surcharge(*tried)
            if surcharge > 1:
                for cut in cuts_of({unit: menu.cut for unit, menu in self._menus.items()}):
                    cut.surcharge = surcharge
                tried.append(self._settle(*allocate(self._menus, self._asked), None))
        return min(tried, key=self._rank)

    def _by_fraction(self) -> _Found:
        fraction = self._asked / (self._total - self._left)
        alone = {unit: allocate({unit: menu}, fraction * menu.dense_cost) for unit, menu in self._menus.items()}
        prices = {unit: price for unit, (price, _) in alone.items()}
        chosen = {unit: found[unit] for unit, (_, found) in alone.items()}
        for cut in cuts_of({unit: menu.cut for unit, menu in self._menus.items()}):
            menus = {unit: self._menus[unit] for unit in cut.of.units}
            given = fraction * sum(menu.dense_cost for menu in menus.values())
            gated = dict.fromkeys(menus, Choice(cut.of.kind))
            price = price_for(menus, gated, given)
            whole, apart = points_at(menus, gated, price), points_at(menus, chosen, 1.0, scale=prices)
            # what its gate costs may be more than the fraction
            reached = sum(point.cost for point in whole.values()) <= 1.01 * given
            if reached and sum(point.loss for point in whole.values()) < sum(point.loss for point in apart.values()):
                chosen, prices = chosen | gated, prices | dict.fromkeys(menus, price)
        return self._settle(1.0, chosen, prices)

    def _settle(self, price: float, chosen: Mapping[Unit, Choice], scale: Mapping[Unit, float] | None) -> _Found:
        best, aim = None, self._asked
        for attempts in range(_MOST_ROUNDS):
            if attempts:
                price = price_for(self._menus, chosen, aim, scale=scale, near=price)
            points = points_at(self._menus, chosen, price, scale=scale)
            adapters = {unit: build(self._problem, unit, self._menus[unit], point) for unit, point in points.items()}
            flat = [adapter for made in adapters.values() for adapter in made]
            outcome = simulate(self._stage, self._problem.layout, flat, self._held, self._dense)
            found = _Found(points, outcome, self._spent(points, adapters, outcome))
            # with few rounds left what is nearest counts: one that spends too much is none
            if best is None or self._distance(found) < self._distance(best):
                best = found
            near = abs(found.spent - self._asked) < min(_CLOSE * self._total, 0.02 * self._asked)
            if near or (attempts + 1 >= self._rounds and best.spent <= self._most):
                break
            # what the menus have to be asked for, so that the model spends what is asked
            planned = sum(point.cost for point in points.values())
            aim = planned * self._asked / max(found.spent, 1e-3 * self._asked)
        assert best is not None
        return best

    def _distance(self, found: _Found) -> tuple[bool, float]:
        return found.spent > self._most, abs(found.spent - self._asked)

    def _spent(self, points: Mapping[Unit, Point], adapters: Mapping[Unit, list[Adapter]], outcome: Outcome) -> float:
        spent = 0.0
        for unit, made in adapters.items():
            if not made:
                spent += points[unit].cost  # what is left of it is dense
            for adapter in made:
                means = (outcome.kept, outcome.router_kept, outcome.exact_kept)
                spent += adapter.cost(self._problem.metric, *(found.get(adapter.name) for found in means))
        return spent

    def _unreachable(self, lowest: float, why: str) -> BudgetUnreachable:
        return BudgetUnreachable(
            budget=self._problem.budget,
            recipe=self._problem.recipe,
            lowest=min(1.0, lowest + 0.01),
            why=why,
            recipes="teal and wina adapt every layer",
        )


def _as_found(adapter: Adapter, outcome: Outcome) -> Adapter:
    """With the ranks, inputs and exact outputs that it kept in the adapted model."""
    if adapter.name not in outcome.kept:
        return adapter  # a layer that no held-out batch reached
    kept, router = outcome.kept[adapter.name], outcome.router_kept.get(adapter.name)
    exact = outcome.exact_kept.get(adapter.name)
    flops, weight_bytes = (adapter.cost(metric, kept, router, exact) for metric in ("flops", "bytes"))
    return replace(adapter, kept=kept, router_kept=router, exact_kept=exact, flops=flops, bytes=weight_bytes)


def _surcharge(whole: _Found, apart: _Found) -> float:
    """What cuts lose over what their menus tell, other entries being as much dearer as they are without cuts.

    What a cut drops is more alike from token to token than what a mask of inputs drops, and adds up (docs/recipes.md).
    """
    cuts = sum(point.loss for point in whole.points.values() if point.kind in CUTS)
    rest = sum(point.loss for point in whole.points.values()) - cuts
    told = sum(point.loss for point in apart.points.values())
    if cuts <= 0 or apart.outcome.divergence <= 0:
        return 1.0
    return min(_MOST_SURCHARGE, (whole.outcome.divergence * told / apart.outcome.divergence - rest) / cuts)


def _left_dense(unit: Unit, menu: Menu, point: Point) -> list[Skip]:
    """Why: of a cut's units the gate alone is dense."""
    if point.kind not in CUTS:
        return [Skip(name, "the budget is better spent elsewhere: it stays dense") for name in unit]
    assert menu.cut is not None
    cut = menu.cut.cut.of
    return [Skip(name, f"it tells which neurons {cut.down} needs: it stays dense") for name in unit if name == cut.gate]

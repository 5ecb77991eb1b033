"""One price for the whole model: the allocation of a budget over units.

In: a menu per unit and a budget. Out: a point per unit, at the one price of a unit of cost (a Lagrange multiplier) at which all
points together cost the budget; each unit is of the kind that is cheapest at that price, loss and cost taken together; where a
cut through several units (cut.py) is cheaper than the best of each, they all take it. Cost falls as the price rises, so bisection
finds it. Where kinds jump, as between storages, the last step is taken unit by unit, or cut by cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rana_fx.recipes.rana.candidates import Menu
from rana_fx.recipes.rana.mlp_candidate import Cut, cuts_of
from rana_fx.recipes.rana.operating_point import Point, Unit

_STEP = 0.1  # of the logarithm, between the prices that kinds are chosen at
_LOWEST, _HIGHEST = -60.0, 10.0  # logarithms of the price
_PRECISION = 5e-3


@dataclass(frozen=True)
class Choice:
    """What a unit is to be: its kind, and how it is stored."""

    kind: str
    storage: int = 0

    def point(self, menu: Menu, price: float) -> Point:
        return menu.point(self.kind, price, storage=self.storage)


def allocate(
    menus: Mapping[Unit, Menu], cost: float, *, scale: Mapping[Unit, float] | None = None, cut: bool = True
) -> tuple[float, dict[Unit, Choice]]:
    """The price at which all points cost ``cost``, and what every unit is there.

    Args:
        scale: a unit's price over the common. cut: False: no block is cut.
    """

    cuts = cuts_of({unit: menu.cut for unit, menu in menus.items()}) if cut else []

    def best(logarithm: float) -> dict[Unit, Point]:
        points = {unit: menu.best(math.exp(logarithm) * scale_of(scale, unit)) for unit, menu in menus.items()}
        for found in cuts:
            shares = {unit: found.point(unit, points[unit].price) for unit in found.of.units}
            if sum(point.total for point in shares.values()) < sum(points[unit].total for unit in shares):
                points |= shares
        return points

    start = math.log(price_for(menus, dict.fromkeys(menus, Choice("neuron")), cost, scale=scale))
    low, high = start - 1.0, start + 1.0
    rich, poor = best(low), best(high)
    while _cost(rich) < cost and low > _LOWEST:
        low, high, poor = low - 4.0, low, rich
        rich = best(low)
    while _cost(poor) > cost and high < _HIGHEST:
        low, high, rich = high, high + 4.0, poor
        poor = best(high)
    while high - low > _STEP:
        middle = (low + high) / 2
        found = best(middle)
        if _cost(found) > cost:
            low, rich = middle, found
        else:
            high, poor = middle, found
    # with few units the corners are coarse: masks alone may bridge them better than kinds
    made = [{unit: _choice(point) for unit, point in points.items()} for points in (rich, poor)]
    return _cheapest(menus, [_between(rich, poor, cost, cuts), *made], cost, scale, math.exp(high))


def _cheapest(
    menus: Mapping[Unit, Menu], made: list[dict[Unit, Choice]], cost: float, scale: Mapping[Unit, float] | None, near: float
) -> tuple[float, dict[Unit, Choice]]:
    """Of some choices, each at the price at which it costs ``cost``, those that lose least: (price, choices)."""
    best, least = (near, made[0]), (True, math.inf)
    for chosen in made:
        price = price_for(menus, chosen, cost, scale=scale, near=near)
        points = points_at(menus, chosen, price, scale=scale)
        found = (_cost(points) > 1.01 * cost, sum(point.loss for point in points.values()))
        if found < least:
            best, least = (price, chosen), found
    return best


def _between(rich: Mapping[Unit, Point], poor: Mapping[Unit, Point], cost: float, cuts: Sequence[Cut]) -> dict[Unit, Choice]:
    """Kinds jump where a unit's hull has a corner: those of the lower price, the most worthwhile first, while there is room."""
    spent, chosen = _cost(poor), {unit: _choice(point) for unit, point in poor.items()}
    jumps = []
    for units in _movable(rich, poor, cuts):
        more = sum(rich[unit].cost - poor[unit].cost for unit in units)
        if more > 0 and any(chosen[unit] != _choice(rich[unit]) for unit in units):
            jumps.append((sum(rich[unit].loss - poor[unit].loss for unit in units) / more, more, units))
    for _, more, units in sorted(jumps, key=lambda jump: jump[0]):
        if spent + more <= cost:
            spent += more
            chosen |= {unit: _choice(rich[unit]) for unit in units}
    return chosen


def _movable(rich: Mapping[Unit, Point], poor: Mapping[Unit, Point], cuts: Sequence[Cut]) -> list[tuple[Unit, ...]]:
    """Units that take their kinds of the lower price together: those of a cut that one of both makes, any other by itself."""
    joined = [cut.of.units for cut in cuts if cut.of.kind in (rich[cut.of.lead].kind, poor[cut.of.lead].kind)]
    inside = {unit for units in joined for unit in units}
    return [*joined, *((unit,) for unit in poor if unit not in inside)]


def _cost(points: Mapping[Unit, Point]) -> float:
    return sum(point.cost for point in points.values())


def _choice(point: Point) -> Choice:
    return Choice(point.kind, point.storage)


def points_at(
    menus: Mapping[Unit, Menu], chosen: Mapping[Unit, Choice], price: float, *, scale: Mapping[Unit, float] | None = None
) -> dict[Unit, Point]:
    """A point per unit, of the kinds chosen."""
    return {unit: chosen[unit].point(menu, price * scale_of(scale, unit)) for unit, menu in menus.items()}


def price_for(
    menus: Mapping[Unit, Menu],
    chosen: Mapping[Unit, Choice],
    cost: float,
    *,
    scale: Mapping[Unit, float] | None = None,
    near: float | None = None,
) -> float:
    """The price at which these choices cost ``cost`` together. ``near``: a price not too far from it."""

    def total(logarithm: float) -> float:
        price = math.exp(logarithm)
        return sum(chosen[unit].point(menu, price * scale_of(scale, unit)).cost for unit, menu in menus.items())

    low, high = (_LOWEST, _HIGHEST) if near is None else (math.log(near) - 2, math.log(near) + 2)
    if near is not None and (total(low) < cost or total(high) > cost):
        low, high = _LOWEST, _HIGHEST
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) > cost else (low, middle)
    return math.exp(high)


def scale_of(scale: Mapping[Unit, float] | None, unit: Unit) -> float:
    return 1.0 if scale is None else scale.get(unit, 1.0)

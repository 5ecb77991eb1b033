"""One price for the whole model: the allocation of a budget over units.

In: a menu per unit and a budget. Out: a point per unit, at the one price of a unit of cost (a Lagrange multiplier) at which all
points together cost the budget; each unit is of the kind that is cheapest at that price, loss and cost taken together. Cost falls
as the price rises, so bisection finds it. Kinds are chosen at the price found so far, and the price anew, until both agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rana_fx.recipes.menu import Menu, Point

_ROUNDS = 3
_LOWEST, _HIGHEST = -60.0, 10.0  # logarithms of the price
_PRECISION = 5e-3

Unit = tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """What a unit is to be: its kind, and the rows of its router where it has one."""

    kind: str
    ranks: int | None = None


def allocate(
    menus: Mapping[Unit, Menu], cost: float, *, scale: Mapping[Unit, float] | None = None
) -> tuple[float, dict[Unit, Choice]]:
    """The price at which all points cost ``cost``, and what every unit is there. ``scale``: a unit's price over the common."""
    chosen: dict[Unit, Choice] = dict.fromkeys(menus, Choice("neuron"))
    price = price_for(menus, chosen, cost, scale=scale)
    for _ in range(_ROUNDS):
        kinds = {unit: _best(menu, price * scale_of(scale, unit)) for unit, menu in menus.items()}
        if all(kinds[unit] == chosen[unit].kind for unit in menus):
            break
        chosen = {unit: Choice(kind) for unit, kind in kinds.items()}
        price = price_for(menus, chosen, cost, scale=scale, near=price)
    ranks = {unit: menu.point(chosen[unit].kind, price * scale_of(scale, unit), loss=False).ranks for unit, menu in menus.items()}
    return price, {unit: Choice(choice.kind, ranks[unit] or None) for unit, choice in chosen.items()}


def _best(menu: Menu, price: float) -> str:
    """The kind with the least loss plus price times cost."""
    points = [menu.point(kind, price) for kind in menu.kinds]
    return min(points, key=lambda point: point.loss + price * point.cost).kind


def points_at(
    menus: Mapping[Unit, Menu], chosen: Mapping[Unit, Choice], price: float, *, scale: Mapping[Unit, float] | None = None
) -> dict[Unit, Point]:
    """A point per unit, of the kinds chosen."""
    return {
        unit: menu.point(chosen[unit].kind, price * scale_of(scale, unit), ranks=chosen[unit].ranks)
        for unit, menu in menus.items()
    }


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
        return sum(
            menu.point(chosen[unit].kind, price * scale_of(scale, unit), ranks=chosen[unit].ranks, loss=False).cost
            for unit, menu in menus.items()
        )

    low, high = (_LOWEST, _HIGHEST) if near is None else (math.log(near) - 2, math.log(near) + 2)
    if near is not None and (total(low) < cost or total(high) > cost):
        low, high = _LOWEST, _HIGHEST
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) > cost else (low, middle)
    return math.exp(high)


def scale_of(scale: Mapping[Unit, float] | None, unit: Unit) -> float:
    return 1.0 if scale is None else scale.get(unit, 1.0)

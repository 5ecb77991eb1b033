"""recipe="rana": the best known use of a budget, without training, for any architecture.

unit        all linears of the budget that read one tensor: they share a router, or a mask of their input
loss        errors are weighed by what they do to the loss: second moments of gradients (sensitivity.py, geometry.py)
menu        dense, input thresholds, rank, rank behind a masked router, static rank (menu.py)
allocation  one price of a unit of cost for the whole model (allocate.py), or one fraction for every unit: what moves the
            model's output less on held-out batches
budget      the price is set where the adapted model, not the dense one, keeps what was asked
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rana_fx.adapters import Adapter
from rana_fx.decompose import second_moment
from rana_fx.errors import BudgetUnreachable
from rana_fx.layout import Layout
from rana_fx.recipes.allocate import Choice, Unit, allocate, points_at, price_for
from rana_fx.recipes.build import build
from rana_fx.recipes.geometry import geometry, loss_basis
from rana_fx.recipes.menu import Menu, Part
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.storage import in_fewer_bits, own
from rana_fx.recipes.trial import Outcome, attempt
from rana_fx.rehearse import Stage
from rana_fx.sensitivity import Sensitivity, sensitivities
from rana_fx.sites import Skip

_ROWS = 2048  # rows a menu is priced on
_BASIS_ROWS = 8192  # rows, or eight for every input, a basis is made from
_MOST_ROUNDS = 4
_CLOSE = 0.002  # of the dense cost: near enough to what was asked
_TOLERATED = 0.01  # of it: more than asked by so much is not taken


class Rana:
    """The default recipe."""

    name = "rana"
    rehearses = True

    def wants(self, layout: Layout) -> set[tuple[str, ...]]:
        return {layout.groups[layout.sites[name].group].sites for unit in units_of(layout) for name in unit}

    def solve(self, problem: Problem) -> list[Adapter]:
        if problem.budget >= 1:
            return []
        assert problem.rehearsal is not None
        units = [unit for unit in units_of(problem.layout) if problem.calibrated(unit, 1)]
        with problem.rehearsal.opened(problem.layout) as stage:
            found = sensitivities(stage, problem.layout, units, problem.rehearsal.batches)
            search = _Search(problem, stage)
            for unit in tqdm(units, desc="decompose", unit="group", disable=not problem.progress):
                if bool(problem.rows(unit[0]).any()):
                    search.add(unit, *_menus(problem, unit, found))
                else:
                    reason = "its input is zero throughout the calibration text: it stays dense"
                    problem.skips += [Skip(name, reason) for name in unit]
            return search.run()


def units_of(layout: Layout) -> list[Unit]:
    """Sites of the budget that read one tensor equally often, stacked."""
    found: dict[tuple[int, int], list[str]] = {}
    for site in layout.sites.values():
        if site.counted:
            found.setdefault((site.group, site.uses), []).append(site.name)
    return [tuple(names) for names in found.values()]


def _menus(problem: Problem, unit: Unit, found: Sensitivity) -> tuple[Menu, Menu]:
    """(menu to choose by, menu to build from): the first has its basis from other rows than those it is priced on."""
    rows, weight = problem.rows(unit[0]), problem.matrix(unit)
    out, width = weight.shape
    shape = geometry(weight, found.moments.get(unit))
    site = problem.layout.sites[unit[0]]
    one = float(site.uses * (1 if problem.metric == "flops" else site.weight.element_size()))
    parts, start = [], 0
    for name in unit:
        outs = problem.layout.sites[name].out_features
        columns = found.columns.get(name)
        if columns is None:
            columns = (shape.lift_OD[start : start + outs] @ shape.read_DI).square().sum(0)
        parts.append(Part(outs, shape.site_norms(slice(start, start + outs), columns)))
        start += outs
    if len(unit) == 1:
        parts = []
    split = len(rows) * 3 // 4
    priced = _spread(rows[split:], _ROWS)
    trial_basis = basis = None
    # a router as tall as the layer is wide saves nothing
    if out > width // 2 and split >= min(out, width):
        most = max(_BASIS_ROWS, 8 * width)
        moment = second_moment(_spread(rows[:split], most))
        whole = moment + second_moment(_spread(rows[split:], most // 3))
        trial_basis, basis = loss_basis(shape, moment / split), loss_basis(shape, whole / len(rows))
    storages = [own(one)]
    if problem.metric == "bytes":
        weights = {name: problem.matrix((name,)) for name in unit}
        storages += in_fewer_bits(shape, basis, weights, _spread(rows, max(_BASIS_ROWS, 4 * width)), one=one, uses=site.uses)
    return Menu(shape, trial_basis, priced, storages, parts), Menu(shape, basis, priced, storages, parts)


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` rows, evenly spaced: a reservoir holds them in the order of the text until it is full."""
    return rows if len(rows) <= count else rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).long()]


class _Search:
    """Finds choices that cost the budget in the adapted model and move its output least."""

    def __init__(self, problem: Problem, stage: Stage) -> None:
        self._problem, self._stage = problem, stage
        assert problem.rehearsal is not None
        self._held = problem.rehearsal.held
        self._dense = [stage.run(batch) for batch in self._held]
        self._scouts: dict[Unit, Menu] = {}
        self._menus: dict[Unit, Menu] = {}

    def add(self, unit: Unit, scout: Menu, menu: Menu) -> None:
        self._scouts[unit], self._menus[unit] = scout, menu

    def run(self) -> list[Adapter]:
        total = self._problem.size(self._problem.counted())
        dense = total - sum(menu.dense_cost for menu in self._menus.values())
        asked = self._problem.budget * total - dense
        if asked <= 0:
            raise BudgetUnreachable(
                budget=self._problem.budget, recipe=self._problem.recipe, lowest=min(1.0, dense / total + 0.01),
                why=f"{dense / total:.1%} of the cost is in layers that stay dense", recipes="teal and wina adapt every layer",
            )  # fmt: skip
        fraction = asked / (total - dense)
        price, chosen = allocate(self._scouts, asked)
        even = {unit: allocate({unit: menu}, fraction * menu.dense_cost) for unit, menu in self._scouts.items()}
        prices = {unit: price for unit, (price, _) in even.items()}
        tried = [
            self._settle(asked, price, chosen, None, total=total),
            self._settle(asked, 1.0, {unit: found[unit] for unit, (_, found) in even.items()}, prices, total=total),
        ]
        # what costs more than asked is no answer
        best, _, _ = min(tried, key=lambda item: (item[2] > asked + _TOLERATED * total, item[1].divergence))
        for unit, adapters in best.items():
            if not adapters:
                self._problem.skips += [Skip(name, "the budget is better spent elsewhere: it stays dense") for name in unit]
        return [adapter for adapters in best.values() for adapter in adapters]

    def _settle(
        self, asked: float, price: float, chosen: Mapping[Unit, Choice], scale: Mapping[Unit, float] | None, *, total: float
    ) -> tuple[dict[Unit, list[Adapter]], Outcome, float]:
        """The choices at the price at which the adapted model spends ``asked``, what they do, and what they spend."""
        aim = asked
        for attempts in range(_MOST_ROUNDS):
            if attempts:
                price = price_for(self._menus, chosen, aim, scale=scale, near=price)
            points = points_at(self._menus, chosen, price, scale=scale)
            adapters = {unit: build(self._problem, unit, self._menus[unit], point) for unit, point in points.items()}
            flat = [adapter for found in adapters.values() for adapter in found]
            outcome = attempt(self._stage, self._problem.layout, flat, self._held, self._dense)
            spent = self._spent(adapters, outcome)
            if abs(spent - asked) < _CLOSE * total:
                break
            # what the menus have to be asked for, so that the model spends what is asked
            planned = sum(point.cost for point in points.values())
            aim = planned * asked / spent
        return {unit: [_as_found(adapter, outcome) for adapter in found] for unit, found in adapters.items()}, outcome, spent

    def _spent(self, adapters: dict[Unit, list[Adapter]], outcome: Outcome) -> float:
        spent = 0.0
        for unit, found in adapters.items():
            if not found:
                spent += self._menus[unit].dense_cost
            for adapter in found:
                kept, router = outcome.kept.get(adapter.name), outcome.router_kept.get(adapter.name)
                spent += adapter.cost(self._problem.metric, kept, router)
        return spent


def _as_found(adapter: Adapter, outcome: Outcome) -> Adapter:
    """With the ranks and inputs that it kept in the adapted model."""
    if adapter.name not in outcome.kept:
        return adapter  # a layer that no held-out batch reached
    kept, router = outcome.kept[adapter.name], outcome.router_kept.get(adapter.name)
    flops, weight_bytes = (adapter.cost(metric, kept, router) for metric in ("flops", "bytes"))
    return replace(adapter, kept=kept, router_kept=router, flops=flops, bytes=weight_bytes)

"""The cut through a gated MLP: its price against direct computation in fp64, who may have it, and what it becomes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, relu, silu

from rana_fx.recipes import Problem
from rana_fx.recipes.allocate import Choice, allocate, points_at
from rana_fx.recipes.cut import Cut, Share, cuttables
from rana_fx.recipes.geometry import geometry
from rana_fx.recipes.menu import Menu
from rana_fx.recipes.point import Point
from rana_fx.recipes.rana import Rana, units_of
from rana_fx.recipes.search import _Found, _surcharge
from rana_fx.recipes.storage import own
from rana_fx.recipes.trial import Outcome, attempt
from tests.null.test_rana import Classifier, rehearsed

WIDTH, FFN = 16, 40


class Gated(Classifier):
    """Two gated blocks; activations and what follows the product as given."""

    def __init__(self, activation=gelu, scale=None, bias=False):
        super().__init__(WIDTH)
        self.gates = nn.ModuleList(nn.Linear(WIDTH, FFN, bias=bias) for _ in range(2))
        self.activation, self.scale = activation, scale

    def forward(self, x):
        h = self.stem(x)
        for gate, up, down in zip(self.gates, self.ups, self.downs, strict=True):
            hidden = self.activation(gate(h)) * up(h)
            h = h + down(hidden if self.scale is None else hidden * self.scale)
        return {"logits": self.head(h)}


def batches(count=9):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 128, 4, generator=generator) * 2,) for _ in range(count)]


def problem_of(model, *, metric="flops", budget=0.6):
    torch.manual_seed(0)
    layout, samples, rehearsal = rehearsed(model, batches())
    return Problem(layout, samples, budget, metric, "rana", False, rehearsal=rehearsal)


def cut_of(problem, *, shared=True):
    """(a cut of the first block, rows it is priced on, the geometry of down)."""
    (first, _) = cuttables(problem.layout, units_of(problem.layout, shared=shared))
    rows = problem.rows(first.gate)[:512]  # as many as are taken to see how dropped neurons add up
    gradients = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 1, WIDTH)
    shape = geometry(problem.matrix((first.down,)), gradients.t() @ gradients / 400)
    return Cut(problem, first, rows, shape), rows, shape


def seeded(**options):
    torch.manual_seed(0)
    return Gated(**options)


@pytest.mark.parametrize("activation", [gelu, silu, relu, torch.tanh])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("metric", ["flops", "bytes"])
def test_points_cost_and_lose_what_they_say(activation, bias, metric):
    model = seeded(activation=activation, bias=bias)
    cut, rows, shape = cut_of(problem_of(model, metric=metric))
    model.double()
    with torch.no_grad():
        active, up = activation(model.gates[0](rows.double())), model.ups[0](rows.double())
    hidden, met = active * up, active != 0
    worth = (up.square() * met).sum(0) / met.sum(0) * shape.norms_I.double()
    row_cost = 2 * WIDTH * (1 if metric == "flops" else 4)
    # at these thresholds how neurons dropped together add up is measured, and none lies within a bin of the tables
    measured = [(math.exp(place) / (2 * row_cost), ratio) for place, ratio in cut._interplay._points]
    assert len(measured) >= 4
    between = [
        ((low * high) ** 0.5, (first, second)) for (low, first), (high, second) in zip(measured, measured[1:], strict=False)
    ]
    for price, ratios in [*((price, (ratio, ratio)) for price, ratio in measured), *between]:
        tau = cut.tau_F(cut.point(cut.of.lead, price).bar)
        torch.testing.assert_close(tau.double(), 2 * price * row_cost / worth, rtol=1e-4, atol=0)
        mask = active.square() >= tau
        dropped = hidden * ~mask
        each = float((dropped.square() * shape.norms_I.double()).sum(1).mean()) / 2
        points = {unit: cut.point(unit, price) for unit in cut.of.units}
        lead, source = points[cut.of.lead], points[cut.of.source]
        kept = float(mask.sum(1).double().mean())
        # a bin is 0.8 % wide, in scores
        assert lead.kept == pytest.approx(kept, rel=4e-3, abs=1e-2)
        assert lead.cost == row_cost * lead.kept
        assert (source.cost, source.loss) == (row_cost * FFN / 2, 0.0)
        assert 0.99 * min(ratios) * each <= lead.loss <= 1.01 * max(ratios) * each
        down = model.downs[0]
        mean = (down.weight @ dropped.mean(0) + down.bias).detach()
        torch.testing.assert_close(cut.bias_O(lead.bar).double(), mean, rtol=0, atol=1e-5 * float(mean.abs().max()))
        if price in dict(measured):
            lost = dropped @ shape.read_DI.double().t()
            together = float((lost - lost.mean(0)).square().sum(1).mean()) / 2
            assert lead.loss == pytest.approx(together, rel=1e-3)


def test_a_neuron_that_is_worth_nothing_is_never_needed():
    model = seeded()
    with torch.no_grad():
        model.downs[0].weight[:, 3] = 0
        model.ups[0].weight[5], model.ups[0].bias[5] = 0, 0
    cut, _, _ = cut_of(problem_of(model))
    tau = cut.tau_F(1e-30)
    assert tau.isinf().nonzero().flatten().tolist() == [3, 5] and bool((tau > 0).all())


def blocks_cut(model, *, shared=True):
    layout = problem_of(model).layout
    return [found.down for found in cuttables(layout, units_of(layout, shared=shared))]


def test_a_cut_needs_the_product_in_front_of_down_and_units_of_its_own():
    assert blocks_cut(seeded()) == ["downs.0", "downs.1"]
    assert blocks_cut(seeded(), shared=False) == ["downs.0", "downs.1"]
    # what follows the product may turn zeros into anything, and the rewrite masks a factor of what down reads
    assert blocks_cut(seeded(scale=1.5)) == []
    assert blocks_cut(Classifier()) == []

    class Parallel(Gated):
        """Another linear reads what gate and up read."""

        def __init__(self):
            super().__init__()
            self.beside = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            h = self.stem(x)
            h = h + self.beside(h) + self.downs[0](gelu(self.gates[0](h)) * self.ups[0](h))
            return {"logits": self.head(h)}

    assert blocks_cut(Parallel()) == []
    assert blocks_cut(Parallel(), shared=False) == ["downs.0"]


def test_units_of_their_own_pay_for_the_gate_once():
    cut, _, _ = cut_of(problem_of(seeded()), shared=False)
    assert [cut.point(unit, 1e-3).cost for unit in (("gates.0",), ("ups.0",))] == [WIDTH * FFN, 0.0]


def menus_with_cuts(worth):
    """Menus of masks alone and two cuts; ``worth``: what a unit of error costs in each block."""
    problem = problem_of(seeded())
    menus = {}
    for found, weight in zip(cuttables(problem.layout, units_of(problem.layout)), worth, strict=True):
        shapes = {unit: geometry(problem.matrix(unit), None, even=weight) for unit in found.units}
        for unit, shape in shapes.items():
            menus[unit] = Menu(shape, None, problem.rows(unit[0])[:2048], [own(1.0)])
        cut = Cut(problem, found, problem.rows(found.gate)[:2048], shapes[found.lead])
        for unit in found.units:
            menus[unit].cut = Share(cut, unit)
    return menus


def alone(menus, asked, gated):
    """Loss at the price at which masks, and a cut of the blocks ``gated``, cost what was asked; inf where they cannot."""

    def points(price):
        kinds = {unit: ("gated",) if int(unit[0][-1]) in gated else ("dense", "neuron") for unit in menus}
        found = [[menu.point(kind, price) for kind in kinds[unit]] for unit, menu in menus.items()]
        return [min(entries, key=lambda point: point.total) for entries in found]

    low, high = -40.0, 5.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(point.cost for point in points(math.exp(middle))) > asked else (low, middle)
    found = points(math.exp(high))
    near = abs(sum(point.cost for point in found) - asked) < 0.01 * asked
    return sum(point.loss for point in found) if near else math.inf


@pytest.mark.parametrize("fraction", [0.9, 0.75, 0.6, 0.5, 0.42, 0.35, 0.15])
def test_a_block_is_cut_whole_or_not_at_all_where_that_loses_less(fraction):
    cut = set()
    for worth in ((1.0, 1.0), (1.0, 30.0), (100.0, 1.0)):
        menus = menus_with_cuts(worth)
        asked = fraction * sum(menu.dense_cost for menu in menus.values())
        price, chosen = allocate(menus, asked)
        points = points_at(menus, chosen, price)
        assert sum(point.cost for point in points.values()) == pytest.approx(asked, rel=0.01)
        for menu in menus.values():
            assert len({chosen[unit] == Choice("gated") for unit in menu.cut.cut.of.units}) == 1
        cut |= {unit for unit in menus if chosen[unit] == Choice("gated")}
        ways = [alone(menus, asked, gated) for gated in ((), (0,), (1,), (0, 1))]
        assert sum(point.loss for point in points.values()) <= 1.02 * min(ways)
    # one of the two gates costs a sixth of all
    assert bool(cut) == (fraction > 1 / 6)


def test_a_surcharge_makes_a_cut_dearer_and_its_thresholds_lower():
    cut, _, _ = cut_of(problem_of(seeded()))
    price = math.exp(cut._interplay._points[3][0]) / cut.row_cost
    told = cut.point(cut.of.lead, price / 3)
    cut.surcharge = 3.0
    found = cut.point(cut.of.lead, price)
    assert (found.kept, found.bar, found.loss) == pytest.approx((told.kept, told.bar, 3 * told.loss))
    assert cut.point(cut.of.source, price).cost == cut.gate_cost


@pytest.mark.parametrize(
    ("whole", "apart", "expected"),
    [
        # masks lose half as much again as told, and so do cuts
        ((1.0, 2.0, 4.5), (5.0, 7.5), 1.0),
        # what is more than that is the cuts': (6 / 1.5 - 1) / 2
        ((1.0, 2.0, 6.0), (5.0, 7.5), 1.5),
        ((1.0, 2.0, 60.0), (5.0, 7.5), 4.0),
        ((1.0, 0.0, 6.0), (5.0, 7.5), 1.0),
        ((1.0, 2.0, 6.0), (5.0, 0.0), 1.0),
    ],
)
def test_the_surcharge_is_what_cuts_lose_over_what_was_told(whole, apart, expected):
    masks, cuts, moved = whole
    points = {("up",): Point("neuron", 1.0, 1.0, masks), ("down",): Point("gated", 1.0, 1.0, cuts)}
    told = {("up",): Point("neuron", 1.0, 1.0, apart[0])}
    found = [_Found(given, Outcome({}, {}, value, {}), 1.0) for given, value in ((points, moved), (told, apart[1]))]
    assert _surcharge(*found) == pytest.approx(expected)


@pytest.mark.parametrize("budget", [0.7, 0.5, 0.4])
def test_a_cut_is_taken_only_where_held_out_batches_lose_less_by_it(budget):
    moved, cut = [], []
    for kinds in (("dense", "neuron"), ("dense", "neuron", "gated")):
        problem = problem_of(seeded(), budget=budget)
        with torch.no_grad():
            made = Rana(kinds=kinds, allocations=("price",)).solve(problem)
            with problem.rehearsal.opened(problem.layout) as stage:
                dense = [stage.run(batch) for batch in problem.rehearsal.held]
                moved.append(attempt(stage, problem.layout, made, problem.rehearsal.held, dense).divergence)
        cut.append(any(adapter.kind == "gated" for adapter in made))
    assert cut[0] is False
    assert moved[1] < moved[0] if cut[1] else moved[1] == pytest.approx(moved[0], rel=1e-6)

"""The cut through a gated MLP: its price against direct computation in fp64, who may have it, and what it becomes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, relu, silu

from rana_fx.recipes import Problem
from rana_fx.recipes.rana.allocate import Choice, allocate, points_at
from rana_fx.recipes.rana.candidates import Menu
from rana_fx.recipes.rana.eligible_mlps import cuttables
from rana_fx.recipes.rana.loss_metric import geometry, loss_basis
from rana_fx.recipes.rana.mlp_candidate import Share
from rana_fx.recipes.rana.mlp_gated import GatedCut
from rana_fx.recipes.rana.operating_point import Point
from rana_fx.recipes.rana.quantization import own
from rana_fx.recipes.rana.recipe import Rana, units_of
from rana_fx.recipes.rana.refine import _Found, _surcharge
from rana_fx.recipes.simulate import Outcome, simulate
from tests.recipes.test_rana import Classifier, rehearsed

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


def cut_of(problem, *, shared=True, gates=True):
    """(a cut of the first block, rows it is priced on, the geometry of down)."""
    (first, _) = cuttables(problem.layout, units_of(problem.layout, shared=shared))
    rows = problem.rows(first.gate)[:1024]  # as many as it is measured on
    gradients = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 1, WIDTH)
    shape = geometry(problem.matrix((first.down,)), gradients.t() @ gradients / 400)
    return GatedCut(problem, first, gate_menu(problem, first.gate, rows, adapted=gates), rows, shape), rows, shape


def gate_menu(problem, gate, rows, *, adapted=True):
    weight = problem.matrix((gate,))
    storage = own(1.0 if problem.metric == "flops" else 4.0)
    if not adapted:
        storage = replace(storage, kinds=("dense",))
    shape = geometry(weight, None)
    return Menu(shape, loss_basis(shape, rows.t() @ rows / len(rows)), rows, [storage])


def seeded(**options):
    torch.manual_seed(0)
    return Gated(**options)


@pytest.mark.parametrize("activation", [gelu, silu, relu, torch.tanh])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("metric", ["flops", "bytes"])
@pytest.mark.parametrize("gates", [False, True])
def test_points_cost_and_lose_what_they_say(activation, bias, metric, gates):
    model = seeded(activation=activation, bias=bias)
    cut, rows, shape = cut_of(problem_of(model, metric=metric), gates=gates)
    with torch.no_grad():
        active, up = activation(model.gates[0](rows)).double(), model.ups[0](rows).double()
    hidden, met = active * up, active != 0
    worth = (up.square() * met).sum(0) / met.sum(0) * shape.norms_I.double()
    row_cost = 2 * WIDTH * (1 if metric == "flops" else 4)
    assert len(cut._levels) >= 6 and cut.row_cost() == row_cost
    assert any(level.gate[0] != "dense" for level in cut._levels) == gates
    for level in cut._levels:
        price = math.exp(level.place)
        points = {unit: cut.point(unit, price) for unit in cut.of.units}
        lead, source = points[cut.of.lead], points[cut.of.source]
        found, bias_O = cut.acted(lead)
        torch.testing.assert_close(found.tau_F.double(), 2 * price * row_cost / worth, rtol=1e-4, atol=0)
        # the gate as its adapter would make it
        adapters = cut.adapters(cut.of.source, source)
        gate = model.gates[0](rows).detach() if not adapters else acts(adapters[0], rows, model.gates[0])
        mask = activation(gate).double().square() >= found.tau_F
        changed = hidden - activation(gate).double() * up * mask
        lost = changed @ shape.read_DI.double().t()
        together = float((lost - lost.mean(0)).square().sum(1).mean()) / 2
        # in fp32 some scores lie on the other side of a threshold
        assert lead.kept == pytest.approx(float(mask.sum(1).double().mean()), abs=2 * FFN / len(rows))
        assert lead.cost == row_cost * lead.kept
        assert lead.loss == pytest.approx(together, rel=2e-2, abs=1e-9)
        if not gates:
            assert (source.cost, source.loss) == (row_cost * FFN / 2, 0.0)
        else:
            kept = source.gate
            assert source.cost == kept.cost and kept.price == pytest.approx(0.7 * price)
        down = model.downs[0]
        mean = (down.weight.double() @ changed.mean(0) + down.bias).detach()
        torch.testing.assert_close(bias_O.double(), mean, rtol=0, atol=1e-3 * float(mean.abs().max()))
    # between two of them: between what was measured there
    for low, high in zip(cut._levels, cut._levels[1:], strict=False):
        point = cut.point(cut.of.lead, math.exp((low.place + high.place) / 2))
        assert point.kept == pytest.approx((low.kept + high.kept) / 2)
        assert point.loss == pytest.approx((low.lost + high.lost) / 2)


def acts(adapter, rows, linear):
    """An adapter's outputs, from its own tensors."""
    v = rows
    if adapter.router is not None:
        if adapter.router_tau is not None:
            v = v * (v.square() >= adapter.router_tau)
        v = v @ (adapter.router if adapter.router_tau is not None else adapter.router.t())
    weight = linear.weight.detach().t() if adapter.weight is None else adapter.weight
    out = (v * (v.square() >= adapter.tau)) @ weight
    return out if linear.bias is None else out + linear.bias.detach()


def test_a_neuron_that_is_worth_nothing_is_never_needed():
    model = seeded()
    with torch.no_grad():
        model.downs[0].weight[:, 3] = 0
        model.ups[0].weight[5], model.ups[0].bias[5] = 0, 0
    cut, _, _ = cut_of(problem_of(model))
    tau = cut.acted(cut.point(cut.of.lead, 1e-30))[0].tau_F
    assert tau.isinf().nonzero().flatten().tolist() == [3, 5] and bool((tau > 0).all())


def blocks_cut(model, *, shared=True):
    layout = problem_of(model).layout
    return [found.down for found in cuttables(layout, units_of(layout, shared=shared))]


def test_a_cut_needs_the_product_in_front_of_down_and_units_of_its_own():
    assert blocks_cut(seeded()) == ["downs.0", "downs.1"]
    assert blocks_cut(seeded(), shared=False) == ["downs.0", "downs.1"]
    # what follows the product may turn zeros into anything, and the rewrite masks a factor of what down reads
    assert blocks_cut(seeded(scale=1.5)) == []
    layout = problem_of(Classifier()).layout
    kinds = [cuttables(layout, units_of(layout), given) for given in (("gated", "exact"), ("exact",), ("gated",))]
    assert [[found.kind for found in cuts] for cuts in kinds] == [["exact", "exact"], ["exact", "exact"], []]

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
    cut, _, _ = cut_of(problem_of(seeded()), shared=False, gates=False)
    assert [cut.point(unit, 1e-3).cost for unit in (("gates.0",), ("ups.0",))] == [WIDTH * FFN, 0.0]


def menus_with_cuts(worth):
    """Menus of masks alone and two cuts; ``worth``: what a unit of error costs in each block."""
    problem = problem_of(seeded())
    menus = {}
    for found, weight in zip(cuttables(problem.layout, units_of(problem.layout)), worth, strict=True):
        shapes = {unit: geometry(problem.matrix(unit), None, even=weight) for unit in found.units}
        for unit, shape in shapes.items():
            menus[unit] = Menu(shape, None, problem.rows(unit[0])[:2048], [own(1.0)])
        rows = problem.rows(found.gate)[:2048]
        cut = GatedCut(problem, found, gate_menu(problem, found.gate, rows, adapted=False), rows, shapes[found.lead])
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
    price = 3 * math.exp(cut._levels[3].place)
    told, gate = cut.point(cut.of.lead, price / 3), cut.point(cut.of.source, price / 3)
    cut.surcharge = 3.0
    found = cut.point(cut.of.lead, price)
    assert (found.kept, found.charged, found.loss) == pytest.approx((told.kept, told.charged, 3 * told.loss))
    assert cut.point(cut.of.source, price).cost == pytest.approx(gate.cost)


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
                moved.append(simulate(stage, problem.layout, made, problem.rehearsal.held, dense).divergence)
        cut.append(any(adapter.kind == "gated" for adapter in made))
    assert cut[0] is False
    assert moved[1] < moved[0] if cut[1] else moved[1] == pytest.approx(moved[0], rel=1e-6)

"""The cut of an MLP without a gate: rows of up computed exactly beside its approximation; its price, and what it becomes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import gelu, relu, silu

import rana_fx
from bench.speed.random_plan import Watch
from rana_fx.evaluation.measure import measuring
from rana_fx.recipes import RECIPES
from rana_fx.recipes.rana.candidates import Menu
from rana_fx.recipes.rana.eligible_mlps import cuttables
from rana_fx.recipes.rana.loss_metric import geometry, loss_basis
from rana_fx.recipes.rana.mlp_candidate import Rows
from rana_fx.recipes.rana.mlp_exact import ExactCut
from rana_fx.recipes.rana.quantization import own
from rana_fx.recipes.rana.recipe import Rana, units_of
from rana_fx.recipes.simulate import simulate
from tests.recipes.test_mlp_gated import WIDTH, batches, problem_of
from tests.recipes.test_rana import Classifier

FFN = 40


class Plain(Classifier):
    """Two blocks, the activation as given."""

    def __init__(self, activation=gelu):
        super().__init__(WIDTH)
        self.activation = activation

    def forward(self, x):
        h = self.stem(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            h = h + down(self.activation(up(h)))
        return {"logits": self.head(h)}


def seeded(**options):
    torch.manual_seed(0)
    return Plain(**options)


def cut_of(problem, model):
    """(a cut of the first block, rows it is priced on, the geometry of down)."""
    (first, _) = cuttables(problem.layout, units_of(problem.layout))
    rows = problem.rows(first.up)[:1024]  # as many as it is measured on
    weight = problem.matrix((first.up,))
    menu = Menu(geometry(weight, None), loss_basis(geometry(weight, None), rows.t() @ rows / len(rows)), rows, [own(1.0)])
    gradients = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 1, WIDTH)
    shape = geometry(problem.matrix((first.down,)), gradients.t() @ gradients / 400)
    return ExactCut(problem, first, menu, rows, shape), rows, shape


@pytest.mark.parametrize("activation", [gelu, silu, relu])
def test_points_cost_and_lose_what_they_say(activation):
    model = seeded(activation=activation)
    cut, rows, shape = cut_of(problem_of(model), model)
    with torch.no_grad():
        up = model.ups[0](rows)
        hidden = activation(up.double())
    assert len(cut._levels) >= 8 and {level.gate[0] for level in cut._levels} <= {"rank", "hybrid", "static"}
    for level in cut._levels:
        price = math.exp(level.place)
        lead, source = cut.point(cut.of.lead, price), cut.point(cut.of.source, price)
        (made,), (down,) = cut.adapters(cut.of.source, source), cut.adapters(cut.of.lead, lead)
        z = rows * (rows.square() >= made.router_tau) @ made.router if made.router_tau is not None else rows @ made.router.t()
        with torch.no_grad():
            rough = (z * (z.square() >= made.tau)) @ made.weight + model.ups[0].bias
        exact = rough >= made.exact_tau
        mixed = activation(torch.where(exact, up, rough).double())
        mask = mixed.square() >= down.tau
        changed = hidden - mixed * mask
        lost = changed @ shape.read_DI.double().t()
        # in fp32 some scores lie on the other side of a threshold
        near = 2 * FFN / len(rows)
        assert made.exact_kept == pytest.approx(float(exact.sum(1).double().mean()), abs=near)
        assert lead.kept == pytest.approx(float(mask.sum(1).double().mean()), abs=near)
        assert (lead.cost, down.cost("flops", lead.kept)) == pytest.approx((WIDTH * lead.kept,) * 2)
        assert source.cost == pytest.approx(source.gate.cost + WIDTH * level.exact) == pytest.approx(made.flops, rel=1e-3)
        together = float((lost - lost.mean(0)).square().sum(1).mean()) / 2
        assert lead.loss == pytest.approx(together, rel=2e-2, abs=1e-9)
        mean = (model.downs[0].weight.double() @ changed.mean(0) + model.downs[0].bias).detach()
        torch.testing.assert_close(down.bias.double(), mean, rtol=0, atol=1e-3 * float(mean.abs().max()))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_threshold_is_the_one_that_pays_best(share):
    model = seeded()
    cut, rows, _ = cut_of(problem_of(model), model)
    price = math.exp(cut._levels[int(share * len(cut._levels))].place)
    dense = cut._dense()
    rough = dense.ups[0] + 0.5 * torch.randn(dense.ups[0].shape, generator=torch.Generator().manual_seed(3))
    theta = cut._thresholds(dense, rough, price)

    def total(thresholds):
        mixed = gelu(torch.where(rough >= thresholds, dense.ups[0], rough))
        return cut._paid(dense, mixed, price).sum(0) + price * WIDTH * (rough >= thresholds).sum(0)

    found = total(theta)
    for other in [*rough[:: len(rough) // 50], torch.full_like(theta, torch.inf), torch.full_like(theta, -torch.inf)]:
        assert bool((found <= total(other) * (1 + 1e-5) + 1e-12).all())


def test_a_threshold_lies_between_values_that_roundings_tell_apart():
    model = seeded()
    cut, _, _ = cut_of(problem_of(model), model)
    price = math.exp(cut._levels[len(cut._levels) // 2].place)
    dense = cut._dense()
    # few different tokens, as in a first layer, each many times and differently rounded
    some = torch.randint(0, 20, (len(dense.x_TI),), generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    repeated = Rows(dense.x_TI[some], [dense.ups[0][some]], dense.hidden_TF[some])
    rough = 0.7 * repeated.ups[0] * (1 + 1e-7 * torch.randn(repeated.ups[0].shape, generator=noise))
    theta = cut._thresholds(repeated, rough, price)
    assert float(theta.isfinite().float().mean()) > 0.1
    for scale in (1 - 1e-6, 1 + 1e-6):
        assert torch.equal(rough * scale >= theta, rough >= theta)


@pytest.mark.parametrize("budget", [0.6, 0.4])
def test_the_plan_costs_what_was_asked_and_does_what_was_tried(budget, monkeypatch, tmp_path):
    recipe = Rana(kinds=("dense", "rank", "exact"), allocations=("price",))
    monkeypatch.setitem(RECIPES, "rana", recipe)
    model = seeded()
    torch.manual_seed(0)
    plan = rana_fx.adapt(model, batches(), budget=budget, progress=False)
    exact = [adapter for adapter in plan.adapters if adapter.exact_tau is not None]
    assert exact and all(0 < adapter.exact_kept < FFN for adapter in exact)
    problem = problem_of(seeded(), budget=budget)
    with torch.no_grad(), problem.rehearsal.opened(problem.layout) as stage:
        dense = [stage.run(batch) for batch in problem.rehearsal.held]
        outcome = simulate(stage, problem.layout, plan.adapters, problem.rehearsal.held, dense)
    with measuring(model) as meter:
        got = meter.run(problem.rehearsal.held[0])["logits"]
        measured = meter.result()
    assert {a.name: outcome.exact_kept[a.name] / FFN for a in exact} == pytest.approx(measured.exact_density, rel=1e-6)
    assert measured.budget_flops == pytest.approx(budget, abs=0.01)
    assert plan.expected_budget() == pytest.approx(measured.budget_flops, rel=1e-6)
    log_p, log_q = dense[0]["logits"].log_softmax(-1), got.log_softmax(-1)
    assert outcome.divergence == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
    # benches that watch decoding count it alike
    watch = Watch(model, plan)
    watch.rows = {}
    watch.run(problem.rehearsal.held[0])
    assert watch.result() == measured and watch.rows.keys() == measured.density.keys()
    plan.save(tmp_path)
    assert rana_fx.load_plan(tmp_path).digest() == plan.digest()


def test_without_components_there_is_nothing_to_correct():
    problem = problem_of(seeded(), budget=0.5)
    with torch.no_grad():
        made = Rana(kinds=("dense", "neuron", "exact")).solve(problem)
    assert {adapter.kind for adapter in made} == {"neuron"} and all(adapter.exact_tau is None for adapter in made)

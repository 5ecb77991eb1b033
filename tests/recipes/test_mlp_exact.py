"""The joint candidate of an MLP without a gate: rows of up computed exactly beside its approximation, and the plans with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import gelu, relu, silu

import rana_fx
from bench.speed.random_plan import RecordingMeter
from rana_fx.evaluation.measure import measuring
from rana_fx.recipes import RECIPES
from rana_fx.recipes.rana.candidates import UnitCandidates
from rana_fx.recipes.rana.eligible_mlps import eligible_mlps
from rana_fx.recipes.rana.loss_metric import loss_basis, loss_metric
from rana_fx.recipes.rana.mlp_candidate import MlpRows
from rana_fx.recipes.rana.mlp_exact import ExactMlp
from rana_fx.recipes.rana.quantization import unquantized
from rana_fx.recipes.rana.recipe import Rana
from rana_fx.recipes.rana.units import units_of
from rana_fx.recipes.simulate import simulate
from tests.recipes.test_mlp_gated import WIDTH, batches, problem_of
from tests.recipes.test_rana import Classifier

FFN = 40


class Plain(Classifier):
    """Two blocks with the given activation."""

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


def joint_of(problem):
    """(the joint candidate of the first block, rows it is measured on, the loss metric of down)."""
    (first, _) = eligible_mlps(problem.layout, units_of(problem.layout))
    rows = problem.rows(first.up)[:1024]  # the number of rows that the candidate is measured on
    weight = problem.matrix((first.up,))
    metric = loss_metric(weight, None)
    candidates = UnitCandidates(metric, loss_basis(metric, rows.t() @ rows / len(rows)), rows, [unquantized(1.0)])
    gradients = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 1, WIDTH)
    of_down = loss_metric(problem.matrix((first.down,)), gradients.t() @ gradients / 400)
    return ExactMlp(problem, first, candidates, rows, of_down), rows, of_down


@pytest.mark.parametrize("activation", [gelu, silu, relu])
def test_operating_points_cost_and_lose_what_they_predict(activation):
    model = seeded(activation=activation)
    joint, rows, of_down = joint_of(problem_of(model))
    with torch.no_grad():
        up = model.ups[0](rows)
        hidden = activation(up.double())
    assert len(joint._measured) >= 8 and {measured.gate[0] for measured in joint._measured} <= {"rank", "hybrid", "static"}
    down_unit, gate_unit = joint.mlp.down_unit, joint.mlp.gate_unit
    for measured in joint._measured:
        multiplier = math.exp(measured.log_multiplier)
        lead, source = joint.point(down_unit, multiplier), joint.point(gate_unit, multiplier)
        (made,), (down,) = joint.adapters(gate_unit, source), joint.adapters(down_unit, lead)
        z = rows * (rows.square() >= made.router_tau) @ made.router if made.router_tau is not None else rows @ made.router.t()
        with torch.no_grad():
            rough = (z * (z.square() >= made.tau)) @ made.weight + model.ups[0].bias
        exact = rough >= made.exact_tau
        mixed = activation(torch.where(exact, up, rough).double())
        mask = mixed.square() >= down.tau
        changed = hidden - mixed * mask
        lost = changed @ of_down.right_DI.double().t()
        # in fp32 some scores are on the other side of a threshold
        near = 2 * FFN / len(rows)
        assert made.exact_kept == pytest.approx(float(exact.sum(1).double().mean()), abs=near)
        assert lead.kept == pytest.approx(float(mask.sum(1).double().mean()), abs=near)
        assert (lead.cost, down.cost("flops", lead.kept)) == pytest.approx((WIDTH * lead.kept,) * 2)
        assert source.cost == pytest.approx(source.gate.cost + WIDTH * measured.exact) == pytest.approx(made.flops, rel=1e-3)
        together = float((lost - lost.mean(0)).square().sum(1).mean()) / 2
        assert lead.loss == pytest.approx(together, rel=2e-2, abs=1e-9)
        mean = (model.downs[0].weight.double() @ changed.mean(0) + model.downs[0].bias).detach()
        torch.testing.assert_close(down.bias.double(), mean, rtol=0, atol=1e-3 * float(mean.abs().max()))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_threshold_minimises_the_lagrangian(share):
    model = seeded()
    joint, rows, _ = joint_of(problem_of(model))
    multiplier = math.exp(joint._measured[int(share * len(joint._measured))].log_multiplier)
    dense = joint._dense()
    rough = dense.ups[0] + 0.5 * torch.randn(dense.ups[0].shape, generator=torch.Generator().manual_seed(3))
    theta = joint._thresholds(dense, rough, multiplier)

    def total(thresholds):
        mixed = gelu(torch.where(rough >= thresholds, dense.ups[0], rough))
        return joint._lagrangian(dense, mixed, multiplier).sum(0) + multiplier * WIDTH * (rough >= thresholds).sum(0)

    found = total(theta)
    for other in [*rough[:: len(rough) // 50], torch.full_like(theta, torch.inf), torch.full_like(theta, -torch.inf)]:
        assert bool((found <= total(other) * (1 + 1e-5) + 1e-12).all())


def test_a_threshold_lies_between_values_that_differ_by_more_than_rounding():
    model = seeded()
    joint, _, _ = joint_of(problem_of(model))
    multiplier = math.exp(joint._measured[len(joint._measured) // 2].log_multiplier)
    dense = joint._dense()
    # few distinct tokens, as in a first layer, repeated with different rounding
    some = torch.randint(0, 20, (len(dense.x_TI),), generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    repeated = MlpRows(dense.x_TI[some], [dense.ups[0][some]], dense.hidden_TF[some])
    rough = 0.7 * repeated.ups[0] * (1 + 1e-7 * torch.randn(repeated.ups[0].shape, generator=noise))
    theta = joint._thresholds(repeated, rough, multiplier)
    assert float(theta.isfinite().float().mean()) > 0.1
    for scale in (1 - 1e-6, 1 + 1e-6):
        assert torch.equal(rough * scale >= theta, rough >= theta)


@pytest.mark.parametrize("budget", [0.6, 0.4])
def test_the_plan_meets_the_budget_and_does_what_was_simulated(budget, monkeypatch, tmp_path):
    recipe = Rana(kinds=("dense", "rank", "exact"), allocations=("multiplier",))
    monkeypatch.setitem(RECIPES, "rana", recipe)
    model = seeded()
    torch.manual_seed(0)
    plan = rana_fx.adapt(model, batches(), budget=budget, progress=False)
    exact = [adapter for adapter in plan.adapters if adapter.exact_tau is not None]
    assert exact and all(0 < adapter.exact_kept < FFN for adapter in exact)
    problem = problem_of(seeded(), budget=budget)
    with torch.no_grad(), problem.holdout.instrumented(problem.layout) as instrumented:
        dense = [instrumented.run(batch) for batch in problem.holdout.held]
        outcome = simulate(instrumented, problem.layout, plan.adapters, problem.holdout.held, dense)
    with measuring(model) as meter:
        got = meter.run(problem.holdout.held[0])["logits"]
        measured = meter.result()
    assert {a.name: outcome.kept[a.name].outputs / FFN for a in exact} == pytest.approx(measured.exact_density, rel=1e-6)
    assert measured.budget_flops == pytest.approx(budget, abs=0.01)
    assert plan.expected_budget() == pytest.approx(measured.budget_flops, rel=1e-6)
    log_p, log_q = dense[0]["logits"].log_softmax(-1), got.log_softmax(-1)
    assert outcome.divergence == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
    # the meter of the benches has the same counts
    meter = RecordingMeter(model, plan)
    meter.rows = {}
    meter.run(problem.holdout.held[0])
    assert meter.result() == measured and meter.rows.keys() == measured.density.keys()
    plan.save(tmp_path)
    assert rana_fx.load_plan(tmp_path).digest() == plan.digest()


def test_without_components_there_is_nothing_to_correct():
    problem = problem_of(seeded(), budget=0.5)
    with torch.no_grad():
        made = Rana(kinds=("dense", "neuron", "exact")).solve(problem)
    assert {adapter.kind for adapter in made} == {"neuron"} and all(adapter.exact_tau is None for adapter in made)

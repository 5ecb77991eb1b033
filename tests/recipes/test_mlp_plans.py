"""Plans with gated MLPs and a threshold per neuron: simulated, saved, explained, measured, re-estimated thresholds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import relu

import rana_fx
from rana_fx.evaluation.measure import measuring
from rana_fx.recipes import RECIPES
from rana_fx.recipes.rana.recipe import Rana
from rana_fx.recipes.simulate import simulate
from rana_fx.runtime.attachment import attached
from rana_fx.training import rethreshold, trained_plan
from tests.recipes.test_mlp_gated import FFN, WIDTH, batches, problem_of, seeded
from tests.support.architectures import ids
from tests.support.gates import per_neuron

MASKS_AND_GATED = Rana(kinds=("dense", "neuron", "gated"), gates=False)
KINDS = {False: ["gated", "gated"], True: ["neuron", "gated", "neuron", "gated"]}


@pytest.fixture(params=[False, True], ids=["dense gates", "adapted gates"])
def gated(monkeypatch, request):
    """(a model of two blocks behind gates that are zero for half of the neurons, its plan: both are gated; the recipe)."""
    recipe = replace(MASKS_AND_GATED, gates=request.param)
    monkeypatch.setitem(RECIPES, "rana", recipe)
    model = seeded(activation=relu)
    torch.manual_seed(0)
    plan = rana_fx.adapt(model, batches(), budget=0.6, progress=False)
    assert [adapter.kind for adapter in plan.adapters] == KINDS[request.param]
    return model, plan, recipe


def test_the_simulation_keeps_and_loses_what_the_attached_plan_does(gated):
    model, plan, recipe = gated
    problem = problem_of(seeded(activation=relu), budget=0.6)
    with torch.no_grad():
        adapters = recipe.solve(problem)
        with problem.holdout.instrumented(problem.layout) as instrumented:
            dense = [instrumented.run(batch) for batch in problem.holdout.held]
            outcome = simulate(instrumented, problem.layout, adapters, problem.holdout.held, dense)
    assert all(torch.equal(ours.tau, theirs.tau) for ours, theirs in zip(adapters, plan.adapters, strict=True))
    with measuring(model) as meter:
        got = meter.run(problem.holdout.held[0])["logits"]
        measured = meter.result()
    assert {a.name: outcome.kept[a.name].ranks / a.ranks for a in adapters} == pytest.approx(measured.density, rel=1e-6)
    assert plan.expected_budget() == pytest.approx(measured.budget_flops, rel=1e-6)
    assert plan.expected_budget() == pytest.approx(0.6, abs=0.005)
    log_p, log_q = dense[0]["logits"].log_softmax(-1), got.log_softmax(-1)
    assert outcome.divergence == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)


def test_the_plan_reports_what_a_gated_mlp_keeps_and_costs(gated, tmp_path):
    model, plan, recipe = gated
    downs = [adapter for adapter in plan.adapters if adapter.kind == "gated"]
    gates = sum(FFN * adapter.kept for adapter in plan.adapters if adapter.kind == "neuron") or 2 * WIDTH * FFN
    expected = (gates + 2 * WIDTH * sum(adapter.kept for adapter in downs)) / (2 * 3 * WIDTH * FFN)
    assert plan.expected_budget("flops") == pytest.approx(expected) == pytest.approx(plan.expected_budget("bytes"))
    plan.save(tmp_path)
    again = rana_fx.load_plan(tmp_path)
    assert again.digest() == plan.digest() and again.to_dict() == plan.to_dict()
    assert all(torch.equal(ours.tau, theirs.tau) for ours, theirs in zip(plan.adapters, again.adapters, strict=True))
    assert {tuple(adapter.tau.shape) for adapter in again.adapters if adapter.kind == "gated"} == {(FFN,)}
    rows = {row.site: row for row in rana_fx.explain(model, batches()[0]).rows}
    share = downs[0].kept / FFN
    gate = "neuron" if recipe.gates else "dense"
    assert [rows[name].action for name in ("gates.0", "ups.0", "downs.0")] == [gate, "gated", "gated"]
    dense = rows["gates.0"].detail == "it tells which neurons downs.0 needs: it stays dense" and rows["gates.0"].flops == 1
    assert dense == (not recipe.gates)
    assert rows["ups.0"].detail == "rows of neurons that downs.0 drops are not needed"
    assert f"{share * FFN:.1f} of {FFN} kept by the output of gates.0" in rows["downs.0"].detail
    assert rows["ups.0"].flops == rows["downs.0"].flops == pytest.approx(share)


def test_without_the_kind_there_is_no_joint_candidate():
    problem = problem_of(seeded(activation=relu), budget=0.6)
    with torch.no_grad():
        kinds = {adapter.kind for adapter in Rana(kinds=("dense", "neuron")).solve(problem)}
    assert kinds == {"neuron"}


def test_one_fraction_for_all_may_be_the_joint_candidate_in_every_block():
    problem = problem_of(seeded(activation=relu), budget=0.6)
    with torch.no_grad():
        made = replace(MASKS_AND_GATED, allocations=("fraction",), refine_lambda=False).solve(problem)
    assert [adapter.kind for adapter in made] == ["gated", "gated"]
    # a third of the cost is the gates'
    assert all(adapter.flops == pytest.approx((0.6 - 1 / 3) * 3 / 2 * adapter.dense_flops, rel=0.02) for adapter in made)
    problem = problem_of(seeded(activation=relu), budget=0.3)
    with torch.no_grad():
        made = replace(MASKS_AND_GATED, allocations=("fraction",)).solve(problem)
    # which exceeds the budget here
    assert {adapter.kind for adapter in made} == {"neuron"}


def test_thresholds_of_neurons_move_together_to_where_they_keep_what_was_planned():
    model, _, plan = per_neuron(depth=1)
    (adapter,) = plan.adapters
    texts = [ids() for _ in range(8)]
    with measuring(model) as meter:
        for batch in texts:
            meter.run(batch)
    off = abs(meter.result().density[adapter.name] - adapter.density)
    result = rethreshold(model, texts)
    assert abs(result.density[adapter.name] - adapter.density) < min(0.01, off)
    (moved,) = trained_plan(model).adapters
    plain = torch.isfinite(adapter.tau) & (adapter.tau > 0)
    ratios = moved.tau[plain] / adapter.tau[plain]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    assert abs(float(ratios[0]) - 1) > 0.01
    # neurons that are never or always kept remain so
    assert moved.tau[2] == torch.inf and moved.tau[5] == 0
    assert attached(model).plan.expected_budget() == plan.expected_budget()

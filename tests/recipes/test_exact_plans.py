"""Plans with exact outputs: saved, explained, simulated and trained; their thresholds are not moved."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import rana_fx
from rana_fx import plan_io as planfile
from rana_fx.errors import PlanFileError, PlanVersion
from rana_fx.evaluation.measure import measuring
from rana_fx.recipes.rana.refine import as_simulated
from rana_fx.recipes.simulate import simulate
from rana_fx.runtime.prefill import costs_more, memory_of
from rana_fx.training import rethreshold, trainable, trained_plan
from tests.recipes.test_rana import Classifier, calibrated_with_holdout
from tests.support.architectures import build, ids
from tests.support.exact import FFN, WIDTH, batch_of, by_hand, mlp, plan_for, without


@pytest.fixture
def made():
    return mlp()


def header_of(folder):
    return json.loads((folder / planfile.HEADER).read_text())


def test_round_trip_and_digest(made, tmp_path):
    _, plan = made
    plan.save(tmp_path)
    assert header_of(tmp_path)["format"] == planfile.EXACT == 3
    again = rana_fx.load_plan(tmp_path)
    assert again.digest() == plan.digest() and again.to_dict() == plan.to_dict()
    (ours,), (theirs,) = plan.adapters, again.adapters
    assert torch.equal(ours.exact_tau, theirs.exact_tau) and theirs.exact_kept == ours.exact_kept == FFN / 4
    changed = [replace(ours, exact_kept=ours.exact_kept + 1), replace(ours, exact_tau=ours.exact_tau + 1)]
    digests = {replace(plan, adapters=(adapter,)).digest() for adapter in (ours, *changed)}
    assert len({*digests, without(plan).digest()}) == 4


def test_plans_without_exact_outputs_are_what_they_were(made, tmp_path):
    """They are written in format 2, which older versions read, with the same digest."""
    plan = without(made[1])
    plan.save(tmp_path)
    header = header_of(tmp_path)
    assert header["format"] == planfile.BEFORE == 2
    assert not any("exact_kept" in adapter for adapter in header["plan"]["adapters"])
    again = rana_fx.load_plan(tmp_path)
    assert again.digest() == plan.digest() and again.adapters[0].exact_tau is None


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda h: h.update(format=planfile.FORMAT + 1), PlanVersion, "Upgrade rana_fx"),
        (lambda h: h.update(format=1), PlanVersion, "Make the plan again"),
        (lambda h: h["plan"]["adapters"][0].pop("exact_kept"), PlanFileError, "come together"),
        (lambda h: h["plan"]["adapters"][0].update(exact_kept=1e9), PlanFileError, "exact_kept"),
        (lambda h: h["plan"]["adapters"][0].update(exact_kept=3.0), PlanFileError, "does not match its digest"),
    ],
)
def test_files_that_do_not_fit_are_refused(made, tmp_path, change, error, text):
    made[1].save(tmp_path)
    header = header_of(tmp_path)
    change(header)
    (tmp_path / planfile.HEADER).write_text(json.dumps(header))
    with pytest.raises(error, match=text):
        rana_fx.load_plan(tmp_path)


def test_reports_show_exact_outputs(made):
    model, plan = made
    rows = {row.site: row for row in rana_fx.explain(model, batch_of()).rows}
    assert f", {FFN / 4:.1f} of {FFN} outputs exact" in rows["up"].detail
    assert "more FLOPs than dense during prefill" in rows["up"].detail
    assert rows["up"].flops == pytest.approx((6 * WIDTH + 3 * FFN + WIDTH * FFN / 4) / (WIDTH * FFN))
    assert f", {FFN / 4:.1f} of {FFN} outputs exact" in plan.summary(all=True)
    assert "exact" not in without(plan).summary(all=True)


def test_memory_counts_the_weight_as_kept(made):
    _, plan = made
    assert memory_of(plan).replaced == 0 and memory_of(without(plan)).replaced == 4 * WIDTH * FFN
    assert costs_more(plan, plan.adapters[0]) and not costs_more(without(plan), without(plan).adapters[0])


def test_expected_budget_takes_measured_counts(made):
    _, plan = made
    (adapter,) = plan.adapters
    dense = sum(site.flops for site in plan.sites if site.counted)
    cost = 6 * WIDTH + 2 * FFN + 7 * WIDTH
    got = plan.expected_budget("flops", kept={"up": 2.0}, exact_kept={"up": 7.0})
    assert got == pytest.approx(1 + (cost - WIDTH * FFN) / dense)
    assert plan.expected_budget("flops", exact_kept={"up": adapter.exact_kept}) == pytest.approx(plan.expected_budget("flops"))


def test_trial_keeps_and_loses_what_the_attached_plan_does():
    torch.manual_seed(0)
    model = Classifier()
    batches = [(torch.randn(4, 128, 4),) for _ in range(9)]
    layout, _, holdout = calibrated_with_holdout(model, batches)
    plan = plan_for(model, batches[0], ("ups.0", "ups.1"))
    with holdout.instrumented(layout) as instrumented, torch.no_grad():
        dense = [instrumented.run(batch) for batch in holdout.held]
        outcome = simulate(instrumented, layout, plan.adapters, holdout.held, dense)
        plain = simulate(instrumented, layout, without(plan).adapters, holdout.held, dense)
    assert all(kept.outputs is None for kept in plain.kept.values()) and outcome.divergence < plain.divergence
    rana_fx.attach(model, plan)
    with measuring(model) as meter:
        got = meter.run(holdout.held[0])["logits"]
        measured = meter.result()
    shares = {adapter.name: outcome.kept[adapter.name].outputs / adapter.out for adapter in plan.adapters}
    assert shares == pytest.approx(measured.exact_density, rel=1e-6) and all(0 < share < 1 for share in shares.values())
    assert {a.name: outcome.kept[a.name].ranks / a.ranks for a in plan.adapters} == pytest.approx(measured.density, rel=1e-6)
    log_p, log_q = dense[0]["logits"].log_softmax(-1), got.log_softmax(-1)
    assert outcome.divergence == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
    # the cost that refine stores in an adapter equals that of the model
    found = replace(plan, adapters=tuple(as_simulated(adapter, outcome) for adapter in plan.adapters))
    assert [adapter.exact_kept for adapter in found.adapters] == [kept.outputs for kept in outcome.kept.values()]
    assert found.expected_budget("flops") == pytest.approx(measured.budget_flops, rel=1e-6)
    assert found.expected_budget("bytes") == pytest.approx(measured.budget_bytes, rel=1e-6)


def test_thresholds_on_outputs_are_neither_trained_nor_moved():
    model, batch = build("plain_biased", 1)
    texts = [batch, *(ids() for _ in range(3))]
    plan = plan_for(model, batch, ("up_proj",), ranks=8)
    rana_fx.attach(model, plan)
    (adapter,) = plan.adapters
    assert trained_plan(model).digest() == plan.digest()
    chosen = trainable(model)
    assert {name.removeprefix("rana_fx.") for name in chosen} == {
        "a0_router", "a0_weight", "a0_bias", "model.layers.0.mlp.up_proj.weight",
    }  # fmt: skip
    assert not any("exact_tau" in name for name in trainable(model, what="all"))
    result = rethreshold(model, texts)
    found = trained_plan(model).adapters[0]
    assert torch.equal(found.exact_tau, adapter.exact_tau) and not torch.equal(found.tau, adapter.tau)
    assert found.exact_kept == adapter.exact_kept
    assert result.density[adapter.name] == pytest.approx(adapter.density, abs=0.02)
    moved = replace(plan, adapters=(found,))
    kept = [by_hand(model, moved, one)[1][adapter.name] for one in texts]
    assert result.exact_density[adapter.name] == pytest.approx(sum(kept) / len(kept) / adapter.out, abs=0.01)


def test_a_cast_model_has_a_plan_of_its_dtype():
    model, _ = mlp()
    model.bfloat16()
    plan = trained_plan(model)
    (adapter,) = plan.adapters
    assert adapter.exact_tau.dtype == torch.float32 and adapter.router.dtype == torch.bfloat16
    assert adapter.bytes == pytest.approx(2 * (6 * WIDTH + 3 * FFN + WIDTH * FFN / 4))
    rana_fx.attach(model, plan)

"""Several budgets and targets on tiny models: the plans are those of one budget alone, measured on text that nothing else saw."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx.calibration import calibrate
from rana_fx.errors import TargetNotMeasurable, TooFewHeldOut
from rana_fx.evaluation.measure import measuring
from rana_fx.recipes import RECIPES, Rana, takes_budget
from rana_fx.recipes.memory import Memory
from rana_fx.recipes.rana import prepare
from rana_fx.runtime.attachment import attached
from tests.support.architectures import VOCAB, build

RAGGED = torch.tensor([[1] * 12, [1] * 5 + [0] * 7, [1] * 2 + [0] * 10, [1] * 9 + [0] * 3])


def text(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (4, 12), generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("plain_llama", 1)[0]


def adapt(model, batches, **options):
    plan = rana_fx.adapt(model, batches, progress=False, **options)
    if attached(model) is not None:
        rana_fx.detach(model)
    return plan


def tensors(plan):
    return [value for adapter in plan.adapters for value in adapter.tensors().values()]


@pytest.mark.parametrize("metric", ["flops", "bytes"])
@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if takes_budget(recipe)])
def test_each_plan_is_the_one_of_its_budget_alone(model, recipe, metric):
    batches, budgets = text(9), [0.9, 0.7] if metric == "flops" else [0.3, 1.0] if recipe == "rana" else [0.8]
    plans = adapt(model, batches, budgets=budgets, recipe=recipe, metric=metric, held_out=text(2, seed=1))
    assert [plan.budget for plan in plans] == budgets
    assert [point.budget for point in plans[0].curve.points] == sorted(budgets)
    for plan in plans:
        alone = adapt(model, batches, budget=plan.budget, recipe=recipe, metric=metric)
        # facts and every bit of the tensors
        assert replace(plan, curve=None).digest() == alone.digest()
        assert plan.curve == plans[0].curve and alone.curve is None
    # training the factors of one plan changes no other one
    places = [{value.untyped_storage().data_ptr() for value in tensors(plan) if value.numel()} for plan in plans]
    assert not set.intersection(*places) or len(plans) == 1


def test_gradients_and_candidates_are_computed_once(model, monkeypatch):
    calls = []
    for name in ("sensitivities", "make_decisions"):
        original = getattr(prepare, name)
        monkeypatch.setattr(prepare, name, lambda *a, _o=original, _n=name, **k: calls.append(_n) or _o(*a, **k))
    adapt(model, text(9), budgets=[0.9, 0.7, 0.8], held_out=text(2, seed=1))
    assert calls == ["sensitivities", "make_decisions"]


def test_other_recipes_keep_what_no_budget_changes(model, monkeypatch):
    made = []
    original = Memory.once

    def once(self, key, make):
        return original(self, key, lambda: made.append(key) or make())

    monkeypatch.setattr(Memory, "once", once)
    for recipe in ("static", "teal", "cats", "paper"):
        adapt(model, text(9), budgets=[0.9, 0.8, 0.85], recipe=recipe, held_out=text(2, seed=1))
    assert len(made) == len(set(made)) >= 4


def test_memory_is_bounded():
    memory, made = Memory(most_bytes=100), []

    def large():
        made.append(torch.zeros(20))
        return made[-1], "a fact"

    assert memory.once("one", large) is memory.once("one", large)
    assert memory.once("two", large) is not memory.once("two", large)
    assert len(made) == 3


def test_held_out_text_is_only_measured_on(model, monkeypatch):
    seen = []
    original = calibrate.Probe.load

    def load(self, batch):
        seen.append(batch)
        return original(self, batch)

    monkeypatch.setattr(calibrate.Probe, "load", load)
    batches = text(12)
    (plan,) = adapt(model, batches, budgets=[0.8])
    held_out = [batches[index] for index in (3, 7, 11)]
    point = plan.curve.points[0]
    assert (point.documents, point.tokens) == (12, 3 * 48)
    # calibration, gradients, simulations come first: the first of these is the first measurement
    first = next(index for index, batch in enumerate(seen) if batch is held_out[0])
    assert all(any(batch is one for one in held_out) for batch in seen[first:])
    assert plan.tokens == 8 * 48  # of nine batches one is held out by Tee
    alone = adapt(model, [batch for batch in batches if not any(batch is one for one in held_out)], budget=0.8)
    assert replace(plan, curve=None).digest() == alone.digest()


class Named(nn.Module):
    """Takes what tokenizers return."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask):  # noqa: ARG002
        return self.inner(input_ids)


def test_measurements_are_those_of_the_attached_plan(model):
    named = Named(model)
    held_out = [{"input_ids": ids, "attention_mask": RAGGED} for ids in text(3, seed=5)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in text(9)]
    (plan,) = adapt(named, batches, budgets=[0.7], held_out=held_out)
    rana_fx.attach(named, plan)
    sums = {"kl": [], "dense": [], "loss": []}
    with measuring(named) as meter, torch.no_grad():
        for batch in held_out:
            adapted, dense = (run(**batch).logits.double().log_softmax(-1) for run in (meter, named))
            for row, (log_q, log_p) in enumerate(zip(adapted, dense, strict=True)):
                length, target = int(RAGGED[row].sum()), batch["input_ids"][row]
                sums["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1)[:length].sum())
                for name, scores in (("dense", log_p), ("loss", log_q)):
                    sums[name].append(-scores[: length - 1].gather(1, target[1:length, None]).sum())
    rana_fx.detach(named)
    point, kl, dense, loss = plan.curve.points[0], *(sum(map(float, values)) for values in sums.values())
    tokens, targets = 3 * int(RAGGED.sum()), 3 * int(RAGGED.sum() - 4)
    assert (point.tokens, point.documents) == (tokens, 12)
    # sums of some hundred logits in fp32
    assert point.kl.mean == pytest.approx(kl / tokens, abs=1e-5)
    assert point.loss.mean == pytest.approx((loss - dense) / targets, abs=1e-5)
    ratio = torch.tensor([loss, dense]).double().div(targets).exp()
    assert point.perplexity.mean == pytest.approx(float(ratio[0] - ratio[1]), abs=1e-3)
    assert 0 < point.kl.low < point.kl.mean < point.kl.high


def test_a_target_is_kept_by_the_cheapest_plan(model):
    batches, held_out = text(9), text(4, seed=1)
    (half,) = adapt(model, batches, budgets=[0.7], held_out=held_out)
    limit = half.curve.points[0].kl.high * 1.02
    plan = rana_fx.adapt(model, batches, max_kl=limit, held_out=held_out, progress=False)
    assert attached(model).plan is plan
    rana_fx.detach(model)
    assert plan.curve.at(plan.budget).kl.high <= limit < max(point.kl.high for point in plan.curve.points)
    # what 0.7 reaches needs no more than 0.7
    assert plan.budget <= 0.71
    assert replace(plan, curve=None, skips=half.skips).digest() == adapt(model, batches, budget=plan.budget).digest()
    assert plan.curve.promise.limit == limit


def test_too_few_held_out_documents(model):
    with pytest.raises(TooFewHeldOut, match="^4 held-out documents are too few .* at least 8 are needed"):
        adapt(model, text(4), max_kl=0.02)
    with pytest.raises(TooFewHeldOut, match="^0 held-out"):
        adapt(model, text(3), max_kl=0.02)
    with pytest.raises(TooFewHeldOut, match="of max_loss"):
        adapt(model, text(4), max_loss=0.02, held_out=[ids[:, :1] for ids in text(4)])
    (plan,) = adapt(model, text(4), budgets=[0.8])
    assert plan.curve.points[0].kl is None
    assert plan.notes() == ("4 held-out documents: 8 are needed to measure what the plan loses",)


class Scores(nn.Module):
    """Scores of a text, or no scores."""

    def __init__(self, inner, *, logits):
        super().__init__()
        self.inner, self.logits = inner, logits

    def forward(self, ids):
        pooled = self.inner(ids).logits.mean(1)
        return {"logits": pooled} if self.logits else pooled


def test_models_that_predict_no_tokens(model):
    classes = Scores(model, logits=True)
    plan = adapt(classes, text(9), max_kl=0.05, held_out=text(4, seed=1))
    point = plan.curve.at(plan.budget)
    assert point.kl.high <= 0.05 and point.documents == point.tokens == 16 and point.loss is None
    with pytest.raises(TargetNotMeasurable, match="max_loss cannot be measured on Scores: its logits are"):
        adapt(classes, text(9), max_loss=0.05, held_out=text(4, seed=1))
    with pytest.raises(TargetNotMeasurable, match="max_kl cannot be measured on Scores: its output has no logits"):
        adapt(Scores(model, logits=False), text(9), max_kl=0.05, held_out=text(4, seed=1))


def test_skips_found_before_a_budget_matters_are_those_of_every_plan():
    torch.manual_seed(0)
    model = build("plain_llama", 1)[0]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()  # down reads zeros
    plans = adapt(model, text(9), budgets=[0.9, 0.8], held_out=text(2, seed=1))
    for plan in plans:
        assert [skip.reason for skip in plan.left if "down_proj" in skip.site][:1] == [
            "its input is zero throughout the calibration text: it stays dense"
        ]


def test_selections_and_recipe_objects_are_those_of_each_plan(model):
    options = {"recipe": Rana(weighted=False), "skip": "*.down_proj", "held_out": text(2, seed=1)}
    batches, seen = text(9), []
    plans = rana_fx.adapt(model, batches, budgets=[0.9, 0.75], progress=seen.append, **options)
    for plan in plans:
        assert plan.recipe == "rana(weighted=False)"
        assert not any("down_proj" in name for adapter in plan.adapters for name in adapter.sites)
        assert {skip.reason for skip in plan.left if "down_proj" in skip.site} == {"left dense by skip='*.down_proj'"}
        alone = adapt(model, batches, budget=plan.budget, recipe=options["recipe"], skip="*.down_proj")
        assert replace(plan, curve=None).digest() == alone.digest()
    fractions = [step.fraction for step in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert [step.done for step in seen if step.stage == "plans" and step.total] == [1, 2]
    inside = {"gradients", "decompose", "allocate", "build"}
    assert {step.stage for step in seen} == {"calibrate", "plans", "solve"} | inside


def test_a_search_goes_on_after_a_budget_below_what_a_selection_leaves(model):
    # a third of the linears stay dense: the first budgets that are tried cannot be reached
    options = {"skip": ["*.down_proj", "*.up_proj"], "held_out": text(4, seed=1), "recipe": "teal"}
    seen = []
    plan = rana_fx.adapt(model, text(9), max_kl=1e3, progress=seen.append, **options)
    rana_fx.detach(model)
    share = sum(site.cost("flops") for site in plan.sites if site.counted and ("down" in site.name or "up" in site.name))
    share /= sum(site.cost("flops") for site in plan.sites if site.counted)
    assert plan.budget > share and plan.curve.at(plan.budget) is not None
    assert seen[-1].stage == "plan" and seen[-1].fraction == 1.0

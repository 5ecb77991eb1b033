"""Budgets of all linears: the output head is adapted and counted like any other, also where it is tied to the embedding."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx import plan_io
from rana_fx._backend import rewritten
from rana_fx.adaptation import IS_TABLE, calibrated, planned, solved
from rana_fx.cost import Cost
from rana_fx.dense_memory import is_freed
from rana_fx.errors import BudgetUnreachable, PlanFileError, UnknownChoice
from rana_fx.evaluation.measure import measuring
from rana_fx.evaluation.perplexity import load_model
from rana_fx.evaluation.text import load_texts, token_batches
from rana_fx.recipes import RECIPES
from rana_fx.runtime.prefill import memory_of
from rana_fx.runtime.replaced_weights import replaced_weights
from tests.support.adapted import relative
from tests.support.plain_llama import Output, plain_of

DATA = Path(rana_fx.__file__).parent / "data"
CAP = 20.0


class Capped(nn.Module):
    """Logits in (-20, 20), as those of Gemma 2."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return Output(torch.tanh(self.inner(input_ids, attention_mask).logits / CAP) * CAP)


def tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


FORMS = {"untied": lambda model: model, "tied": tied, "capped": lambda model: Capped(tied(model))}


@pytest.fixture(scope="module")
def material():
    """(a trained model of two layers and 4096 tokens, calibration batches, other batches)."""
    model, tokenizer = load_model(str(DATA / "tiny-llama-prose-5m"), device="cpu")
    texts = load_texts(DATA / "calib.jsonl.xz")
    random.Random(0).shuffle(texts)
    batches = token_batches(texts, tokenizer, tokens=3072, context=128, batch_size=2)
    held_out = token_batches(load_texts(DATA / "eval.jsonl.xz"), tokenizer, tokens=512, context=128, batch_size=2)
    return plain_of(model, layers=2), batches, held_out


@pytest.fixture(scope="module", params=FORMS)
def adapted(request, material):
    """(the form's name, an adapted model, its plan, batches of other text)."""
    model, batches, held_out = material
    model = FORMS[request.param](copy.deepcopy(model))
    plan = rana_fx.adapt(model, batches, budget=0.13, metric="bytes", scope="all", progress=False)
    return request.param, model, plan, held_out


def head_of(plan):
    (site,) = (site for site in plan.sites if site.role == "head")
    return site


def test_the_budget_counts_the_head(adapted):
    _, model, plan, held_out = adapted
    head = head_of(plan)
    assert head.counted and plan.scope == "all"
    assert plan.dense_cost == sum((site.dense_cost for site in plan.sites), Cost())
    assert plan.adapter_of(head.name) is not None  # at half of 8 bits it cannot stay dense
    spent = sum(adapter.bytes for adapter in plan.adapters)
    left = [site for site in plan.sites if plan.adapter_of(site.name) is None]
    assert (spent + sum(site.cost("bytes") for site in left)) / plan.dense_cost.bytes == pytest.approx(plan.expected_budget())
    assert plan.expected_budget() == pytest.approx(0.13, abs=0.005)
    with measuring(model) as meter:
        for batch in held_out:
            meter.run(batch)
        measured = meter.result()
    assert measured.budget_bytes == pytest.approx(0.13, abs=0.01)


def test_compiled_logits_are_those_of_the_adapters(adapted):
    _, model, plan, held_out = adapted
    batch = {"input_ids": held_out[0]["input_ids"][:1, :24]}
    torch.compiler.reset()
    with torch.no_grad(), measuring(model) as meter:
        expected = meter.run(batch).logits
        got = torch.compile(model, backend=rewritten)(**batch).logits
        dense = model(**batch).logits
    # the same operations, of which the compiled ones may sum in another order
    assert relative(got, expected) < 1e-5 < 1e-2 < relative(got, dense)


def test_the_head_multiplies_by_its_own_copy(material):
    """The embedding and the dense model stay what they are."""
    model, batches, _ = material
    model = tied(copy.deepcopy(model))
    before = model.lm_head.weight.detach().clone()
    calibration = calibrated(model, batches, RECIPES["rana"], scope="all")
    problem = calibration.problem(budget=0.2, metric="bytes", recipe="rana")
    recipe = type(RECIPES["rana"])(kinds=("dense", "stored"))
    plan = planned(calibration, problem, solved(problem, recipe))
    head = plan.adapter_of(head_of(plan).name)
    assert head.kind == "stored" and not head.reads_model and head.bits() == {"weight": head.bits()["weight"]}
    rana_fx.attach(model, plan)
    assert torch.equal(model.lm_head.weight, before) and model.lm_head.weight is model.model.embed_tokens.weight
    ids = {"input_ids": batches[0]["input_ids"][:1, :8]}
    with torch.no_grad():
        torch.compiler.reset()
        torch.compile(model, backend=rewritten, options={"prefill": "factors"})(**ids)
    assert torch.equal(model.lm_head.weight, before) and not is_freed(model.lm_head.weight)


def test_a_table_is_not_freed_and_a_head_alone_is(adapted):
    name, model, plan, _ = adapted
    head = head_of(plan)
    assert plan.notes(head.name) == (() if name == "untied" else (IS_TABLE,))
    own = plan.adapter_of(head.name)
    stored = replace(plan, adapters=tuple(a for a in plan.adapters if a is not own), skips=plan.skips)
    assert head.name not in replaced_weights(stored)
    assert (head.name in replaced_weights(plan)) == (name == "untied" and not own.reads_model)
    sizes = {site.name: site.cost("bytes") for site in plan.sites}
    assert memory_of(plan).replaced == sum(sizes[site] for site in replaced_weights(plan))


def test_texts_say_what_is_counted(adapted):
    name, model, plan, held_out = adapted
    assert f"budget {plan.budget:g} in bytes, output head included" in plan.summary()
    assert "head" in plan.summary().splitlines()[4] + plan.summary()
    report = rana_fx.explain(model, {"input_ids": held_out[0]["input_ids"][:1, :8]})
    assert report.scope == report.to_dict()["scope"] == "all"
    assert "output head included" in " ".join(str(report).split())
    (row,) = (row for row in report.rows if row.role == "head")
    assert row.action == plan.adapter_of(row.site).kind and row.bytes < 0.3
    assert (IS_TABLE in row.detail) == (name != "untied")


def test_a_plan_keeps_its_scope(adapted, tmp_path):
    _, _, plan, _ = adapted
    plan.save(tmp_path)
    path = tmp_path / plan_io.HEADER
    header = json.loads(path.read_text())
    assert header["format"] == plan_io.SCOPE == 4 and header["plan"]["scope"] == "all"
    again = rana_fx.load_plan(tmp_path)
    assert again.scope == "all" and again.digest() == plan.digest() and again.to_dict() == plan.to_dict()
    blocks = replace(plan, scope="blocks")
    assert "scope" not in blocks.to_dict() and blocks.digest() != plan.digest()
    header["plan"]["scope"] = "head"
    path.write_text(json.dumps(header))
    with pytest.raises(PlanFileError, match="scope 'head' is none of blocks, all"):
        rana_fx.load_plan(tmp_path)


def test_an_unknown_scope(material):
    model, batches, _ = material
    with pytest.raises(UnknownChoice, match=r"scope='heads' is not known. Pick one of: blocks, all\."):
        rana_fx.adapt(model, batches, scope="heads", progress=False)


@pytest.mark.parametrize("recipe", ["paper", "cats"])
def test_recipes_that_leave_the_head_dense_count_it(recipe, material):
    model, batches, _ = material
    model = copy.deepcopy(model)
    calibration = calibrated(model, batches, RECIPES[recipe], scope="all")
    problem = calibration.problem(budget=0.9, metric="flops", recipe=recipe)
    plan = planned(calibration, problem, solved(problem, RECIPES[recipe]))
    head = head_of(plan)
    assert head.counted and plan.adapter_of(head.name) is None
    assert plan.expected_budget() == pytest.approx(0.9, abs=0.005)
    (reason,) = (skip.reason for skip in plan.left if skip.site == head.name)
    assert reason == {"paper": "outside the blocks: dense in the paper's recipe", "cats": "dense in CATS"}[recipe]
    with pytest.raises(BudgetUnreachable, match=rf"recipe='{recipe}' on this model: the lowest reachable budget"):
        solved(calibration.problem(budget=0.35, metric="flops", recipe=recipe), RECIPES[recipe])


@pytest.mark.parametrize(("recipe", "kind"), [("teal", "neuron"), ("static", "static")])
def test_baselines_of_every_linear_adapt_the_head(recipe, kind, material):
    model, batches, _ = material
    calibration = calibrated(copy.deepcopy(model), batches, RECIPES[recipe], scope="all")
    problem = calibration.problem(budget=0.5, metric="flops", recipe=recipe)
    plan = planned(calibration, problem, solved(problem, RECIPES[recipe]))
    assert plan.adapter_of(head_of(plan).name).kind == kind
    assert plan.expected_budget() == pytest.approx(0.5, abs=0.005)

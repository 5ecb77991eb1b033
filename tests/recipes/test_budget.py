"""The budget measured on held-out text is the target budget, for every recipe, on a trained model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import rana_fx
from rana_fx.adaptation import calibrated, planned, solved
from rana_fx.evaluation.perplexity import evaluate, evaluate_adapted, load_model
from rana_fx.evaluation.text import load_texts, token_batches
from rana_fx.recipes import RECIPES
from tests.support.plain_llama import plain_of

DATA = Path(rana_fx.__file__).parent / "data"


@pytest.fixture(scope="module")
def material():
    model, tokenizer = load_model(str(DATA / "tiny-llama-prose-5m"), device="cpu")
    # two layers: the search for a plan takes twice as long for twice the layers, and traces the model
    model = plain_of(model, layers=2)
    texts = load_texts(DATA / "calib.jsonl.xz")
    random.Random(0).shuffle(texts)
    batches = token_batches(texts, tokenizer, tokens=6000, context=256)
    held_out = token_batches(load_texts(DATA / "eval.jsonl.xz"), tokenizer, tokens=2048, context=256)
    dense = evaluate(model, held_out, progress=False).mean_loss
    # recipe rana samples every group that another one does
    return model, calibrated(model, batches, RECIPES["rana"]), held_out, dense


@pytest.mark.parametrize(
    ("recipe", "metric", "budget"),
    [
        ("paper", "flops", 0.58),
        ("paper", "bytes", 0.4),
        ("static", "flops", 0.4),
        ("teal", "flops", 0.58),
        ("cats", "bytes", 0.8),
        ("rana", "flops", 0.58),
        ("rana", "bytes", 0.25),  # with more it stores all of this model
    ],
)
def test_budget_on_held_out_text(material, recipe, metric, budget):
    model, calibration, held_out, dense = material
    problem = calibration.problem(budget=budget, metric=metric, recipe=recipe)
    plan = planned(calibration, problem, solved(problem, RECIPES[recipe]))
    rana_fx.attach(model, plan)
    try:
        quality, measured = evaluate_adapted(model, held_out, progress=False)
    finally:
        rana_fx.detach(model)
    found = {"flops": measured.budget_flops, "bytes": measured.budget_bytes}[metric]
    # static ranks are whole: of 256 inputs one is 0.4 %
    assert plan.expected_budget() == pytest.approx(budget, abs=0.005)
    assert found == pytest.approx(budget, abs=0.02)
    # within 1 of the dense model, from which a plan in 8 bits differs by rounding
    assert dense - 0.01 < quality.mean_loss < dense + 1

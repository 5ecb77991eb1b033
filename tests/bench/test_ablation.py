"""bench.ablation and bench.prefix on a model of one tiny block: rows of every variant and rule; dense positions."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import typer

from bench.common.calibrated import batches_of, calibrate_once
from bench.common.documents import read_text
from bench.quality import ablation, prefix
from rana_fx.calibration.holdout import Holdout
from rana_fx.evaluation.perplexity import load_model
from rana_fx.recipes import RECIPES
from tests.support.plain_llama import plain_of
from tests.support.tiny_model import saved_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny model and the embedded tokenizer, and a text."""
    model, text = saved_tiny(tmp_path_factory.mktemp("tiny"), layers=1)
    return str(model), str(text)


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    """The benches trace the loaded model many times: it is made of plain modules."""

    def plain(*args, **kwargs):
        network, tokenizer = load_model(*args, **kwargs)
        return plain_of(network), tokenizer

    for bench in (ablation, prefix):
        monkeypatch.setattr(bench, "load_model", plain)


def run(bench, saved, out, **options):
    model, text = saved
    given = {"budgets": "0.6", "metric": "flops", "tokens": 1024, "eval_tokens": 512, "context": 64, "seed": 0}
    bench.main(model, calib=text, text=text, out=out, **given | options)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize(
    ("metric", "budget", "variants"), [("flops", 0.6, "rana,alike,fraction"), ("bytes", 0.3, "rana,nearest")]
)
def test_a_variant_has_a_row_at_its_budget_and_a_plan_of_its_own(saved, tmp_path, metric, budget, variants, capsys):
    options = {"metric": metric, "variants": variants, "budgets": str(budget)}
    rows = run(ablation, saved, tmp_path / "rows.jsonl", **options)
    assert [row["variant"] for row in rows] == variants.split(",")
    for row in rows:
        assert row["measured"][metric] == pytest.approx(budget, abs=0.03), row["variant"]
        assert row["interval"][0] <= row["delta"] <= row["interval"][1] and row["kl"] > 0
    assert len({row["digest"] for row in rows}) == len(rows)
    assert "increase of the loss without one option of the recipe" in capsys.readouterr().out


def test_variants_leave_out_one_ingredient():
    whole = ablation.VARIANTS["rana"]
    assert whole == RECIPES["rana"]
    for name, variant in (ablation.VARIANTS | ablation.IN_BYTES).items():
        changed = [field for field, value in asdict(whole).items() if asdict(variant)[field] != value]
        assert len(changed) == (name != "rana"), name


def test_what_is_not_known_is_refused(saved, tmp_path):
    with pytest.raises(typer.BadParameter, match=r"\['nearest'\].*flops, pick of rana"):
        run(ablation, saved, tmp_path / "rows.jsonl", variants="nearest")
    with pytest.raises(typer.BadParameter, match="unknown recipe 'bare'"):
        run(prefix, saved, tmp_path / "rows.jsonl", recipe="bare")
    for bench in (ablation, prefix):
        with pytest.raises(typer.BadParameter, match="unknown metric 'joules'"):
            run(bench, saved, tmp_path / "rows.jsonl", metric="joules", **({"variants": ""} if bench is ablation else {}))


def test_dense_positions_are_those_of_the_dense_model(saved, tmp_path, capsys):
    rows = {row["rule"]: row for row in run(prefix, saved, tmp_path / "rows.jsonl", recipe="teal")}
    assert list(rows) == ["all", "first-1", "first-4", "first-16", "prompt"]
    for row in rows.values():
        spent = row["measured"]
        assert row["cost"] == pytest.approx(spent + (1 - spent) * row["dense_positions"] / 64)
    assert "increase by position" in capsys.readouterr().out
    model, text = saved
    network, tokenizer = load_model(model)
    held = read_text(text, tokenizer, tokens=512, context=64)
    calibrated = calibrate_once(network, batches_of(text, tokenizer, tokens=1024, context=64))
    plan = calibrated.plan(budget=0.6, metric="flops", recipe="teal")
    rules = {"all": 0, "most": 60, "whole": 64}
    found = prefix.measured(Holdout(network, (), ()), calibrated.layout, plan, held, rules, 64)
    change = {row["rule"]: row["delta"] for row in found}
    assert change["all"] == pytest.approx(rows["all"]["delta"], abs=1e-6)
    assert change["whole"] == 0
    # all but the last four of 64 positions predict as the dense model does
    assert 0 < abs(change["most"]) < abs(change["all"])

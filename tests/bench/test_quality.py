"""bench.quality and bench.quality.mlp_error from a model folder to rows, on a model of one tiny block."""

from __future__ import annotations

import json

import pytest
import typer

from bench.quality import mlp_error, quality
from rana_fx.errors import InvalidOption
from rana_fx.evaluation.perplexity import load_model
from tests.support.plain_llama import plain_of
from tests.support.tiny_model import saved_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny model and the embedded tokenizer, and a text."""
    return saved_tiny(tmp_path_factory.mktemp("tiny"), layers=1)


@pytest.mark.parametrize("metric", ["flops", "bytes"])
def test_every_recipe_has_rows_at_its_budget(saved, tmp_path, metric, capsys, monkeypatch):
    def plain(*args, **kwargs):
        """It is traced many times."""
        network, tokenizer = load_model(*args, **kwargs)
        return plain_of(network), tokenizer

    monkeypatch.setattr(mlp_error, "load_model", plain)
    model, text = map(str, saved)
    out = tmp_path / "rows.jsonl"
    options = {"calib": text, "text": text, "metric": metric, "recipes": ",".join(mlp_error.RECIPES_OF_BLOCKS), "budgets": "0.6"}
    mlp_error.main(model, out=out, tokens=2560, eval_tokens=512, context=64, seed=0, **options)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    errors = {row["recipe"]: row for row in rows if row["kind"] == "mlp_error"}
    assert list(errors) == list(mlp_error.RECIPES_OF_BLOCKS)
    for recipe, row in errors.items():
        # in bytes it may cost less than the budget: 8 bits everywhere cost little more than half
        least = 0.5 if metric == "bytes" and "rana" in recipe else 0.55
        assert least < row["measured"] < 0.65, recipe
        assert 0 < row["error"] < 1, recipe
    # its candidates include those of paper, and it minimises the error that is measured
    assert errors["rana_alone"]["error"] < errors["paper"]["error"]
    assert [row["basis"] for row in rows if row["kind"] == "rank_need"].count("neuron") == 2
    assert "rana_alone at 0.6" in capsys.readouterr().out


def quality_rows(saved, out, **options):
    model, text = map(str, saved)
    given = {
        "budgets": "0.6",
        "metric": "flops",
        "tokens": 1024,
        "eval_tokens": 512,
        "context": 64,
        "dtype": "float32",
        "seed": 0,
    }
    quality.main(model, calib=text, text=[text], out=out, **given | {"png": None} | options)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_baselines_have_rows_like_those_of_recipes(saved, tmp_path, capsys):
    names = "dense,teal,slicegpt,int4-g64,gptq4-g64,int8"
    png = tmp_path / "plot.png"
    options = {"recipes": names, "budgets": "0.6,0.05", "metric": "bytes", "dtype": "bfloat16", "png": png}
    rows = quality_rows(saved, tmp_path / "rows.jsonl", **options)
    found = {(row["recipe"], row["budget"]): row for row in rows}
    assert len(found) == len(rows) == 8 and png.stat().st_size > 10_000
    sliced_away = found.pop(("slicegpt", 0.05))
    assert "slicegpt" in sliced_away["unreachable"]
    dense = found.pop(("dense", 1.0))
    keys = {
        "kl",
        "agreement",
        "interval",
        "documents",
        "resampled",
        "mean_loss",
        "delta",
        "expected",
        "measured",
        "solve_seconds",
    }
    for (recipe, budget), row in found.items():
        assert keys <= row.keys(), recipe
        assert row["delta"] == pytest.approx(row["mean_loss"] - dense["mean_loss"]) and row["kl"] >= 0
        assert row["interval"][0] <= row["delta"] <= row["interval"][1] and row["documents"] >= 2
        if recipe not in ("teal", "slicegpt"):
            # one scale of bfloat16 per group: 32 inputs, and 96 in two groups, for 4 * 32 + 2 * 96 and 32 outputs
            bits = (8, 4)["4" in recipe]
            scales = 16 * (320 + (2 if "g64" in recipe else 1) * 32)
            assert budget == row["measured"]["bytes"] == pytest.approx((bits * 13312 + scales) / (16 * 13312))
            assert row["measured"]["flops"] == 1
    assert "slicegpt" in capsys.readouterr().out


def test_roundings_save_no_multiply_adds(saved, tmp_path, capsys):
    rows = quality_rows(saved, tmp_path / "rows.jsonl", recipes="dense,int8,wina")
    assert [row["recipe"] for row in rows] == ["dense", "wina"]
    assert "left out, since they save no multiply-adds: int8" in capsys.readouterr().out


def test_unknown_names_are_refused_before_calibration(saved, tmp_path, monkeypatch):
    with pytest.raises(typer.BadParameter, match="int9-g64.*slicegpt, int8"):
        quality_rows(saved, tmp_path / "rows.jsonl", recipes="dense,int9-g64")
    monkeypatch.setattr(quality, "calibrate_once", lambda *_, **__: pytest.fail("too late"))
    monkeypatch.setattr("bench.quality.slicegpt._ATTENTION", {"gemma": "self_attn"})
    with pytest.raises(InvalidOption, match="slicegpt for a model of type 'llama'.*expected one of type gemma"):
        quality_rows(saved, tmp_path / "rows.jsonl", recipes="slicegpt")

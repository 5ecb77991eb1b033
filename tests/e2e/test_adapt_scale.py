"""The scale bench: a row per number of tokens, every stage timed; and the recipe where not all rows can be kept."""

from __future__ import annotations

import json

import pytest
import torch

from bench.adapt_scale import measure, random_batches
from bench.models import build
from bench.once import counted_groups
from rana_fx.calibrate import calibrate
from rana_fx.recipes import RECIPES, Problem, rana
from rana_fx.rehearse import Keeper
from rana_fx.stats import Keep, Summary

CPU = torch.device("cpu")


@pytest.mark.parametrize("metric", ["flops", "bytes"])
def test_a_row_has_every_stage_and_what_it_took(tmp_path, metric):
    out = tmp_path / "rows.jsonl"
    measure(
        "tiny", out, tokens="2048", text=None, recipe="rana", budget=0.5, metric=metric, context=64, batch_size=4,
        dtype="bfloat16", device="cpu",
    )  # fmt: skip
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["failed"] is None and row["tokens"] == 2048 - 256  # every eighth batch is held out
    assert set(row["seconds"]) == {"calibrate", "gradients", "decompose", "allocate", "build", "attach", "solve"}
    assert row["expected"][metric] == pytest.approx(0.5, abs=0.02)
    assert row["peak_rss_gib"] > row["rss_before_gib"] > 0 and row["gpu_gib"] == {}
    assert row["notes"] == [] and row["versions"]["torch"] and row["commit"]


def test_a_failure_is_a_row(tmp_path):
    out = tmp_path / "rows.jsonl"
    measure(
        "tiny", out, tokens="128", text=None, recipe="cats", budget=0.1, metric="flops", context=64, batch_size=1,
        dtype="float32", device="cpu",
    )  # fmt: skip
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["failed"].startswith("BudgetUnreachable: budget=0.100") and row["seconds"]["calibrate"] > 0


def solve(model, *, few):
    keeper = Keeper(random_batches(6000, 64, 4, 128))
    wants = RECIPES["rana"].wants if few else counted_groups
    layout, samples, _ = calibrate(model, keeper, wanted=wants, progress=False)
    problem = Problem(layout, samples, 0.5, "flops", "rana", False, rehearsal=keeper.rehearsal(model))
    with torch.no_grad():
        return RECIPES["rana"].solve(problem), samples, layout


def test_where_rows_are_too_many_their_moments_do_as_well(monkeypatch):
    model = build("tiny", device=CPU, dtype="float32")
    whole, kept, layout = solve(model, few=False)
    assert RECIPES["rana"].wants(layout) == dict.fromkeys(kept, Keep())
    monkeypatch.setattr(rana, "_SAMPLES", 1e6)
    few, samples, layout = solve(model, few=True)
    summed = {sites for sites, sample in samples.items() if isinstance(sample, Summary)}
    # down reads 160 and makes 64: its router would be as wide as half of it, so it has no basis
    assert summed == {sites for sites in samples if "down" not in sites[0]} and len(summed) == len(samples) - 2
    for sites in summed:
        # all rows of the quarter fit: they and the moment of the others are what all rows add up to
        quarter, every = samples[sites].rows().double(), kept[sites].rows().double()
        assert len(quarter) + samples[sites].summed == len(every)
        found = samples[sites].moment.double() + quarter.t() @ quarter
        torch.testing.assert_close(found, every.t() @ every, rtol=1e-4, atol=1e-3)
    costs = [
        sum(adapter.flops for adapter in adapters) / sum(adapter.dense_flops for adapter in adapters) for adapters in (whole, few)
    ]
    assert costs == pytest.approx([0.5, 0.5], abs=0.03)
    kinds = [sorted((adapter.name, adapter.kind) for adapter in adapters) for adapters in (whole, few)]
    assert len(set(kinds[0]) & set(kinds[1])) >= len(kinds[0]) * 3 // 4

"""bench.adapt_scale: a row per number of tokens, every stage timed; recipe rana with too little memory for all samples."""

from __future__ import annotations

import json

import pytest
import torch

from bench.common.calibrated import counted_groups
from bench.common.models import SHAPES, build
from bench.speed import adapt_scale
from bench.speed.adapt_scale import measure, random_batches
from rana_fx.calibration.calibrate import calibrate
from rana_fx.calibration.holdout import Tee
from rana_fx.calibration.samples import Keep, Summary
from rana_fx.recipes import RECIPES, Problem
from rana_fx.recipes.rana import recipe as rana
from tests.support.plain_llama import PlainLlama, Sizes

CPU = torch.device("cpu")


def here(monkeypatch, capsys):
    """The bench in this process, with one layer."""

    def worker(job):
        adapt_scale.worker(json.dumps(job))
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    config = SHAPES["tiny"]()
    config.num_hidden_layers = 1
    monkeypatch.setitem(SHAPES, "tiny", lambda: config)
    monkeypatch.setattr(adapt_scale, "_fresh", worker)


def test_a_row_has_the_time_of_every_stage(tmp_path, monkeypatch, capsys):
    here(monkeypatch, capsys)
    out = tmp_path / "rows.jsonl"
    measure(
        "tiny", out, tokens="2048", text=None, recipe="rana", budget=0.5, metric="bytes", context=64, batch_size=4,
        dtype="bfloat16", device="cpu",
    )  # fmt: skip
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["failed"] is None and row["tokens"] == 2048 - 256  # every eighth batch is held out
    assert set(row["seconds"]) == {"calibrate", "gradients", "decompose", "allocate", "build", "attach", "solve"}
    assert row["expected"]["bytes"] == pytest.approx(0.5, abs=0.02)
    assert row["peak_rss_gib"] >= row["rss_before_gib"] > 0.1 and row["gpu_gib"] == {}
    assert row["notes"] == [] and row["versions"]["torch"] and row["commit"]


def test_a_row_comes_from_a_process_of_its_own(tmp_path):
    """And a failure is a row."""
    out = tmp_path / "rows.jsonl"
    measure(
        "tiny", out, tokens="128", text=None, recipe="cats", budget=0.1, metric="flops", context=64, batch_size=1,
        dtype="float32", device="cpu",
    )  # fmt: skip
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["failed"].startswith("BudgetUnreachable: budget=0.100") and row["seconds"]["calibrate"] > 0
    assert row["peak_rss_gib"] > 0.1


def calibrated(model, wants):
    tee = Tee(random_batches(6000, 64, 4, 128))
    found = calibrate(model, tee, wanted=wants, progress=False)
    return Problem(found.layout, found.samples, 0.5, "flops", "rana", False, holdout=tee.holdout(model))


def test_moments_replace_rows_where_memory_is_short(monkeypatch):
    model, recipe = PlainLlama(1, Sizes(128, 64, 160)).eval(), RECIPES["rana"]
    whole = calibrated(model, counted_groups)
    assert recipe.wants(whole.layout) == dict.fromkeys(whole.samples, Keep())
    monkeypatch.setattr(rana, "_SAMPLES", 1e6)
    few = calibrated(model, recipe.wants)
    summed = {sites: sample for sites, sample in few.samples.items() if isinstance(sample, Summary)}
    # down has 160 inputs and 64 outputs, fewer than half as many: it has no basis
    assert set(summed) == {sites for sites in few.samples if "down" not in sites[0]} and len(summed) == len(few.samples) - 1
    for sites, sample in summed.items():
        # rows of one token in eight are kept: their moment and that of the other rows add up to the moment of all rows
        eighth, every = sample.rows().double(), whole.samples[sites].rows().double()
        assert len(eighth) + sample.summed == len(every)
        found = sample.moment.double() + eighth.t() @ eighth
        torch.testing.assert_close(found, every.t() @ every, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        made = [recipe.solve(problem) for problem in (whole, few)]
    total = whole.flops(tuple(whole.counted()))
    # a layer without an adapter, such as the gate of a joint candidate, is dense
    saved = [sum(adapter.dense_flops - adapter.flops for adapter in found) / total for found in made]
    assert saved == pytest.approx([0.5, 0.5], abs=0.03)
    kinds = [{(adapter.name, adapter.kind) for adapter in found} for found in made]
    assert len(kinds[0] & kinds[1]) >= len(kinds[0]) * 3 // 4
    # they are released after use; a sample that other budgets may use is kept
    assert all(sample.moment is None and len(sample.rows()) == 0 for sample in summed.values())
    assert all(len(sample.rows()) for sample in whole.samples.values())


def test_a_large_first_batch_runs_twice_and_counts_once():
    model = build("tiny", device=CPU, dtype="float32")
    ids = torch.randint(128, (70, 64), generator=torch.Generator().manual_seed(0))
    found = calibrate(model, [{"input_ids": ids, "use_cache": False}], wanted=counted_groups, progress=False)
    assert found.tokens == 4480 and {sample.seen for sample in found.samples.values()} == {4480}
    found = calibrate(model, [{"input_ids": ids, "use_cache": False}], progress=False)
    assert found.samples == {}
